// prefill: a block of packed-GQA rows of one KV head against its keys, tile by tile, as two matrix products of packed floats.
// Pages are read where they lie: packing is the only copy, and it widens float16 and bfloat16 on the way.
//
//   queries   rows x head_dim, widened once
//   for each tile of keys that some row sees
//     for each panel of PANEL keys
//       pack K    transposed:                            head_dim x PANEL
//       scores    = queries x K                          rows x PANEL of the tile
//     softmax     scores become probabilities, in place
//     pack V      panels of PANEL elements:              tile x PANEL
//     output      = output * alpha + probabilities x V   rows x v_head_dim
//   one output, or partial output, per row
//
// Rows are multiplied GEMM_ROWS at a time, and only with the keys that one of them sees:
//
//                  panels of keys
//   rows 0 to 5    # # . . . .       a window (or a causal mask) costs what it leaves,
//   rows 6 to 11   . # # . . .       not what its tiles cover
//   rows 12 to 17  . . # # . .
//
// Meanwhile what the next product needs is prefetched, a few lines before each multiplication: in one burst they would stall
// the processor, and what is prefetched too early is evicted by rows that lie a power of two apart.
#pragma once

#include "kv_format.h"
#include "paging.h"
#include "rows.h"
#include "scratch.h"

namespace pagedflash {
namespace PAGEDFLASH_ISA {

constexpr int64_t PANEL = GEMM_VECS * LANES;  // columns of a packed panel: keys, or elements of values
constexpr int64_t PREFILL_TILE = 128;         // keys

// c (GEMM_ROWS x PANEL) = a (GEMM_ROWS x depth) x b (depth x PANEL), or with alpha = c * alpha[row] + a x b.
PAGEDFLASH_INLINE void multiply_block(const float* a, int64_t a_stride, const float* b, int64_t depth, float* c,
                                      int64_t c_stride, const float* alpha) {
  Vec sum[GEMM_ROWS][GEMM_VECS];
  for (int r = 0; r < GEMM_ROWS; r++)
    for (int i = 0; i < GEMM_VECS; i++)
      sum[r][i] = alpha ? mul(splat(alpha[r]), load(c + r * c_stride + i * LANES)) : zero();
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; k++) {
    Vec column[GEMM_VECS];
    for (int i = 0; i < GEMM_VECS; i++) column[i] = load(b + k * PANEL + i * LANES);
    for (int r = 0; r < GEMM_ROWS; r++) {
      const Vec factor = splat(a[r * a_stride + k]);
      for (int i = 0; i < GEMM_VECS; i++) sum[r][i] = fma(factor, column[i], sum[r][i]);
    }
  }
  for (int r = 0; r < GEMM_ROWS; r++)
    for (int i = 0; i < GEMM_VECS; i++) store(c + r * c_stride + i * LANES, sum[r][i]);
}

struct PrefillScratch {
  PrefillScratch(ScratchArena arena, const AttentionProblem& problem) {
    constexpr int64_t rows = PREFILL_ROWS + GEMM_ROWS;
    const int64_t head_dim = problem.write.head_dim, out_size = round_up(problem.write.v_head_dim, PANEL);
    queries = arena.allocate<float>(rows * head_dim);
    scores = arena.allocate<float>(rows * PREFILL_TILE);
    accumulators = arena.allocate<float>(rows * out_size);
    alpha = arena.allocate<float>(rows);
    states = arena.allocate<SoftmaxState>(rows);
    score_rows = arena.allocate<ScoreRow>(rows);
    seen = arena.allocate<Range>(rows / GEMM_ROWS);
    k_panel = arena.allocate<float>(head_dim * PANEL);
    v_panels = arena.allocate<float>(out_size * PREFILL_TILE);
    for (int i = 0; i < 2; i++) {
      tokens[i].k = arena.allocate<const char*>(PREFILL_TILE);
      tokens[i].v = arena.allocate<const char*>(PREFILL_TILE);
      tokens[i].k_descale = arena.allocate<const float*>(PREFILL_TILE);
      tokens[i].v_descale = arena.allocate<const float*>(PREFILL_TILE);
    }
    bytes = arena.used();
  }

  float* queries;          // (rows, head_dim)
  float* scores;           // (rows, PREFILL_TILE)
  float* accumulators;     // (rows, v_head_dim padded to PANEL)
  float* alpha;            // (rows)
  SoftmaxState* states;    // (rows)
  ScoreRow* score_rows;    // (rows)
  Range* seen;             // (rows / GEMM_ROWS), of the tile
  float* k_panel;          // (head_dim, PANEL)
  float* v_panels;         // (v_head_dim / PANEL, PREFILL_TILE, PANEL)
  TokenAddresses tokens[2];  // of this tile and of the next
  int64_t bytes;
};

inline int64_t prefill_scratch_bytes(const AttentionProblem& problem) {
  return PrefillScratch(ScratchArena(nullptr), problem).bytes;
}

template <class T>
class Prefill {
 public:
  Prefill(const Plan& plan, const Task& task, void* scratch)
      : plan_(plan), problem_(plan.problem), task_(task), sequence_(plan.sequences[task.sequence]), score_(problem_),
        kv_head_(task.kv_heads.begin), rows_(task.rows.size()), padded_rows_(round_up(rows_, GEMM_ROWS)),
        head_dim_(problem_.write.head_dim), v_head_dim_(problem_.write.v_head_dim),
        out_size_(round_up(v_head_dim_, PANEL)), scratch_(ScratchArena(scratch), problem_) {}

  void run() {
    load_queries();
    int now = 0;
    locate_tile(now, task_.keys.begin);
    for (int64_t first = task_.keys.begin; first < task_.keys.end; first += PREFILL_TILE, now ^= 1) {
      const int64_t tokens = tile_size(first);
      locate_tile(now ^ 1, first + PREFILL_TILE);
      find_seen(first, tokens);
      score(scratch_.tokens[now], tokens);
      softmax(first);
      accumulate(scratch_.tokens[now], scratch_.tokens[now ^ 1], tokens, tile_size(first + PREFILL_TILE));
    }
    for (int64_t row = 0; row < rows_; row++)
      finish_row<T>(plan_, task_, kv_head_, task_.rows.begin + row, scratch_.accumulators + row * out_size_,
                    scratch_.states[row]);
  }

 private:
  // Prefetches one head of keys or values, in so many `steps`.
  class Prefetcher {
   public:
    Prefetcher(const char* const* tokens, int64_t count, int64_t offset, int64_t size, int64_t steps)
        : tokens_(tokens), count_(count), offset_(offset), size_(size),
          lines_(divide_up(count * divide_up(size, CACHE_LINE), steps)) {}

    PAGEDFLASH_INLINE void step() {
      for (int64_t i = 0; i < lines_ && token_ < count_; i++) {
        prefetch(tokens_[token_] + offset_ + byte_);
        byte_ += CACHE_LINE;
        if (byte_ < size_) continue;
        byte_ = 0;
        token_++;
      }
    }

   private:
    const char* const* tokens_;
    const int64_t count_, offset_, size_;  // tokens, bytes to the head, bytes of a token
    const int64_t lines_;                  // of each step
    int64_t token_ = 0, byte_ = 0;
  };

  int64_t tile_size(int64_t first) const { return max<int64_t>(0, min(PREFILL_TILE, task_.keys.end - first)); }
  void locate_tile(int which, int64_t first) {
    locate(problem_, sequence_, first, tile_size(first), scratch_.tokens[which]);
  }

  void load_queries() {
    for (int64_t row = 0; row < rows_; row++) {
      const QueryAndHead at = unpack_row(problem_, kv_head_, task_.rows.begin + row);
      load_query<T>(problem_, sequence_, at.query, at.head, scratch_.queries + row * head_dim_, head_dim_);
      scratch_.score_rows[row] = score_row(problem_, sequence_, at.query, at.head);
      scratch_.states[row] = SoftmaxState();
    }
    const int64_t padding = padded_rows_ - rows_;  // rows that nobody reads, but that are multiplied
    memset(scratch_.queries + rows_ * head_dim_, 0, padding * head_dim_ * sizeof(float));
    for (int64_t row = rows_; row < padded_rows_; row++) scratch_.alpha[row] = 0;
    memset(scratch_.accumulators, 0, padded_rows_ * out_size_ * sizeof(float));
  }

  // The keys of the tile that the rows of each block see, from a multiple of LANES on.
  void find_seen(int64_t first, int64_t tokens) {
    for (int64_t block = 0; block < rows_; block += GEMM_ROWS) {
      Range seen = {tokens, 0};
      for (int64_t row = block; row < min(block + GEMM_ROWS, rows_); row++) {
        const Range of_row = scratch_.score_rows[row].kv_range;
        if (!of_row.size()) continue;
        seen.begin = min(seen.begin, max<int64_t>(0, of_row.begin - first) / LANES * LANES);
        seen.end = max(seen.end, min(tokens, of_row.end - first));
      }
      scratch_.seen[block / GEMM_ROWS] = seen;
    }
  }

  // Meanwhile the next panel's keys and the tile's values are prefetched.
  void score(const TokenAddresses& tile, int64_t tokens) {
    const CacheWrite& write = problem_.write;
    const int64_t k_bytes = element_size(write.k_dtype), v_bytes = element_size(write.v_dtype);
    const int64_t k_head = kv_head_ * write.k_stride.head * k_bytes, v_head = kv_head_ * write.v_stride.head * v_bytes;
    const int64_t blocks = padded_rows_ / GEMM_ROWS;
    Prefetcher values(tile.v, tokens, v_head, v_head_dim_ * v_bytes, blocks * divide_up(tokens, PANEL));
    for (int64_t t = 0; t < tokens; t += PANEL) {
      with_format(write.k_dtype, [&](auto element) { pack_keys<decltype(element)>(tile + t, min(PANEL, tokens - t)); });
      const int64_t next_tokens = max<int64_t>(0, min(PANEL, tokens - t - PANEL));
      Prefetcher keys(tile.k + t + PANEL, next_tokens, k_head, head_dim_ * k_bytes, blocks);
      for (int64_t block = 0, row = 0; block < blocks; block++, row += GEMM_ROWS) {
        keys.step();
        values.step();
        if (scratch_.seen[block].begin < t + PANEL && t < scratch_.seen[block].end)
          multiply_block(scratch_.queries + row * head_dim_, head_dim_, scratch_.k_panel, head_dim_,
                         scratch_.scores + row * PREFILL_TILE + t, PREFILL_TILE, nullptr);
      }
    }
  }

  // Keys become columns: LANES keys x LANES elements are transposed in registers. Behind the last key it is repeated.
  template <class E>
  void pack_keys(const TokenAddresses& tile, int64_t tokens) {
    const CacheWrite& write = problem_.write;
    const int64_t offset = kv_head_ * write.k_stride.head;
    for (int64_t t = 0; t < PANEL; t += LANES) {
      Vec descale = splat(1.0f);
      if (LARGEST<E> > 0) {
        float descales[LANES];
        for (int i = 0; i < LANES; i++)
          descales[i] = tile.k_descale[min(t + i, tokens - 1)][kv_head_ * write.k_descale_stride.head];
        descale = load(descales);
      }
      for (int64_t d = 0; d < head_dim_; d += LANES) {
        Vec block[LANES];
        for (int i = 0; i < LANES; i++)
          block[i] = load_part(reinterpret_cast<const E*>(tile.k[min(t + i, tokens - 1)]) + offset + d, head_dim_ - d);
        transpose(block);
        if (LARGEST<E> > 0)
          for (int i = 0; i < LANES; i++) block[i] = mul(block[i], descale);
        for (int i = 0; i < LANES && d + i < head_dim_; i++) store(scratch_.k_panel + (d + i) * PANEL + t, block[i]);
      }
    }
  }

  void softmax(int64_t first) {
    for (int64_t row = 0; row < rows_; row++) {
      const Range seen = scratch_.seen[row / GEMM_ROWS];
      scratch_.alpha[row] = softmax_tile(scratch_.scores + row * PREFILL_TILE + seen.begin, score_, scratch_.score_rows[row],
                                         first + seen.begin, seen.size(), scratch_.states[row]);
    }
  }

  // Meanwhile the first keys of the next tile are prefetched. A panel stays in the first-level cache while all rows pass.
  void accumulate(const TokenAddresses& tile, const TokenAddresses& next, int64_t tokens, int64_t next_tokens) {
    const CacheWrite& write = problem_.write;
    with_format(write.v_dtype, [&](auto element) { pack_values<decltype(element)>(tile, tokens); });
    const int64_t blocks = padded_rows_ / GEMM_ROWS, k_bytes = element_size(write.k_dtype);
    Prefetcher keys(next.k, min(PANEL, next_tokens), kv_head_ * write.k_stride.head * k_bytes, head_dim_ * k_bytes,
                    blocks * (out_size_ / PANEL));
    for (int64_t column = 0; column < out_size_; column += PANEL) {
      const float* panel = scratch_.v_panels + column * PREFILL_TILE;
      for (int64_t block = 0, row = 0; block < blocks; block++, row += GEMM_ROWS) {
        keys.step();
        const Range seen = scratch_.seen[block];
        if (seen.size() > 0)
          multiply_block(scratch_.scores + row * PREFILL_TILE + seen.begin, PREFILL_TILE, panel + seen.begin * PANEL,
                         seen.size(), scratch_.accumulators + row * out_size_ + column, out_size_, scratch_.alpha + row);
      }
    }
  }

  template <class E>
  void pack_values(const TokenAddresses& tile, int64_t tokens) {
    const CacheWrite& write = problem_.write;
    for (int64_t t = 0; t < tokens; t++) {
      const E* value = reinterpret_cast<const E*>(tile.v[t]) + kv_head_ * write.v_stride.head;
      const Vec descale = splat(LARGEST<E> > 0 ? tile.v_descale[t][kv_head_ * write.v_descale_stride.head] : 1.0f);
      for (int64_t d = 0; d < out_size_; d += LANES) {
        float* panel = scratch_.v_panels + d / PANEL * PANEL * PREFILL_TILE + d % PANEL;
        const Vec values = d < v_head_dim_ ? load_part(value + d, v_head_dim_ - d) : zero();
        store(panel + t * PANEL, LARGEST<E> > 0 ? mul(values, descale) : values);
      }
    }
  }

  const Plan& plan_;
  const AttentionProblem& problem_;
  const Task& task_;
  const Sequence& sequence_;
  const Score score_;
  const int64_t kv_head_, rows_, padded_rows_, head_dim_, v_head_dim_, out_size_;
  const PrefillScratch scratch_;
};

}  // namespace PAGEDFLASH_ISA
}  // namespace pagedflash
