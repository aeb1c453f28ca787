// combine: merges the partial answers of a row's splits by their log-sum-exp (base 2).
#pragma once

#include "task.h"

namespace pagedflash {
namespace PAGEDFLASH_ISA {

template <class T>
void combine_rows(const Plan& plan, Range rows) {
  const AttentionCall& call = *plan.call;
  const int64_t size = call.write.v_head_dim, group = call.group();
  float values[MAX_HEAD_DIM];
  int64_t m = 0;
  for (int64_t merged = rows.begin; merged < rows.end; merged++) {
    while (m + 1 < plan.merges.size() && plan.merges[m + 1].merged_row <= merged) m++;
    const Merge& merge = plan.merges[m];
    const Sequence& sequence = plan.sequences[merge.sequence];
    const int64_t row = merged - merge.merged_row;  // query * q_heads + head
    const int64_t step = sequence.queries * call.q_heads;
    const float* lse = plan.partial_lse + merge.partial_row + row;
    const float* out = plan.partial_out + (merge.partial_row + row) * size;

    RowState state;
    for (int64_t split = 0; split < merge.splits; split++)
      if (!(lse[split * step] <= state.highest)) state.highest = lse[split * step];
    memset(values, 0, sizeof values);
    for (int64_t split = 0; split < merge.splits && state.highest != -INFINITY; split++) {
      if (lse[split * step] == -INFINITY) continue;
      const float weight = exp2f(lse[split * step] - state.highest);
      state.sum += weight;
      const float* part = out + split * step * size;
      for (int64_t i = 0; i < size; i += LANES)
        store_part(values + i, fma(splat(weight), load_part(part + i, size - i), load_part(values + i, size - i)), size - i);
    }
    const int64_t query = row / call.q_heads, head = row % call.q_heads;
    write_answer<T>(call, sequence, head / group, query * group + head % group, values, state);
  }
}

}  // namespace PAGEDFLASH_ISA
}  // namespace pagedflash
