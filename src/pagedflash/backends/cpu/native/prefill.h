// prefill: a block of query rows of one key head against its keys, tile by tile, as two matrix products of packed floats.
// Pages are read where they lie: packing is the only copy, and it widens float16 and bfloat16 on the way.
//
//   queries   rows x head_dim, widened once
//   for each tile of keys that some row sees
//     for each panel of PANEL keys
//       pack K    transposed:                          head_dim x PANEL
//       scores    = queries x K                        rows x PANEL of the tile
//     softmax     scores become weights, in place
//     pack V      panels of PANEL elements:            tile x PANEL
//     values      = values * shrink + weights x V      rows x v_head_dim
//   one answer, or partial answer, per row
//
// Rows are multiplied GEMM_ROWS at a time, and only with the keys that one of them sees:
//
//                  panels of keys
//   rows 0 to 5    # # . . . .       a window (or a causal mask) costs what it leaves,
//   rows 6 to 11   . # # . . .       not what its tiles cover
//   rows 12 to 17  . . # # . .
//
// Meanwhile what the next product needs is fetched, a few lines before each multiplication: in one burst they would keep
// the processor waiting, and what is fetched too early is evicted by rows that lie a power of two apart.
#pragma once

#include "task.h"

namespace pagedflash {
namespace PAGEDFLASH_ISA {

constexpr int64_t PANEL = GEMM_VECS * LANES;  // columns of a packed panel: keys, or elements of values
constexpr int64_t PREFILL_TILE = 128;         // keys

// c (GEMM_ROWS x PANEL) = a (GEMM_ROWS x depth) x b (depth x PANEL), or with shrink = c * shrink[row] + a x b.
PAGEDFLASH_INLINE void multiply_block(const float* a, int64_t a_stride, const float* b, int64_t depth, float* c,
                                      int64_t c_stride, const float* shrink) {
  Vec sum[GEMM_ROWS][GEMM_VECS];
  for (int r = 0; r < GEMM_ROWS; r++)
    for (int i = 0; i < GEMM_VECS; i++)
      sum[r][i] = shrink ? mul(splat(shrink[r]), load(c + r * c_stride + i * LANES)) : zero();
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

template <class T>
struct PrefillScratch {
  PrefillScratch(Carver carver, const AttentionCall& call) {
    constexpr int64_t rows = PREFILL_ROWS + GEMM_ROWS;
    const int64_t head_dim = call.write.head_dim, v_size = round_up(call.write.v_head_dim, PANEL);
    queries = carver.take<float>(rows * head_dim);
    scores = carver.take<float>(rows * PREFILL_TILE);
    values = carver.take<float>(rows * v_size);
    shrink = carver.take<float>(rows);
    states = carver.take<RowState>(rows);
    described = carver.take<Row>(rows);
    seen = carver.take<Range>(rows / GEMM_ROWS);
    k_panel = carver.take<float>(head_dim * PANEL);
    v_panels = carver.take<float>(v_size * PREFILL_TILE);
    for (int i = 0; i < 2; i++) {
      k[i] = carver.take<const T*>(PREFILL_TILE);
      v[i] = carver.take<const T*>(PREFILL_TILE);
    }
    bytes = carver.taken();
  }

  float* queries;   // (rows, head_dim)
  float* scores;    // (rows, PREFILL_TILE)
  float* values;    // (rows, v_head_dim padded to PANEL)
  float* shrink;    // (rows)
  RowState* states; // (rows)
  Row* described;   // (rows)
  Range* seen;      // (rows / GEMM_ROWS), of the tile
  float* k_panel;   // (head_dim, PANEL)
  float* v_panels;  // (v_head_dim / PANEL, PREFILL_TILE, PANEL)
  const T **k[2], **v[2]; // where the tokens of this tile and the next lie
  int64_t bytes;
};

inline int64_t prefill_scratch_bytes(const AttentionCall& call) {
  return PrefillScratch<float>(Carver(nullptr), call).bytes;
}

template <class T>
class Prefill {
 public:
  Prefill(const Plan& plan, const Task& task, void* scratch)
      : plan_(plan), call_(*plan.call), task_(task), sequence_(plan.sequences[task.sequence]), rule_(call_),
        kv_head_(task.heads.begin), rows_(task.rows.size()), padded_rows_(round_up(rows_, GEMM_ROWS)),
        head_dim_(call_.write.head_dim), v_head_dim_(call_.write.v_head_dim),
        value_size_(round_up(v_head_dim_, PANEL)), my_(Carver(scratch), call_) {}

  void run() {
    load_queries();
    int now = 0;
    find_tile(now, task_.keys.begin);
    for (int64_t first = task_.keys.begin; first < task_.keys.end; first += PREFILL_TILE, now ^= 1) {
      const int64_t tokens = tile_size(first);
      find_tile(now ^ 1, first + PREFILL_TILE);
      find_seen(first, tokens);
      score(my_.k[now], my_.v[now], tokens);
      soften(first);
      add(my_.v[now], my_.k[now ^ 1], tokens, tile_size(first + PREFILL_TILE));
    }
    for (int64_t row = 0; row < rows_; row++)
      finish_row<T>(plan_, task_, kv_head_, task_.rows.begin + row, my_.values + row * value_size_, my_.states[row]);
  }

 private:
  // Keys or values that will be needed soon, to be asked for in so many `steps`.
  class Upcoming {
   public:
    Upcoming(const T* const* tokens, int64_t count, int64_t offset, int64_t size, int64_t steps)
        : tokens_(tokens), count_(count), offset_(offset), size_(size),
          share_(divide_up(count * divide_up(size, LINE_SIZE), steps)) {}

    PAGEDFLASH_INLINE void ask() {
      for (int64_t i = 0; i < share_ && token_ < count_; i++) {
        fetch(tokens_[token_] + offset_ + element_);
        element_ += LINE_SIZE;
        if (element_ < size_) continue;
        element_ = 0;
        token_++;
      }
    }

   private:
    static constexpr int64_t LINE_SIZE = LINE / sizeof(T);
    const T* const* tokens_;
    const int64_t count_, offset_, size_;  // rows, elements to the head, elements of a row
    const int64_t share_;                  // lines of each step
    int64_t token_ = 0, element_ = 0;
  };

  int64_t tile_size(int64_t first) const { return greater(0, lesser(PREFILL_TILE, task_.keys.end - first)); }
  void find_tile(int which, int64_t first) {
    locate(call_, sequence_, first, tile_size(first), my_.k[which], my_.v[which]);
  }

  void load_queries() {
    T row[MAX_HEAD_DIM];
    for (int64_t r = 0; r < rows_; r++) {
      load_query(call_, sequence_, kv_head_, task_.rows.begin + r, row, head_dim_);
      widen_row(my_.queries + r * head_dim_, row, head_dim_);
      my_.described[r] = describe_row(call_, sequence_, kv_head_, task_.rows.begin + r);
      my_.states[r] = RowState();
    }
    const int64_t padding = padded_rows_ - rows_;  // rows that nobody reads, but that are multiplied
    memset(my_.queries + rows_ * head_dim_, 0, padding * head_dim_ * sizeof(float));
    for (int64_t r = rows_; r < padded_rows_; r++) my_.shrink[r] = 0;
    memset(my_.values, 0, padded_rows_ * value_size_ * sizeof(float));
  }

  // The keys of the tile that the rows of each block see, from a multiple of LANES on.
  void find_seen(int64_t first, int64_t tokens) {
    for (int64_t row = 0; row < rows_; row += GEMM_ROWS) {
      Range seen = {tokens, 0};
      for (int64_t r = row; r < lesser(row + GEMM_ROWS, rows_); r++) {
        const Range visible = my_.described[r].visible;
        if (!visible.size()) continue;
        seen.begin = lesser(seen.begin, greater(0, visible.begin - first) / LANES * LANES);
        seen.end = greater(seen.end, lesser(tokens, visible.end - first));
      }
      my_.seen[row / GEMM_ROWS] = seen;
    }
  }

  // Meanwhile the next panel's keys are fetched, and the tile's values.
  void score(const T* const* k, const T* const* v, int64_t tokens) {
    const int64_t k_head = kv_head_ * call_.write.k_stride.head, v_head = kv_head_ * call_.write.v_stride.head;
    const int64_t blocks = padded_rows_ / GEMM_ROWS;
    Upcoming values(v, tokens, v_head, v_head_dim_, blocks * divide_up(tokens, PANEL));
    for (int64_t t = 0; t < tokens; t += PANEL) {
      pack_keys(k + t, lesser(PANEL, tokens - t));
      Upcoming keys(k + t + PANEL, greater(0, lesser(PANEL, tokens - t - PANEL)), k_head, head_dim_, blocks);
      for (int64_t block = 0, row = 0; block < blocks; block++, row += GEMM_ROWS) {
        keys.ask();
        values.ask();
        if (my_.seen[block].begin < t + PANEL && t < my_.seen[block].end)
          multiply_block(my_.queries + row * head_dim_, head_dim_, my_.k_panel, head_dim_, my_.scores + row * PREFILL_TILE + t,
                         PREFILL_TILE, nullptr);
      }
    }
  }

  // Keys become columns: LANES keys x LANES elements are transposed in registers. Behind the last key it is repeated.
  void pack_keys(const T* const* k, int64_t tokens) {
    const int64_t offset = kv_head_ * call_.write.k_stride.head;
    for (int64_t t = 0; t < PANEL; t += LANES) {
      for (int64_t d = 0; d < head_dim_; d += LANES) {
        Vec block[LANES];
        for (int i = 0; i < LANES; i++)
          block[i] = load_part(k[lesser(t + i, tokens - 1)] + offset + d, head_dim_ - d);
        transpose(block);
        for (int i = 0; i < LANES && d + i < head_dim_; i++) store(my_.k_panel + (d + i) * PANEL + t, block[i]);
      }
    }
  }

  void soften(int64_t first) {
    for (int64_t row = 0; row < rows_; row++) {
      const Range seen = my_.seen[row / GEMM_ROWS];
      my_.shrink[row] = softmax_tile(my_.scores + row * PREFILL_TILE + seen.begin, first + seen.begin,
                                     greater(0, seen.size()), rule_, my_.described[row], my_.states[row]);
    }
  }

  // Meanwhile the first keys of the next tile are fetched. A panel stays in the nearest cache while all rows pass.
  void add(const T* const* v, const T* const* next_k, int64_t tokens, int64_t next_tokens) {
    pack_values(v, tokens);
    const int64_t blocks = padded_rows_ / GEMM_ROWS;
    Upcoming keys(next_k, lesser(PANEL, next_tokens), kv_head_ * call_.write.k_stride.head, head_dim_,
                  blocks * (value_size_ / PANEL));
    for (int64_t column = 0; column < value_size_; column += PANEL) {
      const float* panel = my_.v_panels + column * PREFILL_TILE;
      for (int64_t block = 0, row = 0; block < blocks; block++, row += GEMM_ROWS) {
        keys.ask();
        const Range seen = my_.seen[block];
        if (seen.size() > 0)
          multiply_block(my_.scores + row * PREFILL_TILE + seen.begin, PREFILL_TILE, panel + seen.begin * PANEL, seen.size(),
                         my_.values + row * value_size_ + column, value_size_, my_.shrink + row);
      }
    }
  }

  void pack_values(const T* const* v, int64_t tokens) {
    const int64_t offset = kv_head_ * call_.write.v_stride.head;
    for (int64_t t = 0; t < tokens; t++) {
      const T* value = v[t] + offset;
      for (int64_t d = 0; d < value_size_; d += LANES) {
        float* panel = my_.v_panels + d / PANEL * PANEL * PREFILL_TILE + d % PANEL;
        store(panel + t * PANEL, d < v_head_dim_ ? load_part(value + d, v_head_dim_ - d) : zero());
      }
    }
  }

  const Plan& plan_;
  const AttentionCall& call_;
  const Task& task_;
  const Sequence& sequence_;
  const ScoreRule rule_;
  const int64_t kv_head_, rows_, padded_rows_, head_dim_, v_head_dim_, value_size_;
  const PrefillScratch<T> my_;
};

}  // namespace PAGEDFLASH_ISA
}  // namespace pagedflash
