// prefill: a block of packed-GQA rows of one KV head against its keys, tile by tile, as two matrix products (gemm.h).
// Pages are read where they lie: packing is the only copy, and it converts what is not multiplied as it is.
//
//   queries   rows x head_dim, packed once
//   for each tile of keys that some row sees
//     for each panel of PANEL keys
//       pack K    transposed:                            head_dim x PANEL
//       scores    = queries x K                          rows x PANEL of the tile
//     softmax     scores become probabilities, in place
//     pack V      panels of PANEL elements:              tile x PANEL
//     output      = output * alpha + probabilities x V   rows x v_head_dim
//   one output, or partial output, per row
//
// Rows are multiplied Gemm::ROWS at a time, and only with the keys that one of them sees:
//
//                  panels of keys
//   rows 0 to 5    # # . . . .       a window (or a causal mask) costs what it leaves,
//   rows 6 to 11   . # # . . .       not what its tiles cover
//   rows 12 to 17  . . # # . .
//
// Meanwhile what the next product needs is prefetched, a few lines before each multiplication: in one burst they would stall
// the processor, and what is prefetched too early is evicted by rows that lie a power of two apart.
#pragma once

#include "pack.h"
#include "paging.h"
#include "rows.h"
#include "scratch.h"

namespace pagedflash {
namespace PAGEDFLASH_ISA {

template <class T>
struct PrefillScratch {
  PrefillScratch(ScratchArena arena, const AttentionProblem& problem, int64_t task_rows) {
    constexpr int64_t keys = Gemm<T>::TILE_KEYS;
    const int64_t rows = round_up(task_rows, Gemm<T>::ROWS);
    const int64_t query_size = round_up(problem.write.head_dim, Gemm<T>::STEP);
    const int64_t out_size = round_up(problem.write.v_head_dim, PANEL);
    queries = arena.allocate<float>(rows * (query_size / Gemm<T>::GROUP + Gemm<T>::PADDING));
    scores = arena.allocate<float>(Gemm<T>::PASS_ROWS * (keys + Gemm<T>::PADDING));
    accumulators = arena.allocate<float>(rows * (out_size + Gemm<T>::PADDING));
    alpha = arena.allocate<float>(rows);
    states = arena.allocate<SoftmaxState>(rows);
    score_rows = arena.allocate<ScoreRow>(rows);
    seen = arena.allocate<Range>(rows / Gemm<T>::ROWS);
    has_sums = arena.allocate<bool>(rows / Gemm<T>::ROWS);
    k_panels = arena.allocate<float>(query_size / Gemm<T>::GROUP * keys);
    v_panels = arena.allocate<float>(out_size * keys / Gemm<T>::GROUP);
    for (int i = 0; i < 2; i++) {
      tokens[i].k = arena.allocate<const char*>(keys);
      tokens[i].v = arena.allocate<const char*>(keys);
      tokens[i].k_descale = arena.allocate<const float*>(keys);
      tokens[i].v_descale = arena.allocate<const float*>(keys);
    }
    query = arena.allocate<T>(query_size);
    bytes = arena.used();
  }

  // Queries, panels and, in place of scores, probabilities are groups of Gemm<T>: so many elements make one.
  float* queries;          // (rows, head_dim padded to STEP)
  float* scores;           // (PASS_ROWS, TILE_KEYS)
  float* accumulators;     // (rows, v_head_dim padded to PANEL)
  float* alpha;            // (rows)
  SoftmaxState* states;    // (rows)
  ScoreRow* score_rows;    // (rows)
  Range* seen;             // (rows / ROWS), of the tile
  bool* has_sums;          // (rows / ROWS): whether a block has accumulators yet
  float* k_panels;         // (TILE_KEYS / PANEL, head_dim padded to STEP, PANEL)
  float* v_panels;         // (v_head_dim / PANEL, TILE_KEYS, PANEL)
  TokenAddresses tokens[2];  // of this tile and of the next
  T* query;                // (head_dim padded to STEP), one row as it is loaded
  int64_t bytes;
};

template <class T>
class Prefill {
 public:
  Prefill(const Plan& plan, const Task& task, void* scratch)
      : plan_(plan), problem_(plan.problem), task_(task), sequence_(plan.sequences[task.sequence]), score_(problem_),
        kv_head_(task.kv_heads.begin), rows_(task.rows.size()), padded_rows_(round_up(rows_, ROWS)),
        head_dim_(problem_.write.head_dim), query_size_(round_up(head_dim_, STEP)), v_head_dim_(problem_.write.v_head_dim),
        out_size_(round_up(v_head_dim_, PANEL)), query_stride_(query_size_ / GROUP + Product::PADDING),
        out_stride_(out_size_ + Product::PADDING), scratch_(ScratchArena(scratch), problem_, rows_) {}

  void run() {
    load_queries();
    int now = 0;
    locate_tile(now, task_.keys.begin);
    for (int64_t first = task_.keys.begin; first < task_.keys.end; first += TILE_KEYS, now ^= 1) {
      const int64_t tokens = tile_size(first);
      locate_tile(now ^ 1, first + TILE_KEYS);
      find_seen<Product>(scratch_.score_rows, rows_, first, tokens, scratch_.seen);
      const TokenAddresses &tile = scratch_.tokens[now], &next = scratch_.tokens[now ^ 1];
      for (int64_t begin = 0; begin < padded_rows_; begin += PASS_ROWS) {
        const Range rows = {begin, min(padded_rows_, begin + PASS_ROWS)};
        score(rows, tile, tokens);
        if (problem_.write.k_descale) scale_scores(rows, tile.k_descale, tokens);
        softmax(rows, first);
        accumulate(rows, tile, next, tokens, tile_size(first + TILE_KEYS));
      }
    }
    for (int64_t row = 0; row < rows_; row++)
      finish_row<T>(plan_, task_, kv_head_, task_.rows.begin + row, scratch_.accumulators + row * out_stride_,
                    scratch_.states[row]);
  }

 private:
  using Product = Gemm<T>;
  static constexpr int64_t ROWS = Product::ROWS, STEP = Product::STEP, GROUP = Product::GROUP;
  static constexpr int64_t TILE_KEYS = Product::TILE_KEYS, PASS_ROWS = Product::PASS_ROWS;
  static constexpr int64_t SCORE_STRIDE = TILE_KEYS + Product::PADDING;
  static_assert(TILE_KEYS <= MAX_TILE);

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

  int64_t tile_size(int64_t first) const { return max<int64_t>(0, min(TILE_KEYS, task_.keys.end - first)); }
  void locate_tile(int which, int64_t first) {
    locate(problem_, sequence_, first, tile_size(first), scratch_.tokens[which]);
  }

  void load_queries() {
    for (int64_t row = 0; row < rows_; row++) {
      const QueryAndHead at = unpack_row(problem_, kv_head_, task_.rows.begin + row);
      load_query(problem_, sequence_, at.query, at.head, scratch_.query, query_size_);
      Product::store_query(row_queries(row), scratch_.query, query_size_);
      scratch_.score_rows[row] = score_row(problem_, sequence_, at.query, at.head);
      scratch_.states[row] = SoftmaxState();
    }
    const int64_t padding = padded_rows_ - rows_;  // rows that nobody reads, but that are multiplied
    memset(row_queries(rows_), 0, padding * query_stride_ * sizeof(float));
    for (int64_t row = rows_; row < padded_rows_; row++) scratch_.alpha[row] = 1;
    memset(scratch_.has_sums, false, padded_rows_ / ROWS);
  }

  float* row_queries(int64_t row) const { return scratch_.queries + row * query_stride_; }

  // The first rows pack the keys. Meanwhile the next panel's keys and the tile's values are prefetched.
  void score(Range rows, const TokenAddresses& tile, int64_t tokens) {
    const CacheWrite& write = problem_.write;
    const int64_t k_bytes = element_size(write.k_dtype), v_bytes = element_size(write.v_dtype);
    const int64_t k_head = kv_head_ * write.k_stride.head * k_bytes, v_head = kv_head_ * write.v_stride.head * v_bytes;
    const int64_t blocks = rows.size() / ROWS;
    const bool packs = rows.begin == 0;
    const int64_t value_tokens = packs && !write.v_is_in_k() ? tokens : 0;
    Prefetcher values(tile.v, value_tokens, v_head, v_head_dim_ * v_bytes, blocks * divide_up(tokens, PANEL));
    for (int64_t t = 0; t < tokens; t += PANEL) {
      float* panel = scratch_.k_panels + t * query_size_ / GROUP;
      if (packs)
        with_format(write.k_dtype,
                    [&](auto element) { pack_keys<decltype(element)>(panel, tile.k + t, min(PANEL, tokens - t)); });
      const int64_t next = packs ? max<int64_t>(0, min(PANEL, tokens - t - PANEL)) : 0;
      Prefetcher keys(tile.k + t + PANEL, next, k_head, head_dim_ * k_bytes, blocks);
      for (int64_t row = rows.begin; row < rows.end; row += ROWS) {
        keys.step();
        values.step();
        const Range seen = scratch_.seen[row / ROWS];
        if (seen.begin < t + PANEL && t < seen.end)
          Product::multiply_block(row_queries(row), query_stride_, panel, query_size_ / GROUP,
                                  scratch_.scores + (row - rows.begin) * SCORE_STRIDE + t, SCORE_STRIDE, nullptr);
      }
    }
  }

  template <class E>
  void pack_keys(float* panel, const char* const* k, int64_t tokens) {
    const int64_t offset = kv_head_ * problem_.write.k_stride.head;
    pack_columns<Product>(panel, tokens, head_dim_,
                          [&](int64_t t) { return reinterpret_cast<const E*>(k[t]) + offset; });
  }

  void scale_scores(Range rows, const float* const* descales, int64_t tokens) {
    float scales[TILE_KEYS];
    for (int64_t t = 0; t < tokens; t++) scales[t] = descales[t][kv_head_ * problem_.write.k_descale_stride.head];
    for (int64_t row = rows.begin; row < min(rows.end, rows_); row++) {
      float* scores = scratch_.scores + (row - rows.begin) * SCORE_STRIDE;
      const Range seen = scratch_.seen[row / ROWS];
      for (int64_t t = seen.begin; t < seen.end; t++) scores[t] *= scales[t];
    }
  }

  void softmax(Range rows, int64_t first) {
    for (int64_t row = rows.begin; row < min(rows.end, rows_); row++) {
      const Range seen = scratch_.seen[row / ROWS];
      float* scores = scratch_.scores + (row - rows.begin) * SCORE_STRIDE + seen.begin;
      scratch_.alpha[row] = softmax_tile(scores, score_, scratch_.score_rows[row], first + seen.begin, seen.size(),
                                         scratch_.states[row], Product::store_elements);
      for (int64_t i = round_up(seen.size(), LANES); i < round_up(seen.size(), STEP); i += LANES)
        Product::store_elements(scores, i, zero());
    }
  }

  // The first rows pack the values. Meanwhile the first keys of the next tile are prefetched. A panel stays in the first-level
  // cache while all rows pass.
  void accumulate(Range rows, const TokenAddresses& tile, const TokenAddresses& next, int64_t tokens, int64_t next_tokens) {
    const CacheWrite& write = problem_.write;
    const int64_t blocks = rows.size() / ROWS, k_bytes = element_size(write.k_dtype);
    if (rows.begin == 0)
      with_format(write.v_dtype, [&](auto element) { pack_values<decltype(element)>(tile, tokens); });
    else
      next_tokens = 0;
    Prefetcher keys(next.k, min(PANEL, next_tokens), kv_head_ * write.k_stride.head * k_bytes, head_dim_ * k_bytes,
                    blocks * (out_size_ / PANEL));
    for (int64_t column = 0; column < out_size_; column += PANEL) {
      const float* panel = scratch_.v_panels + column * TILE_KEYS / GROUP;
      for (int64_t row = rows.begin; row < rows.end; row += ROWS) {
        keys.step();
        const Range seen = scratch_.seen[row / ROWS];
        if (seen.size() > 0)
          Product::multiply_block(scratch_.scores + (row - rows.begin) * SCORE_STRIDE + seen.begin, SCORE_STRIDE,
                                  panel + seen.begin / GROUP * PANEL, round_up(seen.size(), STEP) / GROUP,
                                  scratch_.accumulators + row * out_stride_ + column, out_stride_,
                                  scratch_.has_sums[row / ROWS] ? scratch_.alpha + row : nullptr);
      }
    }
    for (int64_t block = rows.begin / ROWS; block < rows.end / ROWS; block++)
      scratch_.has_sums[block] |= scratch_.seen[block].size() > 0;
  }

  template <class E>
  void pack_values(const TokenAddresses& tile, int64_t tokens) {
    const int64_t descale = kv_head_ * problem_.write.v_descale_stride.head;
    const int64_t offset = kv_head_ * problem_.write.v_stride.head;
    pack_rows<Product>(scratch_.v_panels, TILE_KEYS / GROUP * PANEL, tokens, v_head_dim_, [&](int64_t t, int64_t d) {
      const E* value = reinterpret_cast<const E*>(tile.v[t]) + offset + d;
      if constexpr (LARGEST<E> > 0)
        return Product::load_groups(value, v_head_dim_ - d, splat(tile.v_descale[t][descale]));
      else
        return Product::load_groups(value, v_head_dim_ - d);
    });
  }

  const Plan& plan_;
  const AttentionProblem& problem_;
  const Task& task_;
  const Sequence& sequence_;
  const Score score_;
  const int64_t kv_head_, rows_, padded_rows_, head_dim_, query_size_, v_head_dim_, out_size_, query_stride_, out_stride_;
  const PrefillScratch<T> scratch_;
  const typename Product::Session session_{};
};

}  // namespace PAGEDFLASH_ISA
}  // namespace pagedflash
