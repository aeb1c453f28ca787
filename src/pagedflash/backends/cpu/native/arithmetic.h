// Small arithmetic on sizes and ranges.
#pragma once

#include "abi.h"

namespace pagedflash {

template <class T>
PAGEDFLASH_INLINE constexpr T min(T a, T b) { return a < b ? a : b; }
template <class T>
PAGEDFLASH_INLINE constexpr T max(T a, T b) { return a > b ? a : b; }
PAGEDFLASH_INLINE constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
PAGEDFLASH_INLINE constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

struct Range {
  int64_t begin, end;
  PAGEDFLASH_INLINE int64_t size() const { return end > begin ? end - begin : 0; }
};

}  // namespace pagedflash
