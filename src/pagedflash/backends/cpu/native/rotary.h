// Rotary embedding of one row, as rotate() of pagedflash/reference.py.
#pragma once

#include "plan.h"
#include "vec.h"

namespace pagedflash {
namespace PAGEDFLASH_ISA {

constexpr int64_t MAX_HEAD_DIM = 256;

// Pair i is elements (2i, 2i + 1) if interleaved, else (i, i + pairs). The elements behind the pairs are kept.
template <class T>
void rotate_row(T* out, const T* row, const CacheWrite& write, int64_t position) {
  const int64_t pairs = write.rotary_pairs, rotated = round_up(2 * pairs, 8);
  float x[MAX_HEAD_DIM + LANES], cos[MAX_HEAD_DIM / 2 + LANES], sin[MAX_HEAD_DIM / 2 + LANES];
  T padded_cos[MAX_HEAD_DIM / 2 + LANES], padded_sin[MAX_HEAD_DIM / 2 + LANES];  // rows of a table may end anywhere
  memcpy(padded_cos, static_cast<const T*>(write.rotary_cos) + position * pairs, pairs * sizeof(T));
  memcpy(padded_sin, static_cast<const T*>(write.rotary_sin) + position * pairs, pairs * sizeof(T));
  for (int64_t i = pairs; i < round_up(pairs, 8); i++) padded_cos[i] = padded_sin[i] = T{};
  widen_row(cos, padded_cos, round_up(pairs, 8));
  widen_row(sin, padded_sin, round_up(pairs, 8));
  widen_row(x, row, rotated);
  const int64_t step = write.rotary_interleaved ? 2 : 1, other = write.rotary_interleaved ? 1 : pairs;
  for (int64_t i = 0; i < pairs; i++) {
    const float a = x[i * step], b = x[i * step + other];
    x[i * step] = a * cos[i] - b * sin[i];
    x[i * step + other] = b * cos[i] + a * sin[i];
  }
  T turned[MAX_HEAD_DIM + LANES];
  narrow_row(turned, x, rotated);
  memcpy(out, turned, 2 * pairs * sizeof(T));
  memcpy(out + 2 * pairs, row + 2 * pairs, (write.head_dim - 2 * pairs) * sizeof(T));
}

}  // namespace PAGEDFLASH_ISA
}  // namespace pagedflash
