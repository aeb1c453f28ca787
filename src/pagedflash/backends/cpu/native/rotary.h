// Rotary embedding of one row, as rotate() of pagedflash/backends/reference.py.
#pragma once

#include "vec.h"

namespace pagedflash {
namespace PAGEDFLASH_ISA {

constexpr int64_t ROTARY_PAIRS = 64;  // rotated together

// n elements, n any number, as floats. `to` has room for a multiple of 8 of them.
template <class T>
PAGEDFLASH_INLINE void widen_any(float* to, const T* from, int64_t n) {
  T padded[ROTARY_PAIRS];
  memcpy(padded, from, n * sizeof(T));
  for (int64_t i = n; i < round_up(n, 8); i++) padded[i] = T{};
  widen_row(to, padded, round_up(n, 8));
}

// Calls store(i, elements, n) with elements i to i + n of the rotated row, until it has them all.
//
// Pair i is elements (2i, 2i + 1) if interleaved, else (i, i + rotary_pairs). The elements behind the pairs are kept.
template <class T, class Store>
PAGEDFLASH_INLINE void rotate_row(const T* row, const CacheWrite& write, int64_t position, const Store& store) {
  const int64_t pairs = write.rotary_pairs;
  const T* cos_row = static_cast<const T*>(write.rotary_cos) + position * pairs;
  const T* sin_row = static_cast<const T*>(write.rotary_sin) + position * pairs;
  for (int64_t first = 0; first < pairs; first += ROTARY_PAIRS) {
    const int64_t n = min(ROTARY_PAIRS, pairs - first);
    float cos[ROTARY_PAIRS], sin[ROTARY_PAIRS], x[2 * ROTARY_PAIRS];
    widen_any(cos, cos_row + first, n);
    widen_any(sin, sin_row + first, n);
    // Interleaved: 2n elements in one piece. Else n elements and, `pairs` further, their n partners.
    T rotated[2 * ROTARY_PAIRS];
    const int64_t step = write.rotary_interleaved ? 2 : 1, partner = write.rotary_interleaved ? 1 : n;
    const T* piece = row + step * first;
    memcpy(rotated, piece, step * n * sizeof(T));
    if (!write.rotary_interleaved) memcpy(rotated + n, piece + pairs, n * sizeof(T));
    for (int64_t i = 2 * n; i < round_up(2 * n, 8); i++) rotated[i] = T{};
    widen_row(x, rotated, round_up(2 * n, 8));
    for (int64_t i = 0; i < n; i++) {
      const float a = x[i * step], b = x[i * step + partner];
      x[i * step] = a * cos[i] - b * sin[i];
      x[i * step + partner] = b * cos[i] + a * sin[i];
    }
    narrow_row(rotated, x, round_up(2 * n, 8));
    store(step * first, rotated, step * n);
    if (!write.rotary_interleaved) store(first + pairs, rotated + n, n);
  }
  store(2 * pairs, row + 2 * pairs, write.head_dim - 2 * pairs);
}

}  // namespace PAGEDFLASH_ISA
}  // namespace pagedflash
