// What decode and prefill share: where keys lie, query rows as they enter the scores, and the end of a row.
#pragma once

#include "rotary.h"
#include "softmax.h"

namespace pagedflash {
namespace PAGEDFLASH_ISA {

// Carves a task's scratch memory into arrays aligned to 64 bytes. With null memory it only measures.
class Carver {
 public:
  explicit Carver(void* memory) : at_(static_cast<char*>(memory)), start_(at_) {}
  template <class T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(at_);
    at_ += round_up(count * sizeof(T), 64);
    return taken;
  }
  int64_t taken() const { return at_ - start_; }

 private:
  char *at_, *start_;
};

constexpr int64_t LINE = 64;  // bytes that a processor fetches together

// Asks for a line, into the second nearest cache: the nearest is full of what is worked on.
PAGEDFLASH_INLINE void fetch(const void* line) { __builtin_prefetch(line, 0, 2); }

// Keys and values of key head 0 of `count` tokens from `first` on; other heads are k.head, v.head elements further.
template <class T>
void locate(const AttentionCall& call, const Sequence& sequence, int64_t first, int64_t count, const T** k, const T** v) {
  const CacheWrite& write = call.write;
  const T *k_data = static_cast<const T*>(write.k), *v_data = static_cast<const T*>(write.v);
  if (!write.paged()) {
    const int64_t b = sequence.index;
    const int64_t row = call.ragged_keys() ? 0 : write.cache_batch_idx ? write.cache_batch_idx[b] : b;
    if (call.ragged_keys()) first += call.cu_seqlens_k[b];
    k_data += row * write.k_stride.batch;
    v_data += row * write.v_stride.batch;
    for (int64_t t = 0; t < count; t++) {
      k[t] = k_data + (first + t) * write.k_stride.token;
      v[t] = v_data + (first + t) * write.v_stride.token;
    }
    return;
  }
  const int32_t* table = write.block_table + sequence.index * write.table_width;
  int64_t column = first / write.page_size, slot = first % write.page_size;
  for (int64_t t = 0; t < count; column++, slot = 0) {
    const T* k_page = k_data + table[column] * write.k_stride.batch;
    const T* v_page = v_data + table[column] * write.v_stride.batch;
    for (; slot < write.page_size && t < count; slot++, t++) {
      k[t] = k_page + slot * write.k_stride.token;
      v[t] = v_page + slot * write.v_stride.token;
    }
  }
}

// Query row `row` of a key head, rotated if the call says so, zeros from head_dim to `padded`.
template <class T>
void load_query(const AttentionCall& call, const Sequence& sequence, int64_t kv_head, int64_t row, T* to, int64_t padded) {
  const CacheWrite& write = call.write;
  const int64_t query = row / call.group(), head = kv_head * call.group() + row % call.group();
  const T* from = static_cast<const T*>(call.q) + head * call.q_stride.head;
  from += call.cu_seqlens_q ? (sequence.first_row + query) * call.q_stride.token
                            : sequence.index * call.q_stride.batch + query * call.q_stride.token;
  if (write.rotary_cos) {
    // Where positions matter query i sits at its own, else all at the first.
    const bool moves = call.window_left >= 0 || call.window_right >= 0;
    rotate_row(to, from, write, moves ? lesser(sequence.rotary_start + query, write.rotary_rows - 1) : sequence.rotary_start);
  } else {
    memcpy(to, from, write.head_dim * sizeof(T));
  }
  for (int64_t i = write.head_dim; i < padded; i++) to[i] = T{};
}

// What the softmax knows of a query row of a key head.
PAGEDFLASH_INLINE Row describe_row(const AttentionCall& call, const Sequence& sequence, int64_t kv_head, int64_t row) {
  const int64_t query = row / call.group(), head = kv_head * call.group() + row % call.group();
  const float slope = call.alibi_slopes ? call.alibi_slopes[sequence.index * call.alibi_batch_stride + head] : 0.0f;
  return {sequence.visible(call, query), sequence.position(query), slope * LOG2_E};
}

// Writes the answer of one row: `sum` holds weights summing to state.sum, relative to 2^state.highest; base 2. The sink
// joins the denominator here. `values` (v_head_dim floats) is overwritten.
template <class T>
void write_answer(const AttentionCall& call, const Sequence& sequence, int64_t kv_head, int64_t row, float* values, RowState state) {
  const int64_t size = call.write.v_head_dim;
  const Place at = place(call, sequence, kv_head, row);
  T* out = static_cast<T*>(call.out) + at.out;
  if (state.highest == -INFINITY) {
    memset(out, 0, size * sizeof(T));
    call.lse[at.lse] = INFINITY;
    return;
  }
  float shrink = 1.0f;
  if (call.sinks) {
    const float sink = call.sinks[at.head] * LOG2_E, top = sink > state.highest ? sink : state.highest;
    shrink = exp2f(state.highest - top);
    state.sum = state.sum * shrink + exp2f(sink - top);
    state.highest = top;
  }
  const Vec factor = splat(shrink / state.sum);
  for (int64_t i = 0; i < size; i += LANES)
    store_part(out + i, mul(load_part(values + i, size - i), factor), size - i);
  call.lse[at.lse] = (state.highest + log2f(state.sum)) * LN_2;
}

// Ends one row of a task: the answer, or a partial answer for combine. `values` is in memory order.
template <class T>
void finish_row(const Plan& plan, const Task& task, int64_t kv_head, int64_t row, float* values, const RowState& state) {
  const AttentionCall& call = *plan.call;
  const Sequence& sequence = plan.sequences[task.sequence];
  if (task.partial_row < 0) return write_answer<T>(call, sequence, kv_head, row, values, state);
  const int64_t query = row / call.group(), head = kv_head * call.group() + row % call.group();
  const int64_t partial = task.partial_row + query * call.q_heads + head, size = call.write.v_head_dim;
  const bool seen = state.highest != -INFINITY;
  plan.partial_lse[partial] = seen ? state.highest + log2f(state.sum) : -INFINITY;
  const Vec factor = splat(seen ? 1.0f / state.sum : 0.0f);
  for (int64_t i = 0; i < size; i += LANES)
    store_part(plan.partial_out + partial * size + i, mul(load_part(values + i, size - i), factor), size - i);
}

}  // namespace PAGEDFLASH_ISA
}  // namespace pagedflash
