// The two ends of a packed-GQA row: its query, and its output or partial output.
#pragma once

#include "plan.h"
#include "rotary.h"
#include "softmax.h"

namespace pagedflash {
namespace PAGEDFLASH_ISA {

struct QueryAndHead {
  int64_t query, head;  // of the sequence; of all query heads
};

PAGEDFLASH_INLINE QueryAndHead unpack_row(const AttentionProblem& problem, int64_t kv_head, int64_t row) {
  const int64_t group = problem.group();
  return {row / group, kv_head * group + row % group};
}

// A query, rotated if the problem says so, zeros from head_dim to `padded`.
template <class T>
void load_query(const AttentionProblem& problem, const Sequence& sequence, int64_t query, int64_t head, T* to, int64_t padded) {
  const CacheWrite& write = problem.write;
  const T* from = static_cast<const T*>(problem.q) + head * problem.q_stride.head;
  from += problem.cu_seqlens_q ? (sequence.q_begin + query) * problem.q_stride.token
                               : sequence.batch * problem.q_stride.batch + query * problem.q_stride.token;
  int64_t rotated = 0;
  if (write.rotary_cos) {
    const int64_t position = problem.rotary_position(sequence.seqused_k, query);
    rotated = rotate_row(from, write, position, [&](int64_t i, const float* x, int64_t n) { convert(to + i, x, n); });
  }
  memcpy(to + rotated, from + rotated, (write.head_dim - rotated) * sizeof(T));
  for (int64_t i = write.head_dim; i < padded; i++) to[i] = T{};
}

// to = values * factor.
template <class T>
PAGEDFLASH_INLINE void store_scaled(T* to, const float* values, int64_t size, float factor) {
  for (int64_t i = 0; i < size; i += LANES)
    store_part(to + i, mul(load_part(values + i, size - i), splat(factor)), size - i);
}

// The output of a row: `values` are sums of v_head_dim values, weighted with probabilities that sum to state.sum. The sink
// joins the denominator here.
template <class T>
void write_output(const AttentionProblem& problem, const Sequence& sequence, int64_t query, int64_t head,
                  const float* values, SoftmaxState state) {
  const int64_t token = sequence.q_begin + query;
  if (state.base == -INFINITY) return write_empty_row(problem, sequence.batch, token, head);
  float alpha = 1.0f;
  if (problem.sinks) {
    const float sink = problem.sinks[head] * LOG2_E, top = max(sink, state.base);
    alpha = exp2f(state.base - top);
    state.sum = state.sum * alpha + exp2f(sink - top);
    state.base = top;
  }
  T* out = static_cast<T*>(problem.out) + out_offset(problem, token, head);
  store_scaled(out, values, problem.write.v_head_dim, alpha / state.sum);
  write_lse(problem, sequence.batch, token, head, (state.base + log2f(state.sum)) * LN_2);
}

// Ends a row of a task: writes its output, or its partial output for combine (zeros where no key was seen).
template <class T>
void finish_row(const Plan& plan, const Task& task, int64_t kv_head, int64_t row, const float* values,
                const SoftmaxState& state) {
  const AttentionProblem& problem = plan.problem;
  const auto [query, head] = unpack_row(problem, kv_head, row);
  if (task.partial_row < 0) return write_output<T>(problem, plan.sequences[task.sequence], query, head, values, state);
  const int64_t partial = task.partial_row + query * problem.q_heads + head, size = problem.write.v_head_dim;
  float* out = plan.partial_out + partial * size;
  if (state.base == -INFINITY) {
    plan.partial_lse[partial] = -INFINITY;
    memset(out, 0, size * sizeof(float));
  } else {
    plan.partial_lse[partial] = state.base + log2f(state.sum);
    store_scaled(out, values, size, 1.0f / state.sum);
  }
}

// The keys of a tile that the rows of each block of Product::ROWS see, from a multiple of LANES and Product::STEP on.
template <class Product>
void find_seen(const ScoreRow* rows, int64_t count, int64_t first, int64_t tokens, Range* seen_by_block) {
  constexpr int64_t MULTIPLE = max<int64_t>(LANES, Product::STEP);
  for (int64_t block = 0; block < count; block += Product::ROWS) {
    Range seen = {tokens, 0};
    for (int64_t row = block; row < min<int64_t>(block + Product::ROWS, count); row++) {
      const Range of_row = rows[row].kv_range;
      if (!of_row.size()) continue;
      seen.begin = min(seen.begin, max<int64_t>(0, of_row.begin - first) / MULTIPLE * MULTIPLE);
      seen.end = max(seen.end, min(tokens, of_row.end - first));
    }
    seen_by_block[block / Product::ROWS] = seen;
  }
}

}  // namespace PAGEDFLASH_ISA
}  // namespace pagedflash
