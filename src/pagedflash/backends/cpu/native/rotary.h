// Rotary embedding of one row, as rotate() of pagedflash/backends/reference.py.
#pragma once

#include "vec.h"

namespace pagedflash {
namespace PAGEDFLASH_ISA {

constexpr int64_t ROTARY_PAIRS = 64;  // rotated together

// Rotates a row at a position: calls store(i, floats, n) for elements i to i + n, until all rotated ones are stored. Returns
// how many these are: the elements behind them stay as they are.
//
// Pair i is elements (2i, 2i + 1) if interleaved, else (i, i + rotary_pairs).
template <class T, class Store>
PAGEDFLASH_INLINE int64_t rotate_row(const T* row, const CacheWrite& write, int64_t position, const Store& store) {
  const int64_t pairs = write.rotary_pairs;
  const T* cos_row = static_cast<const T*>(write.rotary_cos) + position * pairs;
  const T* sin_row = static_cast<const T*>(write.rotary_sin) + position * pairs;
  for (int64_t first = 0; first < pairs; first += ROTARY_PAIRS) {
    const int64_t n = min(ROTARY_PAIRS, pairs - first);
    float cos[ROTARY_PAIRS], sin[ROTARY_PAIRS], x[2 * ROTARY_PAIRS];
    convert(cos, cos_row + first, n);
    convert(sin, sin_row + first, n);
    if (write.rotary_interleaved) {
      convert(x, row + 2 * first, 2 * n);
      for (int64_t i = 0; i < n; i++) {
        const float a = x[2 * i], b = x[2 * i + 1];
        x[2 * i] = a * cos[i] - b * sin[i];
        x[2 * i + 1] = b * cos[i] + a * sin[i];
      }
      store(2 * first, x, 2 * n);
    } else {
      float y[ROTARY_PAIRS];
      convert(x, row + first, n);
      convert(y, row + pairs + first, n);
      for (int64_t i = 0; i < n; i++) {
        const float a = x[i], b = y[i];
        x[i] = a * cos[i] - b * sin[i];
        y[i] = b * cos[i] + a * sin[i];
      }
      store(first, x, n);
      store(pairs + first, y, n);
    }
  }
  return 2 * pairs;
}

}  // namespace PAGEDFLASH_ISA
}  // namespace pagedflash
