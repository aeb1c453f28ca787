// The online softmax, in base 2: dot products of one query row with a tile of keys become probabilities.
#pragma once

#include "plan.h"
#include "vec.h"

namespace pagedflash {
namespace PAGEDFLASH_ISA {

constexpr float LOG2_E = 1.44269504088896f, LN_2 = 0.693147180559945f;

// 2^x for x <= 127, relative error below 1e-7; exactly 0 for x <= -127, and for -inf. The polynomial is the minimax one
// on [-1/2, 1/2].
PAGEDFLASH_INLINE Vec exp2(Vec x) {
  x = max(splat(-127.0f), x);
  const Vec n = round_nearest(x), f = sub(x, n);
  Vec y = splat(0.001327647263f);
  y = fma(y, f, splat(0.009675541343f));
  y = fma(y, f, splat(0.05550713272f));
  y = fma(y, f, splat(0.2402211972f));
  y = fma(y, f, splat(0.6931469671f));
  y = fma(y, f, splat(1.000000072f));
  return times_power_of_two(y, n);
}

// How a dot product becomes a score (times log2(e)).
struct ScoreRule {
  explicit ScoreRule(const AttentionCall& call)
      : capped(call.softcap > 0),
        scale(call.scale * LOG2_E),
        cap(call.softcap * LOG2_E),
        cap_exponent(capped ? 2 * call.scale / call.softcap * LOG2_E : 0) {}

  bool capped;
  float scale, cap, cap_exponent;
};

struct Row {
  Range visible;     // keys
  int64_t position;  // in keys
  float slope;       // ALiBi, times log2(e); 0 = none
};

struct RowState {
  float highest = -INFINITY;  // score
  float sum = 0;              // of 2^(score - highest)
};

// Dot products of one query row with keys `first` to `first + count` become scores, in place; -inf where the mask hides the
// key, up to the next multiple of LANES behind `count`.
PAGEDFLASH_INLINE void score_tile(float* scores, int64_t first, int64_t count, const ScoreRule& rule, const Row& row) {
  const Vec lo = splat((float)(row.visible.begin - first)), hi = splat((float)lesser(row.visible.end - first, count));
  const Vec position = splat((float)(row.position - first));
  Vec index = iota();
  for (int64_t i = 0; i < count; i += LANES, index = add(index, splat(LANES))) {
    Vec score = load(scores + i);
    if (rule.capped) {  // cap * tanh(x) = cap - 2 * cap / (exp(2x) + 1)
      const Vec e = exp2(min(splat(126.0f), mul(score, splat(rule.cap_exponent))));
      score = sub(splat(rule.cap), div(splat(2 * rule.cap), add(e, splat(1.0f))));
    } else {
      score = mul(score, splat(rule.scale));
    }
    if (row.slope != 0) score = sub(score, mul(splat(row.slope), abs(sub(index, position))));
    store(scores + i, keep_inside(score, index, lo, hi, splat(-INFINITY)));
  }
}

// One query row against keys `first` to `first + count`, in place: dot products in, 2^(score - highest) out, zeros where the
// mask hides the key, up to the next multiple of LANES behind `count`. Returns the factor that brings earlier sums to the
// new highest score.
PAGEDFLASH_INLINE float softmax_tile(float* scores, int64_t first, int64_t count, const ScoreRule& rule, const Row& row,
                                     RowState& state) {
  // Where scores are only scaled, the scaling waits for the exponent.
  const bool only_scaled = !rule.capped && rule.scale >= 0 && row.slope == 0 && count % LANES == 0 &&
                           row.visible.begin <= first && first + count <= row.visible.end;
  const float scale = only_scaled ? rule.scale : 1.0f;
  if (!only_scaled) score_tile(scores, first, count, rule, row);

  Vec top = splat(-INFINITY);
  for (int64_t i = 0; i < count; i += LANES) top = max(load(scores + i), top);
  const float before = state.highest, tile_top = scale * highest(top);
  state.highest = tile_top > before ? tile_top : before;
  const float base = state.highest == -INFINITY ? 0.0f : state.highest;  // -inf - -inf would be NaN

  Vec sum = zero();
  for (int64_t i = 0; i < count; i += LANES) {
    const Vec p = exp2(fma(load(scores + i), splat(scale), splat(-base)));
    store(scores + i, p);
    sum = add(sum, p);
  }
  const float shrink = before == state.highest ? 1.0f : exp2f(before - base);
  state.sum = state.sum * shrink + total(sum);
  return shrink;
}

}  // namespace PAGEDFLASH_ISA
}  // namespace pagedflash
