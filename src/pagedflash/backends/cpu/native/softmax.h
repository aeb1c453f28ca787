// The online softmax, in base 2: products q.k of one row with a tile of keys become probabilities.
#pragma once

#include "score.h"

namespace pagedflash {
namespace PAGEDFLASH_ISA {

constexpr int64_t MAX_TILE = 256;  // keys

// Sums of a row are kept relative to a score that is at most SLACK below its largest one. It follows only where it must: most
// tiles rescale nothing, and their exponentials need not wait for their maximum.
constexpr float SLACK = 8;

// A row is taken in so many chains: a maximum or an addition takes longer than the next can start.
constexpr int SOFTMAX_CHAINS = 4;

struct SoftmaxState {
  float base = -INFINITY;  // that score
  float sum = 0;           // of 2^(score - base)
};

// One row against keys `first` to `first + count`, in place: products q.k in, 2^(score - base) out, zeros where the row does
// not see the key, up to the next multiple of LANES behind `count`. store_elements(scores, i, p) stores LANES of them,
// from i on, over scores of this index or less. Dropout takes them out of what is stored, not out of the sum. Returns alpha, which
// rescales earlier sums to the new base.
template <class Store>
PAGEDFLASH_INLINE float softmax_tile(float* scores, const Score& score, const ScoreRow& row, int64_t first, int64_t count,
                                     SoftmaxState& state, const Store& store_elements) {
  // Where scores are only scaled, that waits for the exponent.
  const bool is_scale = score.is_scale(row);
  const float scale = is_scale ? score.scale() : 1.0f;
  if (is_scale)
    score.mask(scores, row, first, count);
  else
    score.apply(scores, row, first, count);

  // Calls step(i, chain) for every register of scores.
  const auto in_chains = [&](const auto& step) {
    for (int64_t first_of = 0; first_of < count; first_of += SOFTMAX_CHAINS * LANES)
      for (int chain = 0; chain < SOFTMAX_CHAINS; chain++)
        if (first_of + chain * LANES < count) step(first_of + chain * LANES, chain);
  };
  Vec top[SOFTMAX_CHAINS];
  for (Vec& chain : top) chain = splat(-INFINITY);
  in_chains([&](int64_t i, int chain) { top[chain] = max(load(scores + i), top[chain]); });
  const float largest = scale * reduce_max(max(max(top[0], top[1]), max(top[2], top[3])));
  float alpha = 1.0f;
  if (largest > state.base + SLACK) {
    alpha = exp2f(state.base - largest);
    state.base = largest;
  }
  const float base = state.base == -INFINITY ? 0.0f : state.base;  // -inf - -inf would be NaN

  float buffer[Dropout::factors_size(MAX_TILE)];
  const bool drops = score.dropout.drops();
  const float* factors = drops ? score.dropout.factors(buffer, row.dropout, first, count) : nullptr;
  Vec sum[SOFTMAX_CHAINS];
  for (Vec& chain : sum) chain = zero();
  in_chains([&](int64_t i, int chain) {
    const Vec p = exp2(fma(load(scores + i), splat(scale), splat(-base)));
    store_elements(scores, i, drops ? mul(p, load(factors + i)) : p);
    sum[chain] = add(sum[chain], p);
  });
  state.sum = state.sum * alpha + reduce_sum(add(add(sum[0], sum[1]), add(sum[2], sum[3])));
  return alpha;
}

}  // namespace PAGEDFLASH_ISA
}  // namespace pagedflash
