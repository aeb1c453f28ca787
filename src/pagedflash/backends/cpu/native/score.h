// From q.k to a masked score in base 2: scale, softcap, ALiBi, window. And its derivative, for backward.
#pragma once

#include "dropout.h"

namespace pagedflash {
namespace PAGEDFLASH_ISA {

// What scores need to know of a packed-GQA row.
struct ScoreRow {
  Range kv_range;    // keys it sees
  int64_t position;  // of its query, among the keys
  float slope;       // ALiBi, in base 2; 0 = none
  DropoutRow dropout;
};

PAGEDFLASH_INLINE ScoreRow score_row(const AttentionProblem& problem, const Sequence& sequence, int64_t query, int64_t head) {
  const float* slopes = problem.alibi_slopes;
  const float slope = slopes ? slopes[sequence.batch * problem.alibi_batch_stride + head] : 0.0f;
  const DropoutRow dropout = {(uint32_t)query, (uint32_t)head, (uint32_t)sequence.batch};
  return {sequence.kv_range(problem, query), sequence.position(query), slope * LOG2_E, dropout};
}

class Score {
 public:
  const Dropout dropout;  // of the probabilities that scores become

  explicit Score(const AttentionProblem& params)
      : dropout(params), capped_(params.softcap > 0), scale_(params.scale), softcap_(params.softcap),
        tanh_exponent_(2 * params.scale * LOG2_E),
        slope_(params.scale * LN_2 * (params.softcap > 0 ? params.softcap : 1)) {}

  // Whether the scores of a row are q.k times scale(), which is positive, where it sees the key. Not of one that sees few
  // keys: apply() makes the LSE of a single key its very score.
  PAGEDFLASH_INLINE bool is_scale(const ScoreRow& row) const {
    return !capped_ && scale_ > 0 && row.slope == 0 && row.kv_range.size() >= LANES;
  }
  PAGEDFLASH_INLINE float scale() const { return scale_; }

  // The derivative of a score (in base e) by q.k is slope(), with a softcap times what apply() gives as `flatness`.
  PAGEDFLASH_INLINE float slope() const { return slope_; }
  PAGEDFLASH_INLINE bool capped() const { return capped_; }

  // Products q.k of a row with keys `first` to `first + count` become -inf where the row does not see the key, up to the next
  // multiple of LANES behind `count`; the others stay.
  PAGEDFLASH_INLINE void mask(float* scores, const ScoreRow& row, int64_t first, int64_t count) const {
    const int64_t lo = row.kv_range.begin - first, hi = min(row.kv_range.end - first, count);
    const auto mask_register = [&](int64_t i) {
      const Vec index = add(iota(), splat((float)i));
      store(scores + i, select_in_range(load(scores + i), index, splat((float)lo), splat((float)hi), splat(-INFINITY)));
    };
    for (int64_t i = 0; i < min(lo, count); i += LANES) mask_register(i);
    for (int64_t i = max<int64_t>(0, hi) / LANES * LANES; i < count; i += LANES) mask_register(i);
  }

  // Products q.k of a row with keys `first` to `first + count` become scores, in place; -inf where the row does not see the
  // key, up to the next multiple of LANES behind `count`. `flatness`, if wanted, gets 1 - tanh^2 where there is a softcap.
  PAGEDFLASH_INLINE void apply(float* scores, const ScoreRow& row, int64_t first, int64_t count,
                               float* flatness = nullptr) const {
    const Vec lo = splat((float)(row.kv_range.begin - first)), hi = splat((float)min(row.kv_range.end - first, count));
    const Vec position = splat((float)(row.position - first));
    Vec index = iota();
    for (int64_t i = 0; i < count; i += LANES, index = add(index, splat(LANES))) {
      Vec score = load(scores + i);
      if (capped_) {  // softcap * tanh(x) = softcap - 2 * softcap / (exp(2x) + 1)
        const Vec e = exp2(min(splat(126.0f), mul(score, splat(tanh_exponent_))));
        const Vec half = div(splat(1.0f), add(e, splat(1.0f)));  // of 1 - tanh(x)
        score = fma(splat(-2 * softcap_), half, splat(softcap_));
        if (flatness) store(flatness + i, mul(splat(4.0f), mul(half, sub(splat(1.0f), half))));
      } else {
        score = mul(score, splat(scale_));
      }
      if (row.slope != 0) score = sub(score, mul(splat(row.slope), abs(sub(index, position))));
      store(scores + i, select_in_range(score, index, lo, hi, splat(-INFINITY)));
    }
  }

 private:
  const bool capped_;
  const float scale_, softcap_;
  const float tanh_exponent_;  // times q.k: the exponent of 2 in exp(2x), x the argument of tanh
  const float slope_;
};

}  // namespace PAGEDFLASH_ISA
}  // namespace pagedflash
