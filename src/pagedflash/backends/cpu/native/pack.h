// Rows of elements become the second factor of a matrix product, in panels: see gemm.h.
#pragma once

#include "gemm.h"

namespace pagedflash {
namespace PAGEDFLASH_ISA {

// Transposed: `count` rows become the columns of one panel, their `size` elements its depth, padded to STEP. Behind the last row
// it is repeated. row_of(i) is where row i begins.
template <class Product, class RowOf>
PAGEDFLASH_INLINE void pack_columns(float* panel, int64_t count, int64_t size, const RowOf& row_of) {
  const int64_t depth = round_up(size, Product::STEP);
  for (int64_t t = 0; t < PANEL; t += LANES) {
    for (int64_t d = 0; d < depth; d += LANES * Product::GROUP) {
      Vec block[LANES];
      for (int i = 0; i < LANES; i++) block[i] = Product::load_groups(row_of(min(t + i, count - 1)) + d, size - d);
      transpose(block);
      const int64_t group = d / Product::GROUP;
      for (int i = 0; i < LANES && group + i < depth / Product::GROUP; i++)
        store(panel + (group + i) * PANEL + t, block[i]);
    }
  }
}

// As they are: `count` rows become the depth, padded with zeros to STEP, and their `size` elements columns, padded with zeros to
// whole panels, which lie panel_size floats apart. load(i, d) is LANES groups of row i from element d < size on.
template <class Product, class Load>
PAGEDFLASH_INLINE void pack_rows(float* panels, int64_t panel_size, int64_t count, int64_t size, const Load& load) {
  constexpr int64_t GROUP = Product::GROUP;
  for (int64_t t = 0; t < round_up(count, Product::STEP); t += GROUP) {
    for (int64_t d = 0; d < round_up(size, PANEL); d += LANES * GROUP) {
      Vec rows[GROUP];
      for (int64_t i = 0; i < GROUP; i++) rows[i] = t + i < count && d < size ? load(t + i, d) : zero();
      Product::interleave(rows);
      for (int64_t i = 0; i < GROUP; i++) {
        const int64_t column = d + i * LANES;
        store(panels + column / PANEL * panel_size + t / GROUP * PANEL + column % PANEL, rows[i]);
      }
    }
  }
}

}  // namespace PAGEDFLASH_ISA
}  // namespace pagedflash
