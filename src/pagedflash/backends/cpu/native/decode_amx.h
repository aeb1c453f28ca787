// decode, in AMX's tiles: see decode_task.h. bfloat16 queries; keys and values of bfloat16, or of a format that is exact in it.
// Probabilities are rounded to bfloat16, as in prefill; sums are float32.
//
//   scores    16 tokens x rows    += 16 tokens x 32 elements of K   *  16 pairs of elements x rows of the queries
//   output    rows x 16 elements  += rows x 32 tokens               *  16 pairs of tokens x 16 elements of V
//
// Keys are multiplied where they lie, if they are bfloat16 and 16 tokens lie at equal distances; else they are packed. Values
// are always packed, two tokens interleaved. What is packed for one head stays in the first-level cache.
#pragma once

#include "decode_task.h"
#include "tiles.h"

namespace pagedflash {
namespace PAGEDFLASH_ISA {

constexpr int64_t TILE_TOKENS = 16;        // of a tile of keys
constexpr int64_t PASS = 2 * TILE_TOKENS;  // tokens that are multiplied together
static_assert(CHUNK == 32 && MAX_DECODE_ROWS == 16);

// Pairs of the upper halves of the lanes of two registers: floats that are exact in bfloat16.
PAGEDFLASH_INLINE Vec pair_halves(Vec low, Vec high) {
  const __m512i shifted = _mm512_srli_epi32(_mm512_castps_si512(low), 16);
  const __m512i upper = _mm512_set1_epi32((int)0xFFFF0000);
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(upper, _mm512_castps_si512(high), shifted, 0xCA));  // upper ? high : low
}

// A chunk of the first n elements, zeros beyond them.
template <class E>
PAGEDFLASH_INLINE Chunk load_chunk_of(const E* p, int64_t n) {
  return n >= CHUNK ? load_chunk(p) : load_chunk_part(p, n);
}

// Two chunks interleaved: pairs of what load_chunk() has in its first and in its second register.
template <class E>
PAGEDFLASH_INLINE Chunk pair_chunks(const E* a, const E* b, int64_t n) {
  const Chunk first = load_chunk_of(a, n), second = load_chunk_of(b, n);
  return {pair_halves(first.a, second.a), pair_halves(first.b, second.b)};
}
PAGEDFLASH_INLINE Vec load_pairs_of(const bf16* p, int64_t n) {
  return n >= CHUNK ? _mm512_loadu_ps(reinterpret_cast<const float*>(p)) : load_pairs(p, n);
}
template <>
PAGEDFLASH_INLINE Chunk pair_chunks(const bf16* a, const bf16* b, int64_t n) {
  const __m512i first = _mm512_castps_si512(load_pairs_of(a, n)), second = _mm512_castps_si512(load_pairs_of(b, n));
  const __m512i upper = _mm512_set1_epi32((int)0xFFFF0000);
  return {_mm512_castsi512_ps(_mm512_ternarylogic_epi32(upper, _mm512_slli_epi32(second, 16), first, 0xCA)),
          _mm512_castsi512_ps(_mm512_ternarylogic_epi32(upper, second, _mm512_srli_epi32(first, 16), 0xCA))};
}

// A chunk of a key as pairs: of neighbours, or of elements LANES apart.
template <class E>
PAGEDFLASH_INLINE Vec key_pairs(const E* key, int64_t n) {
  const Chunk chunk = load_chunk_of(key, n);
  return pair_halves(chunk.a, chunk.b);
}
template <>
PAGEDFLASH_INLINE Vec key_pairs(const bf16* key, int64_t n) { return load_pairs(key, n); }

struct TileDecodeScratch {
  TileDecodeScratch(ScratchArena arena, const AttentionProblem& problem, int64_t heads, int64_t rows) {
    arena.allocate<char>(DecodeScratch(arena, problem, heads, rows).bytes);
    keys = arena.allocate<float>(PASS * round_up(problem.write.head_dim, CHUNK) / 2);
    values = arena.allocate<float>(round_up(problem.write.v_head_dim, CHUNK) * PASS / 2);
    sums = arena.allocate<float>(PASS * LANES);
    weights = arena.allocate<bf16>(MAX_DECODE_ROWS * PASS);
    bytes = arena.used();
  }

  float* keys;    // (PASS, head_dim / 2) pairs
  float* values;  // (v_head_dim / LANES, PASS / 2, LANES) pairs
  float* sums;    // (PASS, LANES) products q.k, a row of queries a lane
  bf16* weights;  // (rows, PASS)
  int64_t bytes;
};

class TileDecode : public DecodeTask<TileDecode, PASS> {
 public:
  TileDecode(const Plan& plan, const Task& task, void* scratch)
      : DecodeTask(plan, task, scratch), packed_(ScratchArena(scratch), problem_, heads_, rows_),
        session_({{TILE_TOKENS, rows_}, {TILE_TOKENS, rows_}, {LANES, rows_},  // two of scores, one of queries
                  {TILE_TOKENS, LANES}, {TILE_TOKENS, LANES},                  // keys or values
                  {rows_, LANES}, {rows_, LANES}, {rows_, LANES}}) {}          // probabilities, two of output

  // Fewer rows keep up with memory in registers.
  static bool takes(const CacheWrite& write, const Task& task) {
    return task.rows.size() > 4 && write.dtype == BFLOAT16 && is_exact(write.k_dtype) && is_exact(write.v_dtype);
  }

  // Pairs in the order of key_pairs(): a row's first pair of all rows, the second pair of all rows, ...
  void load_queries() {
    const int64_t step = problem_.write.k_dtype == BFLOAT16 ? 2 : 1, second = problem_.write.k_dtype == BFLOAT16 ? 1 : LANES;
    load_rows<bf16>([&](int64_t head, int64_t row, const bf16* query) {
      bf16* to = static_cast<bf16*>(scratch_.queries) + (head * query_size_ / 2 * rows_ + row) * 2;
      for (int64_t d = 0; d < query_size_; d += CHUNK) {
        for (int64_t i = 0; i < LANES; i++, to += 2 * rows_) {
          to[0] = query[d + i * step];
          to[1] = query[d + i * step + second];
        }
      }
    });
  }

  void score_tile(Range heads, int64_t tokens) {
    with_format(problem_.write.k_dtype, [&](auto element) {
      for (int64_t t = 0; t < tokens; t += PASS) score_pass<decltype(element)>(heads, t);
    });
  }

  void accumulate_tile(Range heads, int64_t tokens) {
    with_format(problem_.write.v_dtype, [&](auto element) {
      for (int64_t t = 0; t < tokens; t += PASS) accumulate_pass<decltype(element)>(heads, t, tokens - t);
    });
  }

 private:
  static bool is_exact(int64_t dtype) {
    return dtype == BFLOAT16 || dtype == INT8 || dtype == FLOAT8_E4M3 || dtype == FLOAT8_E5M2;
  }

  // Whether 16 keys can be multiplied where they lie.
  template <class E>
  bool in_place(const char* const* k) const {
    if constexpr (sizeof(E) != sizeof(bf16)) return false;
    if (head_dim_ % CHUNK) return false;
    const int64_t distance = problem_.write.k_stride.token * sizeof(E);
    for (int64_t t = 1; t < TILE_TOKENS; t++)
      if (k[t] - k[t - 1] != distance) return false;
    return true;
  }

  template <class E>
  void score_pass(Range heads, int64_t first) {
    const CacheWrite& write = problem_.write;
    const char* const* k = scratch_.tokens.k + first;
    const int64_t query_size = query_size_, row_bytes = rows_ * 4;
    const int64_t bytes = head_dim_ * sizeof(E);
    const int64_t lines = divide_up(PASS * divide_up(bytes, CACHE_LINE), query_size / CHUNK * 4);  // four times for each chunk
    Prefetcher ahead = prefetcher(scratch_.tokens.k, first, heads, write.k_stride, sizeof(E), bytes);
    const bool packs[2] = {!in_place<E>(k), !in_place<E>(k + TILE_TOKENS)};
    for (int64_t head = heads.begin; head < heads.end; head++) {
      const int64_t offset = (task_.kv_heads.begin + head) * write.k_stride.head;
      const char* keys[2];
      int64_t stride[2];
      for (int i = 0; i < 2; i++) {
        const char* const* tile = k + i * TILE_TOKENS;
        keys[i] = tile[0] + offset * sizeof(E), stride[i] = write.k_stride.token * sizeof(E);
        if (!packs[i]) continue;
        float* to = packed_.keys + i * TILE_TOKENS * query_size / 2;
        keys[i] = reinterpret_cast<const char*>(to), stride[i] = query_size * sizeof(bf16);
        for (int64_t t = 0; t < TILE_TOKENS; t++, to += query_size / 2)
          for (int64_t d = 0; d < query_size; d += CHUNK)
            store(to + d / 2, key_pairs(reinterpret_cast<const E*>(tile[t]) + offset + d, head_dim_ - d));
      }
      const bf16* queries = static_cast<const bf16*>(scratch_.queries) + head * rows_ * query_size;
      const char* const* line = scratch_.lines;
      const int64_t lines_now = ahead.take(scratch_.lines, query_size / CHUNK * 4 * lines) ? lines : 0;
      const auto prefetch_some = [&] {
        for (int64_t i = 0; i < lines_now; i++) prefetch(*line++);
      };
      TileSession::before_tiles_read();
      _tile_zero(0);
      _tile_zero(1);
      for (int64_t d = 0; d < query_size; d += CHUNK) {
        _tile_loadd(2, queries + d * rows_, row_bytes);
        prefetch_some();
        _tile_loadd(3, keys[0] + d * sizeof(bf16), stride[0]);
        prefetch_some();
        _tile_dpbf16ps(0, 3, 2);
        _tile_loadd(4, keys[1] + d * sizeof(bf16), stride[1]);
        prefetch_some();
        _tile_dpbf16ps(1, 4, 2);
        prefetch_some();
      }
      _tile_stored(0, packed_.sums, LANES * sizeof(float));
      _tile_stored(1, packed_.sums + TILE_TOKENS * LANES, LANES * sizeof(float));
      TileSession::before_tiles_read();
      for (int64_t t = 0; t < PASS; t += LANES) {
        Vec rows[LANES];
        for (int i = 0; i < LANES; i++) rows[i] = load(packed_.sums + (t + i) * LANES);
        transpose(rows);
        float* scores = scratch_.scores + head * rows_ * DECODE_TILE + first + t;
        for (int64_t row = 0; row < rows_; row++) store(scores + row * DECODE_TILE, rows[row]);
      }
    }
  }

  template <class E>
  void accumulate_pass(Range heads, int64_t first, int64_t tokens) {
    const CacheWrite& write = problem_.write;
    const char* const* v = scratch_.tokens.v + first;
    const int64_t v_head_dim = v_head_dim_, out_size = out_size_, rows = rows_;
    constexpr int64_t LINES = 2 * CHUNK * sizeof(E) / CACHE_LINE;  // of a pair of tokens
    const int64_t bytes = write.v_is_in_k() ? 0 : v_head_dim * sizeof(E);  // else scores have brought them near
    Prefetcher ahead = prefetcher(scratch_.tokens.v, first, heads, write.v_stride, sizeof(E), bytes);
    for (int64_t head = heads.begin; head < heads.end; head++) {
      const int64_t offset = (task_.kv_heads.begin + head) * write.v_stride.head;
      const float* weights = scratch_.scores + head * rows * DECODE_TILE + first;
      for (int64_t row = 0; row < rows; row++)
        for (int64_t t = 0; t < PASS; t += LANES)
          store_rounded(packed_.weights + row * PASS + t, t < tokens ? load(weights + row * DECODE_TILE + t) : zero());
      for (int64_t d = 0; d < out_size; d += CHUNK) {
        float* to = packed_.values + d * PASS / 2;
        const char* const* line = scratch_.lines;
        const bool prefetches = ahead.take(scratch_.lines, PASS / 2 * LINES);
        for (int64_t t = 0; t < PASS; t += 2, to += LANES) {
          for (int64_t i = 0; prefetches && i < LINES; i++) prefetch(*line++);
          const E *a = reinterpret_cast<const E*>(v[t]) + offset + d, *b = reinterpret_cast<const E*>(v[t + 1]) + offset + d;
          const Chunk pairs = pair_chunks(a, b, v_head_dim - d);
          store(to, pairs.a);
          store(to + TILE_TOKENS * LANES, pairs.b);
        }
      }
      TileSession::before_tiles_read();
      _tile_loadd(5, packed_.weights, PASS * sizeof(bf16));
      for (int64_t d = 0; d < out_size; d += CHUNK) {
        const float* values = packed_.values + d * PASS / 2;
        float* sums = scratch_.accumulators + (head * out_size + d) * rows;
        _tile_loadd(6, sums, CHUNK * sizeof(float));
        _tile_loadd(7, sums + LANES, CHUNK * sizeof(float));
        _tile_loadd(3, values, LANES * sizeof(float));
        _tile_loadd(4, values + TILE_TOKENS * LANES, LANES * sizeof(float));
        _tile_dpbf16ps(6, 5, 3);
        _tile_dpbf16ps(7, 5, 4);
        _tile_stored(6, sums, CHUNK * sizeof(float));
        _tile_stored(7, sums + LANES, CHUNK * sizeof(float));
      }
      TileSession::before_tiles_read();
    }
  }

  const TileDecodeScratch packed_;
  const TileSession session_;
};

}  // namespace PAGEDFLASH_ISA
}  // namespace pagedflash
