// prefill: a block of query rows of one key head against its keys, tile by tile, as two matrix products of packed floats.
// Pages are read where they lie: packing a tile is the only copy, and it widens float16 and bfloat16 on the way.
//
//   queries   rows x head_dim, widened once
//   for each tile of keys that some row sees
//     pack K      panels of PANEL keys, transposed:      head_dim x PANEL
//     scores      = queries x K                          rows x tile
//     softmax     scores become weights, in place
//     pack V      panels of PANEL elements:              tile x PANEL
//     values      = values * shrink + weights x V        rows x v_head_dim
//   one answer, or partial answer, per row
#pragma once

#include "task.h"

namespace pagedflash {
namespace PAGEDFLASH_ISA {

constexpr int64_t PANEL = GEMM_VECS * LANES;  // columns of a packed panel
constexpr int64_t PREFILL_TILE = 64;          // keys

// c (GEMM_ROWS x PANEL) = a (GEMM_ROWS x depth) x b (depth x PANEL), or with shrink = c * shrink[row] + a x b.
PAGEDFLASH_INLINE void multiply_block(const float* a, int64_t a_stride, const float* b, int64_t depth, float* c,
                                      int64_t c_stride, const float* shrink) {
  Vec sum[GEMM_ROWS][GEMM_VECS];
  for (int r = 0; r < GEMM_ROWS; r++)
    for (int i = 0; i < GEMM_VECS; i++)
      sum[r][i] = shrink ? mul(splat(shrink[r]), load(c + r * c_stride + i * LANES)) : zero();
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
    k_panels = carver.take<float>(head_dim * PREFILL_TILE);
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
  float* k_panels;  // (PREFILL_TILE / PANEL, head_dim, PANEL)
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
      const int64_t tokens = tile_size(first), next = first + PREFILL_TILE;
      find_tile(now ^ 1, next);
      pack_keys(my_.k[now], tokens);
      // While the scores are computed the tile's values are fetched, while those are added the next tile's keys.
      multiply(my_.queries, head_dim_, my_.k_panels, head_dim_, head_dim_ * PANEL, my_.scores, PREFILL_TILE,
               round_up(tokens, PANEL), nullptr, {my_.v[now], tokens, kv_head_ * call_.write.v_stride.head, v_head_dim_});
      soften(first, tokens);
      pack_values(my_.v[now], tokens);
      multiply(my_.scores, PREFILL_TILE, my_.v_panels, tokens, PREFILL_TILE * PANEL, my_.values, value_size_, value_size_,
               my_.shrink, {my_.k[now ^ 1], tile_size(next), kv_head_ * call_.write.k_stride.head, head_dim_});
    }
    for (int64_t row = 0; row < rows_; row++)
      finish_row<T>(plan_, task_, kv_head_, task_.rows.begin + row, my_.values + row * value_size_, my_.states[row]);
  }

 private:
  // Rows of keys or values that will be needed soon.
  struct Upcoming {
    const T* const* tokens;
    int64_t count, offset, size;  // rows, elements to the head, elements of a row
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

  // Keys become columns: LANES keys x LANES elements are transposed in registers. Behind the last key it is repeated.
  void pack_keys(const T* const* k, int64_t tokens) {
    const int64_t offset = kv_head_ * call_.write.k_stride.head;
    for (int64_t t = 0; t < round_up(tokens, PANEL); t += LANES) {
      float* panel = my_.k_panels + t / PANEL * PANEL * head_dim_ + t % PANEL;
      for (int64_t d = 0; d < head_dim_; d += LANES) {
        Vec block[LANES];
        for (int i = 0; i < LANES; i++)
          block[i] = load_part(k[lesser(t + i, tokens - 1)] + offset + d, head_dim_ - d);
        transpose(block);
        for (int i = 0; i < LANES && d + i < head_dim_; i++) store(panel + (d + i) * PANEL, block[i]);
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

  // c (rows x columns) from a (rows x depth) and panels, onto c * shrink if that is given. A panel stays in the nearest
  // cache while all rows pass; with each panel a share of `upcoming` is fetched.
  void multiply(const float* a, int64_t a_stride, const float* panels, int64_t depth, int64_t panel_size, float* c,
                int64_t c_stride, int64_t columns, const float* shrink, const Upcoming& upcoming) {
    for (int64_t column = 0; column < columns; column += PANEL) {
      const float* panel = panels + column / PANEL * panel_size;
      const int64_t fetched = lesser(column + PANEL, columns) * upcoming.count / columns;
      for (int64_t t = column * upcoming.count / columns; t < fetched; t++)
        for (int64_t d = 0; d < upcoming.size; d += LINE / sizeof(T)) fetch(upcoming.tokens[t] + upcoming.offset + d);
      for (int64_t row = 0; row < padded_rows_; row += GEMM_ROWS)
        multiply_block(a + row * a_stride, a_stride, panel, depth, c + row * c_stride + column, c_stride,
                       shrink ? shrink + row : nullptr);
    }
  }

  void soften(int64_t first, int64_t tokens) {
    for (int64_t row = 0; row < rows_; row++)
      my_.shrink[row] = softmax_tile(my_.scores + row * PREFILL_TILE, first, tokens, rule_, my_.described[row], my_.states[row]);
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
