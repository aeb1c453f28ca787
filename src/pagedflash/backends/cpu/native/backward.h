// backward: blocks of packed-GQA rows of one KV head against their keys, tile by tile, as five matrix products (gemm.h).
//
//   for each block of rows
//     load        queries and output gradients; delta = d_out . out - d_lse
//     for each tile of keys that some row sees
//       pack K transposed, V transposed, and K
//       for each pass of rows
//         scores          = queries x K                   rows x keys
//         d_probabilities = d_out x V                     rows x keys
//         probabilities   = 2^(score - LSE)               with dropout, dropped behind the next line, like d_probabilities before
//         d_scores        = probabilities * (d_probabilities - delta)
//         d_q            += d_scores x K                  rows x head_dim
//         d_v            += probabilities^T x d_out       keys x v_head_dim
//         d_k            += d_scores^T x queries          keys x head_dim
//
// d_q is the block's own. d_k and d_v are partial: the task's own, and reduced over the tasks of a head when all are done.
// As in prefill, rows and keys are multiplied Gemm::ROWS at a time, and only where one sees the other.
//
// Source: Dao, "FlashAttention-2" (2023), algorithm 2.
#pragma once

#include "pack.h"
#include "paging.h"
#include "rows.h"
#include "scratch.h"

namespace pagedflash {
namespace PAGEDFLASH_ISA {

constexpr int64_t BACKWARD_ROWS = 384;  // of a block: each meets its keys once, packed for all
constexpr int64_t BACKWARD_TILE = 192;  // rows of a pass, and keys of a tile

template <class T>
struct BackwardScratch {
  using Product = Gemm<T>;

  BackwardScratch(ScratchArena arena, const AttentionProblem& problem) {
    constexpr int64_t GROUP = Product::GROUP, PADDING = Product::PADDING;
    constexpr int64_t rows = BACKWARD_ROWS, tile = BACKWARD_TILE;
    const int64_t depth = round_up(problem.write.head_dim, Product::STEP) / GROUP;
    const int64_t v_depth = round_up(problem.write.v_head_dim, Product::STEP) / GROUP;
    const int64_t width = round_up(problem.write.head_dim, PANEL), v_width = round_up(problem.write.v_head_dim, PANEL);
    queries = arena.allocate<float>(rows * (depth + PADDING));
    d_out = arena.allocate<float>(rows * (v_depth + PADDING));
    query_panels = arena.allocate<float>(width * rows / GROUP);
    d_out_panels = arena.allocate<float>(v_width * rows / GROUP);
    d_q = arena.allocate<float>(rows * (width + PADDING));
    lse = arena.allocate<float>(rows);
    delta = arena.allocate<float>(rows);
    ones = arena.allocate<float>(Product::ROWS);
    score_rows = arena.allocate<ScoreRow>(rows);
    seen = arena.allocate<Range>(rows / Product::ROWS);
    k_columns = arena.allocate<float>(depth * tile);
    v_columns = arena.allocate<float>(v_depth * tile);
    k_panels = arena.allocate<float>(width * tile / GROUP);
    scores = arena.allocate<float>(tile * (tile + PADDING));
    d_scores = arena.allocate<float>(tile * (tile + PADDING));
    scores_t = arena.allocate<float>(tile * (tile / GROUP + PADDING));
    d_scores_t = arena.allocate<float>(tile * (tile / GROUP + PADDING));
    flatness = arena.allocate<float>(tile);
    dropout = arena.allocate<float>(Dropout::factors_size(tile));
    tokens.k = arena.allocate<const char*>(tile);
    tokens.v = arena.allocate<const char*>(tile);
    tokens.k_descale = tokens.v_descale = nullptr;
    row = arena.allocate<T>(max(depth, v_depth) * GROUP);
    bytes = arena.used();
  }

  // First factors of products are rows of groups of Gemm<T>, second factors panels of PANEL columns of them.
  float* queries;         // (BACKWARD_ROWS, head_dim)
  float* d_out;           // (BACKWARD_ROWS, v_head_dim)
  float* query_panels;    // (BACKWARD_ROWS, head_dim)
  float* d_out_panels;    // (BACKWARD_ROWS, v_head_dim)
  float* d_q;             // (BACKWARD_ROWS, head_dim) sums
  float* lse;             // (BACKWARD_ROWS), base 2
  float* delta;           // (BACKWARD_ROWS)
  float* ones;            // (ROWS)
  ScoreRow* score_rows;   // (BACKWARD_ROWS)
  Range* seen;            // (BACKWARD_ROWS / ROWS), of the tile
  float* k_columns;       // (head_dim, tile)
  float* v_columns;       // (v_head_dim, tile)
  float* k_panels;        // (tile, head_dim)
  float* scores;          // (tile of rows, tile of keys), then probabilities, both floats
  float* d_scores;        // the same: floats, then a first factor
  float* scores_t;        // (tile of keys, tile of rows), probabilities
  float* d_scores_t;
  float* flatness;        // (tile of keys), of one row
  float* dropout;         // factors of it
  TokenAddresses tokens;  // of the tile
  T* row;                 // one row as it is loaded
  int64_t bytes;
};

template <class T>
class Backward {
 public:
  Backward(const BackwardPlan& plan, const BackwardTask& task, void* scratch)
      : plan_(plan), problem_(plan.problem), task_(task), sequence_(plan.sequences[task.sequence]), score_(problem_),
        head_dim_(problem_.write.head_dim), v_head_dim_(problem_.write.v_head_dim), depth_(round_up(head_dim_, STEP)),
        v_depth_(round_up(v_head_dim_, STEP)), columns_(round_up(head_dim_, PANEL)),
        v_columns_(round_up(v_head_dim_, PANEL)), scratch_(ScratchArena(scratch), problem_) {}

  void run() {
    for (int64_t i = 0; i < ROWS; i++) scratch_.ones[i] = 1;
    memset(partial(task_.keys.begin), 0, (task_.keys.size() + plan_.PARTIAL_MULTIPLE) * plan_.partial_size * sizeof(float));
    for (int64_t begin = task_.rows.begin; begin < task_.rows.end; begin += BACKWARD_ROWS) {
      load_rows({begin, min(task_.rows.end, begin + BACKWARD_ROWS)});
      const Range keys = {scratch_.score_rows[0].kv_range.begin, scratch_.score_rows[rows_ - 1].kv_range.end};
      for (int64_t first = keys.begin; first < keys.end; first += TILE) {
        const int64_t tokens = min(TILE, keys.end - first);
        find_seen<Product>(scratch_.score_rows, rows_, first, tokens, scratch_.seen);
        pack_tile(first, tokens);
        for (int64_t pass = 0; pass < padded_rows_; pass += TILE) {
          const Range rows = {pass, min(padded_rows_, pass + TILE)};
          multiply_rows(rows, tokens);
          differentiate(rows, first, tokens);
          add_d_q(rows);
          add_to_keys(rows, first, tokens);
        }
      }
      store_d_q(begin);
    }
  }

 private:
  using Product = Gemm<T>;
  static constexpr int64_t ROWS = Product::ROWS, STEP = Product::STEP, GROUP = Product::GROUP, TILE = BACKWARD_TILE;
  static constexpr int64_t SCORE_STRIDE = TILE + Product::PADDING, TRANSPOSED_STRIDE = TILE / GROUP + Product::PADDING;
  static constexpr int64_t BLOCK_PANEL = BACKWARD_ROWS / GROUP * PANEL, TILE_PANEL = TILE / GROUP * PANEL;
  static_assert(BACKWARD_ROWS % TILE == 0 && TILE % ROWS == 0 && TILE % PANEL == 0 && TILE % STEP == 0 && ROWS % STEP == 0);
  static_assert(BackwardPlan::PARTIAL_MULTIPLE % PANEL == 0 && BackwardPlan::PARTIAL_MULTIPLE >= ROWS);

  float* partial(int64_t key) const {
    return plan_.partials + (task_.partial_key + key - task_.keys.begin) * plan_.partial_size;
  }
  int64_t query_stride() const { return depth_ / GROUP + Product::PADDING; }
  int64_t d_out_stride() const { return v_depth_ / GROUP + Product::PADDING; }
  int64_t d_q_stride() const { return columns_ + Product::PADDING; }

  // A row that sees no key has LSE +inf and counts nothing, whatever its d_out is.
  void load_rows(Range rows) {
    rows_ = rows.size();
    padded_rows_ = round_up(rows_, ROWS);
    for (int64_t r = 0; r < rows_; r++) {
      const QueryAndHead at = unpack_row(problem_, task_.kv_head, rows.begin + r);
      const int64_t token = sequence_.q_begin + at.query;
      load_query(problem_, sequence_, at.query, at.head, scratch_.row, depth_);
      Product::store_query(scratch_.queries + r * query_stride(), scratch_.row, depth_);
      const int64_t of_out = out_offset(problem_, token, at.head);
      const int64_t of_lse = lse_offset(problem_, sequence_.batch, token, at.head);
      const float lse = problem_.lse[of_lse];
      float delta = 0;
      memset(scratch_.row, 0, v_depth_ * sizeof(T));
      if (lse != INFINITY) {
        const T *d_out = static_cast<const T*>(problem_.d_out) + of_out, *out = static_cast<const T*>(problem_.out) + of_out;
        memcpy(scratch_.row, d_out, v_head_dim_ * sizeof(T));
        Vec sum = zero();
        for (int64_t i = 0; i < v_head_dim_; i += LANES)
          sum = fma(load_part(d_out + i, v_head_dim_ - i), load_part(out + i, v_head_dim_ - i), sum);
        delta = reduce_sum(sum) - problem_.d_lse[of_lse];
      }
      Product::store_query(scratch_.d_out + r * d_out_stride(), scratch_.row, v_depth_);
      scratch_.score_rows[r] = score_row(problem_, sequence_, at.query, at.head);
      scratch_.lse[r] = lse * LOG2_E;
      scratch_.delta[r] = problem_.delta[of_lse] = delta;
    }
    const int64_t padding = padded_rows_ - rows_;
    memset(scratch_.queries + rows_ * query_stride(), 0, padding * query_stride() * sizeof(float));
    memset(scratch_.d_out + rows_ * d_out_stride(), 0, padding * d_out_stride() * sizeof(float));
    memset(scratch_.d_q, 0, padded_rows_ * d_q_stride() * sizeof(float));
    pack_block(scratch_.query_panels, scratch_.queries, query_stride(), depth_);
    pack_block(scratch_.d_out_panels, scratch_.d_out, d_out_stride(), v_depth_);
  }

  void pack_block(float* panels, const float* rows, int64_t stride, int64_t size) {
    pack_rows<Product>(panels, BLOCK_PANEL, padded_rows_, size, [&](int64_t r, int64_t d) {
      return Product::load_groups(reinterpret_cast<const typename Product::Element*>(rows + r * stride) + d, size - d);
    });
  }

  void pack_tile(int64_t first, int64_t tokens) {
    const CacheWrite& write = problem_.write;
    locate(problem_, sequence_, first, tokens, scratch_.tokens);
    with_dtype(write.k_dtype, [&](auto element) {
      using E = decltype(element);
      const auto key = [&](int64_t t) {
        return reinterpret_cast<const E*>(scratch_.tokens.k[t]) + task_.kv_head * write.k_stride.head;
      };
      pack_tile_columns(scratch_.k_columns, depth_, head_dim_, tokens, key);
      pack_rows<Product>(scratch_.k_panels, TILE_PANEL, tokens, head_dim_,
                         [&](int64_t t, int64_t d) { return Product::load_groups(key(t) + d, head_dim_ - d); });
    });
    with_dtype(write.v_dtype, [&](auto element) {
      using E = decltype(element);
      pack_tile_columns(scratch_.v_columns, v_depth_, v_head_dim_, tokens, [&](int64_t t) {
        return reinterpret_cast<const E*>(scratch_.tokens.v[t]) + task_.kv_head * write.v_stride.head;
      });
    });
  }

  template <class RowOf>
  static PAGEDFLASH_INLINE void pack_tile_columns(float* columns, int64_t depth, int64_t size, int64_t tokens, const RowOf& row_of) {
    for (int64_t t = 0; t < tokens; t += PANEL)
      pack_columns<Product>(columns + t * depth / GROUP, min(PANEL, tokens - t), size,
                            [&](int64_t i) { return row_of(t + i); });
  }

  // scores = queries x K, and in place of d_scores what becomes them: d_out x V.
  void multiply_rows(Range rows, int64_t tokens) {
    for (int64_t t = 0; t < tokens; t += PANEL) {
      for (int64_t r = rows.begin; r < rows.end; r += ROWS) {
        const Range seen = scratch_.seen[r / ROWS];
        if (seen.begin >= t + PANEL || t >= seen.end) continue;
        const int64_t to = (r - rows.begin) * SCORE_STRIDE + t;
        Product::multiply_block(scratch_.queries + r * query_stride(), query_stride(), scratch_.k_columns + t * depth_ / GROUP,
                                depth_ / GROUP, scratch_.scores + to, SCORE_STRIDE, nullptr);
        Product::multiply_block(scratch_.d_out + r * d_out_stride(), d_out_stride(),
                                scratch_.v_columns + t * v_depth_ / GROUP, v_depth_ / GROUP, scratch_.d_scores + to,
                                SCORE_STRIDE, nullptr);
      }
    }
  }

  // Scores become probabilities, their gradients those of scores; zeros where a row does not see a key. Then both transposed, as
  // first factors; and d_scores as one.
  void differentiate(Range rows, int64_t first, int64_t tokens) {
    const int64_t width = round_up(round_up(tokens, ROWS), max<int64_t>(LANES, STEP));
    for (int64_t r = rows.begin; r < rows.end; r++) {
      float *scores = scratch_.scores + (r - rows.begin) * SCORE_STRIDE,
            *d_scores = scratch_.d_scores + (r - rows.begin) * SCORE_STRIDE;
      const Range seen = scratch_.seen[r / ROWS];
      Range computed = {0, 0};
      if (r < rows_ && seen.size()) {
        differentiate_row(scores + seen.begin, d_scores + seen.begin, r, first + seen.begin, seen.size());
        computed = {seen.begin, seen.begin + round_up(seen.size(), LANES)};
      }
      clear_outside(scores, computed, width);
      clear_outside(d_scores, computed, width);
    }
    transpose_tile(scratch_.scores_t, scratch_.scores, rows.size(), width);
    transpose_tile(scratch_.d_scores_t, scratch_.d_scores, rows.size(), width);
    if constexpr (GROUP > 1)
      for (int64_t r = 0; r < rows.size(); r++) {
        float* row = scratch_.d_scores + r * SCORE_STRIDE;
        for (int64_t i = 0; i < width; i += LANES) Product::store_elements(row, i, load(row + i));
      }
  }

  PAGEDFLASH_INLINE void differentiate_row(float* scores, float* d_scores, int64_t r, int64_t first, int64_t count) {
    const ScoreRow& row = scratch_.score_rows[r];
    const bool is_scale = score_.is_scale(row);
    const Vec scale = splat(is_scale ? score_.scale() : 1.0f), lse = splat(-scratch_.lse[r]), delta = splat(scratch_.delta[r]);
    if (is_scale)
      score_.mask(scores, row, first, count);
    else
      score_.apply(scores, row, first, count, scratch_.flatness);
    const bool drops = score_.dropout.drops(), capped = score_.capped();
    const float* factors = drops ? score_.dropout.factors(scratch_.dropout, row.dropout, first, count) : nullptr;
    for (int64_t i = 0; i < count; i += LANES) {
      const Vec p = exp2(fma(load(scores + i), scale, lse)), d_p = load(d_scores + i);
      Vec d = mul(p, sub(drops ? mul(d_p, load(factors + i)) : d_p, delta));
      if (capped) d = mul(d, load(scratch_.flatness + i));
      store(scores + i, drops ? mul(p, load(factors + i)) : p);
      store(d_scores + i, d);
    }
  }

  static PAGEDFLASH_INLINE void clear_outside(float* row, Range kept, int64_t width) {
    memset(row, 0, kept.begin * sizeof(float));
    memset(row + kept.end, 0, (width - kept.end) * sizeof(float));
  }

  // (rows, keys) of floats to (keys, rows) of groups. Behind the last row comes anything.
  static void transpose_tile(float* to, const float* from, int64_t rows, int64_t keys) {
    for (int64_t r = 0; r < rows; r += LANES) {
      for (int64_t t = 0; t < keys; t += LANES) {
        Vec block[LANES];
        for (int i = 0; i < LANES; i++) block[i] = load(from + (r + i) * SCORE_STRIDE + t);
        transpose(block);
        for (int i = 0; i < LANES; i++) Product::store_elements(to + (t + i) * TRANSPOSED_STRIDE, r, block[i]);
      }
    }
  }

  void add_d_q(Range rows) {
    for (int64_t column = 0; column < columns_; column += PANEL) {
      const float* panel = scratch_.k_panels + column / PANEL * TILE_PANEL;
      for (int64_t r = rows.begin; r < rows.end; r += ROWS) {
        const Range seen = scratch_.seen[r / ROWS];
        if (!seen.size()) continue;
        Product::multiply_block(scratch_.d_scores + (r - rows.begin) * SCORE_STRIDE + seen.begin / GROUP, SCORE_STRIDE,
                                panel + seen.begin / GROUP * PANEL, round_up(seen.size(), STEP) / GROUP,
                                scratch_.d_q + r * d_q_stride() + column, d_q_stride(), scratch_.ones);
      }
    }
  }

  void add_to_keys(Range rows, int64_t first, int64_t tokens) {
    for (int64_t t = 0; t < tokens; t += ROWS) {
      Range seeing = {rows.end, rows.begin};
      for (int64_t r = rows.begin; r < rows.end; r += ROWS) {
        const Range seen = scratch_.seen[r / ROWS];
        if (seen.begin >= t + ROWS || t >= seen.end) continue;
        seeing = {min(seeing.begin, r), r + ROWS};
      }
      if (!seeing.size()) continue;
      float* to = partial(first + t);
      multiply_keys(to, columns_, scratch_.query_panels, scratch_.d_scores_t + t * TRANSPOSED_STRIDE, rows, seeing);
      multiply_keys(to + plan_.d_v_offset, v_columns_, scratch_.d_out_panels, scratch_.scores_t + t * TRANSPOSED_STRIDE, rows,
                    seeing);
    }
  }

  PAGEDFLASH_INLINE void multiply_keys(float* to, int64_t columns, const float* panels, const float* keys, Range rows,
                                       Range seeing) {
    for (int64_t column = 0; column < columns; column += PANEL)
      Product::multiply_block(keys + (seeing.begin - rows.begin) / GROUP, TRANSPOSED_STRIDE,
                              panels + column / PANEL * BLOCK_PANEL + seeing.begin / GROUP * PANEL, seeing.size() / GROUP,
                              to + column, plan_.partial_size, scratch_.ones);
  }

  void store_d_q(int64_t first_row) {
    for (int64_t r = 0; r < rows_; r++) {
      const QueryAndHead at = unpack_row(problem_, task_.kv_head, first_row + r);
      T* to = static_cast<T*>(problem_.d_q) + ((sequence_.q_begin + at.query) * problem_.q_heads + at.head) * head_dim_;
      store_scaled(to, scratch_.d_q + r * d_q_stride(), head_dim_, score_.slope());
    }
  }

  const BackwardPlan& plan_;
  const BackwardProblem& problem_;
  const BackwardTask& task_;
  const Sequence& sequence_;
  const Score score_;
  const int64_t head_dim_, v_head_dim_, depth_, v_depth_, columns_, v_columns_;
  const BackwardScratch<T> scratch_;
  int64_t rows_ = 0, padded_rows_ = 0;  // of the block
  const typename Product::Session session_{};
};

// Where a key of a sequence lies among all: its row of a dense cache, or 0, times their tokens, and so on.
PAGEDFLASH_INLINE int64_t key_offset(const CacheWrite& write, const Sequence& sequence, int64_t key) {
  if (write.packed()) return write.cu_seqlens_k[sequence.batch] + key;
  return (write.cache_batch_idx ? write.cache_batch_idx[sequence.batch] : sequence.batch) * write.page_size + key;
}

// Reduces d_k and d_v of keys `keys` of plan.keys over tasks, and over sequences that share a row of the cache.
inline void reduce_keys(const BackwardPlan& plan, Range keys) {
  const BackwardProblem& problem = plan.problem;
  const CacheWrite& write = problem.write;
  const Score score(problem);
  int64_t s = 0;
  for (int64_t i = keys.begin; i < keys.end; i++) {
    while (s + 1 < plan.sequences.size() && plan.sequences[s + 1].first_key <= i) s++;
    const BackwardSequence& sequence = plan.sequences[s];
    const int64_t key = sequence.keys.begin + i - sequence.first_key;
    const int64_t token = key_offset(write, sequence, key);
    const int64_t first = write.cache_batch_idx ? 0 : s, end = write.cache_batch_idx ? plan.sequences.size() : s + 1;
    const auto has_token = [&](const BackwardSequence& other) {
      return key_offset(write, other, key) == token && other.keys.begin <= key && key < other.keys.end;
    };
    int64_t owner = first;
    while (!has_token(plan.sequences[owner])) owner++;
    if (owner != s) continue;

    for (int64_t head = 0; head < write.kv_heads; head++) {
      const auto sum_of = [&](int64_t d, int64_t n) {
        Vec sum = zero();
        for (int64_t other = first; other < end; other++) {
          const BackwardSequence& one = plan.sequences[other];
          if (!has_token(one)) continue;
          for (int64_t t = one.first_task + head * one.tasks; t < one.first_task + (head + 1) * one.tasks; t++) {
            const BackwardTask& task = plan.tasks[t];
            if (key < task.keys.begin || key >= task.keys.end) continue;
            sum = add(sum, load_part(plan.partials + (task.partial_key + key - task.keys.begin) * plan.partial_size + d, n));
          }
        }
        return sum;
      };
      const auto store_sums = [&](void* to, int64_t dtype, int64_t size, int64_t offset, float factor) {
        with_dtype(dtype, [&](auto element) {
          auto* row = static_cast<decltype(element)*>(to) + (token * write.kv_heads + head) * size;
          for (int64_t d = 0; d < size; d += LANES)
            store_part(row + d, mul(sum_of(offset + d, size - d), splat(factor)), size - d);
        });
      };
      store_sums(problem.d_k, write.k_dtype, write.head_dim, 0, score.slope());
      store_sums(problem.d_v, write.v_dtype, write.v_head_dim, plan.d_v_offset, 1.0f);
    }
  }
}

}  // namespace PAGEDFLASH_ISA
}  // namespace pagedflash
