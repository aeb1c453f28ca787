// combine: reduces the partial outputs of a row's splits by their log-sum-exp (base 2).
#pragma once

#include "rows.h"

namespace pagedflash {
namespace PAGEDFLASH_ISA {

template <class T>
void combine_rows(const Plan& plan, Range rows) {
  const AttentionProblem& problem = plan.problem;
  const int64_t size = problem.write.v_head_dim;
  int64_t r = 0;
  for (int64_t reduced = rows.begin; reduced < rows.end; reduced++) {
    while (r + 1 < plan.reductions.size() && plan.reductions[r + 1].first_row <= reduced) r++;
    const Reduction& reduction = plan.reductions[r];
    const Sequence& sequence = plan.sequences[reduction.sequence];
    const int64_t row = reduced - reduction.first_row;  // query * q_heads + head
    const int64_t step = sequence.seqlen_q * problem.q_heads;
    const float* lse = plan.partial_lse + reduction.partial_row + row;
    float* out = plan.partial_out + (reduction.partial_row + row) * size;

    SoftmaxState state;
    for (int64_t split = 0; split < reduction.splits; split++)
      if (!(lse[split * step] <= state.base)) state.base = lse[split * step];
    // Accumulates in the partial of split 0: nobody else reads it.
    for (int64_t split = 0; split < reduction.splits && state.base != -INFINITY; split++) {
      const float weight = exp2f(lse[split * step] - state.base);
      state.sum += weight;
      if (split == 0) {
        store_scaled(out, out, size, weight);
        continue;
      }
      const float* partial = out + split * step * size;
      for (int64_t i = 0; i < size; i += LANES)
        store_part(out + i, fma(splat(weight), load_part(partial + i, size - i), load_part(out + i, size - i)), size - i);
    }
    write_output<T>(problem, sequence, row / problem.q_heads, row % problem.q_heads, out, state);
  }
}

}  // namespace PAGEDFLASH_ISA
}  // namespace pagedflash
