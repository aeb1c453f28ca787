// AMX's tiles: eight registers of up to 16 rows of 64 bytes.
#pragma once

#include "vec.h"

namespace pagedflash {
namespace PAGEDFLASH_ISA {

struct TileShape {
  int64_t rows, groups;  // of 4 bytes
};

// A thread's tiles have these shapes while it lives.
class TileSession {
 public:
  explicit TileSession(const TileShape (&shapes)[8]) {
    alignas(64) uint8_t config[64] = {1};  // palette 1; then 16-bit bytes of a row, from byte 16, and rows, from byte 48
    for (int tile = 0; tile < 8; tile++) {
      config[16 + 2 * tile] = 4 * shapes[tile].groups;
      config[48 + tile] = shapes[tile].rows;
    }
    before_tiles_read();
    _tile_loadconfig(config);
  }
  ~TileSession() { _tile_release(); }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;

  // GCC's tile loads do not say that they read memory: what they read must be stored before.
  static PAGEDFLASH_INLINE void before_tiles_read() { __asm__ volatile("" ::: "memory"); }
};

}  // namespace PAGEDFLASH_ISA
}  // namespace pagedflash
