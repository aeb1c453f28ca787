// decode, in registers: see decode_task.h. A few tokens meet the rows of a KV head at a time.
#pragma once

#include "decode_task.h"

namespace pagedflash {
namespace PAGEDFLASH_ISA {

constexpr int64_t BLOCK_TOKENS = 8;        // tokens that pass together, all heads of them before the next
constexpr int ROW_BLOCK = 4;               // rows that share each loaded key

// As many accumulators as there are registers for, in independent chains: a multiply-add takes longer than the next can start.
constexpr int tokens_at_once(int rows) { return rows == 3 ? 4 : min(4, ACCUMULATORS / rows); }
constexpr int chunks_at_once(int rows) {
  return rows == 3 ? ACCUMULATORS / 4 : min(ACCUMULATORS / 2 / rows, 128 / (2 * LANES));
}

template <int N>
struct Int {
  static constexpr int value = N;
};

// Calls body(Int<n>()) with n = min(rows, ROW_BLOCK), so that it is a constant in there.
template <class Body>
PAGEDFLASH_INLINE void with_row_count(int64_t rows, const Body& body) {
  static_assert(ROW_BLOCK == 4);
  switch (rows) {
    case 1: return body(Int<1>());
    case 2: return body(Int<2>());
    case 3: return body(Int<3>());
    default: return body(Int<4>());
  }
}

class Decode : public DecodeTask<Decode, BLOCK_TOKENS> {
 public:
  using DecodeTask::DecodeTask;

  void load_queries() {
    const CacheWrite& write = problem_.write;
    with_dot_product(write.dtype, write.k_dtype, [&](auto dot_product) {
      using Dot = decltype(dot_product);
      using Query = typename Dot::Query;
      with_dtype(write.dtype, [&](auto element) {
        load_rows<decltype(element)>([&](int64_t head, int64_t row, const auto* query) {
          Query* to = static_cast<Query*>(scratch_.queries) + head * rows_ * query_size_ + row * CHUNK;
          for (int64_t d = 0; d < query_size_; d += CHUNK) Dot::store_query(to + d * rows_, query + d);
        });
      });
    });
  }

  void score_tile(Range heads, int64_t tokens) {
    with_dot_product(problem_.write.dtype, problem_.write.k_dtype, [&](auto dot_product) {
      with_row_count(rows_, [&](auto rows) { score_rows<decltype(dot_product), decltype(rows)::value>(heads, tokens); });
    });
  }

  void accumulate_tile(Range heads, int64_t tokens) {
    with_format(problem_.write.v_dtype, [&](auto element) {
      with_row_count(rows_, [&](auto rows) { accumulate_rows<decltype(element), decltype(rows)::value>(heads, tokens); });
    });
  }

 private:
  static constexpr int64_t STEP = 2 * CHUNK;

  // Lines that are prefetched while so many elements of a token are multiplied.
  template <class Element, int64_t ELEMENTS>
  static constexpr int64_t LINES = divide_up(ELEMENTS * sizeof(Element), CACHE_LINE);

  // Those of a block of tokens; null if there are no more.
  template <class Element, int64_t ELEMENTS>
  PAGEDFLASH_INLINE const char* const* take_lines(Prefetcher& ahead) {
    return ahead.take(scratch_.lines, BLOCK_TOKENS * LINES<Element, ELEMENTS>) ? scratch_.lines : nullptr;
  }
  template <int64_t COUNT>
  static PAGEDFLASH_INLINE void prefetch_next(const char* const*& lines) {
    for (int64_t i = 0; i < COUNT; i++) prefetch(*lines++);
  }

  // What the loops need lies in local constants, here and in accumulate_rows: behind every store the compiler would read the
  // members again.
  template <class Dot, int ROWS>
  void score_rows(Range heads, int64_t tokens) {
    using Element = typename Dot::Element;
    using Query = typename Dot::Query;
    constexpr int TOKENS = tokens_at_once(ROWS);
    const int64_t rows = ROWS < ROW_BLOCK ? ROWS : rows_, query_size = query_size_;
    const int64_t k_head = problem_.write.k_stride.head;
    const int64_t bytes = head_dim_ * sizeof(Element);
    const int64_t lines = TOKENS * divide_up(head_dim_, STEP) * LINES<Element, STEP>;
    const char* const* k = scratch_.tokens.k;
    for (int64_t begin = 0; begin < tokens; begin += BLOCK_TOKENS) {
      Prefetcher ahead = prefetcher(k, begin, heads, problem_.write.k_stride, sizeof(Element), bytes);
      for (int64_t head = heads.begin; head < heads.end; head++) {
        const int64_t offset = (task_.kv_heads.begin + head) * k_head;
        const Query* query = static_cast<const Query*>(scratch_.queries) + head * rows * query_size;
        for (int64_t t = begin; t < begin + BLOCK_TOKENS; t += TOKENS) {
          const Element* key[TOKENS];
          for (int j = 0; j < TOKENS; j++) key[j] = reinterpret_cast<const Element*>(k[t + j]) + offset;
          float* scores = scratch_.scores + head * rows * DECODE_TILE + t;
          if (ahead.take(scratch_.lines, lines))
            score_block<Dot, ROWS, TOKENS, true>(key, query, rows, scores);
          else
            score_block<Dot, ROWS, TOKENS, false>(key, query, rows, scores);
          if (ROWS < ROW_BLOCK) continue;
          for (int64_t row = ROWS; row < rows; row += ROWS)
            with_row_count(rows - row, [&](auto count) {
              score_block<Dot, decltype(count)::value, TOKENS, false>(key, query + row * CHUNK, rows,
                                                                      scores + row * DECODE_TILE);
            });
        }
      }
    }
  }

  // Dot products of ROWS queries with TOKENS keys. Each pair has a register to accumulate in (or two, one for every other
  // chunk); reduce_sums() then folds LANES of these registers into one. If it PREFETCHES, it does so on the way.
  //
  //            key t        key t+1           a loaded chunk of a key meets all ROWS rows,
  //   row 0    accumulator  accumulator       a row's chunk comes from the first-level cache
  //   row 1    accumulator  accumulator
  template <class Dot, int ROWS, int TOKENS, bool PREFETCHES>
  PAGEDFLASH_INLINE void score_block(const typename Dot::Element* const* key, const typename Dot::Query* query, int64_t rows,
                                     float* scores) {
    constexpr int COUNT = (ROWS * TOKENS + LANES - 1) / LANES * LANES;
    constexpr int CHAINS = ROWS * TOKENS * 2 <= ACCUMULATORS ? 2 : 1;
    const int64_t head_dim = head_dim_, whole = head_dim / STEP * STEP;
    const char* const* lines = scratch_.lines;
    const auto prefetch_token = [&](bool first_chunk) {
      if (PREFETCHES && first_chunk) prefetch_next<LINES<typename Dot::Element, STEP>>(lines);
    };
    Vec accumulator[CHAINS][COUNT];
    for (int chain = 0; chain < CHAINS; chain++)
      for (int i = 0; i < COUNT; i++) accumulator[chain][i] = zero();
    for (int64_t d = 0; d < whole; d += STEP)
      for (int c = 0; c < STEP; c += CHUNK)
        score_chunk<Dot, ROWS, TOKENS>([&](int j) { return Dot::load_key(key[j] + d + c); }, query + (d + c) * rows,
                                       accumulator[c / CHUNK % CHAINS], [&] { prefetch_token(c == 0); });
    for (int64_t d = whole; d < head_dim; d += CHUNK)
      score_chunk<Dot, ROWS, TOKENS>([&](int j) { return Dot::load_key_part(key[j] + d, head_dim - d); }, query + d * rows,
                                     accumulator[0], [&] { prefetch_token(d == whole); });
    float dots[COUNT];
    for (int i = 0; i < COUNT; i++)
      if (CHAINS == 2) accumulator[0][i] = add(accumulator[0][i], accumulator[CHAINS - 1][i]);
    for (int i = 0; i < COUNT; i += LANES) store(dots + i, reduce_sums(accumulator[0] + i));
    for (int r = 0; r < ROWS; r++) memcpy(scores + r * DECODE_TILE, dots + r * TOKENS, TOKENS * sizeof(float));
  }

  // One chunk of each key and row. What is loaded first stays in registers while the other side passes. Calls prefetch_token()
  // TOKENS times on the way.
  template <class Dot, int ROWS, int TOKENS, class LoadKey, class PrefetchToken>
  static PAGEDFLASH_INLINE void score_chunk(const LoadKey& load_key, const typename Dot::Query* query, Vec* accumulator,
                                            const PrefetchToken& prefetch_token) {
    using Key = typename Dot::Key;
    if constexpr (ROWS >= TOKENS) {
      Key keys[TOKENS];
      for (int j = 0; j < TOKENS; j++) keys[j] = load_key(j);
      for (int r = 0; r < ROWS; r++) {
        const Key row = Dot::load_query(query + r * CHUNK);
        if (r < TOKENS) prefetch_token();
        for (int j = 0; j < TOKENS; j++) {
          Vec& sum = accumulator[r * TOKENS + j];
          sum = Dot::dot(keys[j], row, sum);
        }
      }
    } else {
      Key rows[ROWS];
      for (int r = 0; r < ROWS; r++) rows[r] = Dot::load_query(query + r * CHUNK);
      for (int j = 0; j < TOKENS; j++) {
        const Key key = load_key(j);
        prefetch_token();
        for (int r = 0; r < ROWS; r++) {
          Vec& sum = accumulator[r * TOKENS + j];
          sum = Dot::dot(key, rows[r], sum);
        }
      }
    }
  }

  template <class Element, int ROWS>
  void accumulate_rows(Range heads, int64_t tokens) {
    constexpr int CHUNKS = chunks_at_once(ROWS);
    const int64_t rows = ROWS < ROW_BLOCK ? ROWS : rows_, out_size = out_size_;
    const int64_t v_head = problem_.write.v_stride.head, v_head_dim = v_head_dim_, whole = v_head_dim / CHUNK * CHUNK;
    const char* const* v = scratch_.tokens.v;
    const int64_t bytes = problem_.write.v_is_in_k() ? 0 : v_head_dim * sizeof(Element);  // else scores have brought them near
    for (int64_t t = 0; t < tokens; t += BLOCK_TOKENS) {
      const int64_t count = min(BLOCK_TOKENS, tokens - t);
      Prefetcher ahead = prefetcher(v, t, heads, problem_.write.v_stride, sizeof(Element), bytes);
      for (int64_t head = heads.begin; head < heads.end; head++) {
        const int64_t offset = (task_.kv_heads.begin + head) * v_head;
        const float* weights = scratch_.scores + head * rows * DECODE_TILE + t;
        float* accumulators = scratch_.accumulators + head * rows * out_size;
        const Element* value[BLOCK_TOKENS];
        for (int j = 0; j < BLOCK_TOKENS; j++) value[j] = reinterpret_cast<const Element*>(v[t + j]) + offset;
        int64_t d = 0;
        // As many chunks at once as a row still has.
        const auto pass = [&](auto chunks) {
          constexpr int64_t N = decltype(chunks)::value;
          for (; d + N * CHUNK <= whole; d += N * CHUNK)
            accumulate_chunks<ROWS, N, BLOCK_TOKENS>(value, count, d, weights, rows, accumulators + d * rows,
                                                     take_lines<Element, N * CHUNK>(ahead));
        };
        if (count == BLOCK_TOKENS) {
          pass(Int<CHUNKS>());
          if constexpr (CHUNKS > 2) pass(Int<2>());
          if constexpr (CHUNKS > 1) pass(Int<1>());
        }
        for (; d < v_head_dim; d += CHUNK)
          accumulate_chunks<ROWS, 1, 0>(value, count, d, weights, rows, accumulators + d * rows,
                                        take_lines<Element, CHUNK>(ahead));
      }
    }
  }

  // CHUNKS chunks from element d on: all rows, while the chunks are cached. COUNT tokens in whole chunks; if 0, `count` tokens
  // in chunks that may reach behind the end of a row.
  template <int ROWS, int CHUNKS, int COUNT, class Element>
  PAGEDFLASH_INLINE void accumulate_chunks(const Element* const* value, int64_t count, int64_t d, const float* weights,
                                           int64_t rows, float* accumulators, const char* const* ahead) {
    accumulate_block<ROWS, CHUNKS, COUNT>(value, count, d, weights, rows, accumulators, ahead);
    if (ROWS < ROW_BLOCK) return;
    for (int64_t row = ROWS; row < rows; row += ROWS)
      with_row_count(rows - row, [&](auto block) {
        accumulate_block<decltype(block)::value, CHUNKS, COUNT>(value, count, d, weights + row * DECODE_TILE, rows,
                                                                accumulators + row * CHUNK, nullptr);
      });
  }

  // ROWS rows and CHUNKS chunks, in registers: accumulators += probabilities x values.
  template <int ROWS, int CHUNKS, int COUNT, class Element>
  PAGEDFLASH_INLINE void accumulate_block(const Element* const* value, int64_t count, int64_t d, const float* weights,
                                          int64_t rows, float* accumulators, const char* const* ahead) {
    const int64_t v_head_dim = v_head_dim_;
    Vec sum[ROWS][2 * CHUNKS];
    for (int c = 0; c < CHUNKS; c++)
      for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < 2; i++) sum[r][2 * c + i] = load(accumulators + (c * rows + r) * CHUNK + i * LANES);
    const auto add_token = [&](int64_t j) {
      if (ahead) prefetch_next<LINES<Element, CHUNKS * CHUNK>>(ahead);
      for (int c = 0; c < CHUNKS; c++) {
        const int64_t at = d + c * CHUNK;
        const bool whole = COUNT || v_head_dim - at >= CHUNK;
        const Chunk chunk = whole ? load_chunk(value[j] + at) : load_chunk_part(value[j] + at, v_head_dim - at);
        for (int r = 0; r < ROWS; r++) {
          const Vec weight = splat(weights[r * DECODE_TILE + j]);
          sum[r][2 * c] = fma(weight, chunk.a, sum[r][2 * c]);
          sum[r][2 * c + 1] = fma(weight, chunk.b, sum[r][2 * c + 1]);
        }
      }
    };
    if constexpr (COUNT > 0) {
#pragma GCC unroll 4
      for (int j = 0; j < COUNT; j++) add_token(j);
    } else {
      for (int64_t j = 0; j < count; j++) add_token(j);
    }
    for (int c = 0; c < CHUNKS; c++)
      for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < 2; i++) store(accumulators + (c * rows + r) * CHUNK + i * LANES, sum[r][2 * c + i]);
  }
};

}  // namespace PAGEDFLASH_ISA
}  // namespace pagedflash
