// Products of pairs of bfloat16 in AMX's tiles. See gemm.h.
#pragma once

#include "tiles.h"

namespace pagedflash {
namespace PAGEDFLASH_ISA {

// A block in AMX's tiles of 16 rows of 64 bytes: 2 x 2 of c, and 2 of a and of b at a time.
struct TileGemm {
  static constexpr int64_t TILE = 16;  // rows, and groups
  static constexpr int64_t ROWS = 2 * TILE, STEP = 2 * TILE;
  static constexpr int64_t TILE_KEYS = 256;
  static constexpr int64_t PADDING = TILE;
  static constexpr int64_t PASS_ROWS = 2 * ROWS;  // two blocks share a panel in the first-level cache; their scores stay near
  static_assert(PANEL == 2 * TILE && LANES == TILE);

  struct Session : TileSession {
    Session() : TileSession({FULL, FULL, FULL, FULL, FULL, FULL, FULL, FULL}) {}
    static constexpr TileShape FULL = {TILE, TILE};
  };

  // c is rescaled in memory, where alpha is not 1: tiles only add.
  static PAGEDFLASH_INLINE void multiply_block(const float* a, int64_t a_stride, const float* b, int64_t depth, float* c,
                                               int64_t c_stride, const float* alpha) {
    float* const c_low = c + TILE * c_stride;
    if (alpha) {
      for (int64_t first = 0; first < ROWS; first += LANES) {
        const uint32_t rescaled = _mm512_cmp_ps_mask(load(alpha + first), splat(1.0f), _CMP_NEQ_UQ);
        for (uint32_t left = rescaled; left; left &= left - 1) {
          const int64_t r = first + __builtin_ctz(left);
          for (int64_t i = 0; i < PANEL; i += LANES)
            store(c + r * c_stride + i, mul(splat(alpha[r]), load(c + r * c_stride + i)));
        }
      }
      Session::before_tiles_read();
      _tile_loadd(0, c, c_stride * sizeof(float));
      _tile_loadd(1, c + TILE, c_stride * sizeof(float));
      _tile_loadd(2, c_low, c_stride * sizeof(float));
      _tile_loadd(3, c_low + TILE, c_stride * sizeof(float));
    } else {
      Session::before_tiles_read();
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t k = 0; k < depth; k += TILE) {
      _tile_loadd(4, a + k, a_stride * sizeof(float));
      _tile_loadd(6, b + k * PANEL, PANEL * sizeof(float));
      _tile_loadd(7, b + k * PANEL + TILE, PANEL * sizeof(float));
      _tile_loadd(5, a + TILE * a_stride + k, a_stride * sizeof(float));
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, c_stride * sizeof(float));
    _tile_stored(1, c + TILE, c_stride * sizeof(float));
    _tile_stored(2, c_low, c_stride * sizeof(float));
    _tile_stored(3, c_low + TILE, c_stride * sizeof(float));
  }
};

}  // namespace PAGEDFLASH_ISA
}  // namespace pagedflash
