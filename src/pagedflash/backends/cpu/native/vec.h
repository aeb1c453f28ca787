// The vector layer: everything that differs between instruction sets. kernels.cpp is compiled once for each of them, in a
// namespace of its own, with PAGEDFLASH_ISA naming it.
//
// A layer (vec_*.h) offers
//
//   Vec, LANES                    a register of floats
//   ACCUMULATORS                  registers that a loop may keep sums in (a multiple of LANES, at least 8)
//   GEMM_ROWS, GEMM_VECS          the block of sums of the matrix product: rows x registers
//   zero splat load store         add sub mul div fma(a, b, c) = a * b + c    abs min max round_nearest
//   highest(v) total(v)           over the lanes
//   iota()                        0, 1, 2, ...
//   keep_inside(v, i, lo, hi, w)  lane by lane: v where lo <= i < hi, else w
//   times_power_of_two(v, n)      v * 2^n for whole n from -127 (gives 0) to 127
//   totals(v[LANES])              lane i = total(v[i])
//   transpose(v[LANES])           in place, LANES x LANES
//   load(T*) store(T*)            also for f16 and bf16, rounding to nearest even
//   load_part store_part(T*, n)   the first n elements, n a multiple of 8; zeros beyond them
//   load_chunk(T*)                2 * LANES elements as two registers, in whatever order is cheapest for T:
//   restore_order<T>(chunk)       that order back to the order in memory
//
// min and max give the second operand if either is NaN, or NaN.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "abi.h"


namespace pagedflash {
namespace PAGEDFLASH_ISA {

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

}  // namespace PAGEDFLASH_ISA
}  // namespace pagedflash

#if defined(PAGEDFLASH_ISA_avx512) || defined(PAGEDFLASH_ISA_avx512bf16)
#include "vec_avx512.h"
#elif defined(PAGEDFLASH_ISA_avx2)
#include "vec_avx2.h"
#elif defined(PAGEDFLASH_ISA_neon)
#include "vec_neon.h"
#else
#include "vec_generic.h"
#endif

namespace pagedflash {
namespace PAGEDFLASH_ISA {

constexpr int CHUNK = 2 * LANES;

// Elements `at` to `at + CHUNK` of a row of `size` elements; zeros behind its end.
template <class T>
PAGEDFLASH_INLINE Chunk load_chunk_of(const T* row, int64_t at, int64_t size) {
  return size - at >= CHUNK ? load_chunk(row + at) : load_chunk_part(row + at, size - at);
}

// Dot products of rows of T: what a query row is kept as, and one step of CHUNK elements.
template <class T>
struct Dot {
  using Query = float;
  using Loaded = Chunk;
  static PAGEDFLASH_INLINE Loaded load_key(const T* row) { return load_chunk(row); }
  static PAGEDFLASH_INLINE Loaded load_key_part(const T* row, int64_t n) { return load_chunk_part(row, n); }
  static PAGEDFLASH_INLINE Loaded load_query(const Query* query) { return {load(query), load(query + LANES)}; }
  static PAGEDFLASH_INLINE void store_query(Query* query, const T* row) {
    const Chunk chunk = load_chunk(row);
    store(query, chunk.a);
    store(query + LANES, chunk.b);
  }
  static PAGEDFLASH_INLINE Vec step(const Loaded& key, const Loaded& query, Vec sum) {
    return fma(key.b, query.b, fma(key.a, query.a, sum));
  }
};

#if defined(PAGEDFLASH_ISA_avx512bf16)
// VDPBF16 multiplies pairs of bfloat16 as they are: no conversion, products exact, sums in float32.
template <>
struct Dot<bf16> {
  using Query = bf16;
  using Loaded = __m512bh;
  static PAGEDFLASH_INLINE Loaded load_key(const bf16* row) { return (__m512bh)_mm512_loadu_si512(row); }
  static PAGEDFLASH_INLINE Loaded load_key_part(const bf16* row, int64_t n) {
    return (__m512bh)_mm512_maskz_loadu_epi16(first_lanes32(n), row);
  }
  static PAGEDFLASH_INLINE Loaded load_query(const Query* query) { return load_key(query); }
  static PAGEDFLASH_INLINE void store_query(Query* query, const bf16* row) { memcpy(query, row, CHUNK * sizeof(bf16)); }
  static PAGEDFLASH_INLINE Vec step(const Loaded& key, const Loaded& query, Vec sum) {
    return _mm512_dpbf16_ps(sum, key, query);
  }
};
#endif

template <class T>
PAGEDFLASH_INLINE void widen_row(float* to, const T* from, int64_t size) {
  for (int64_t i = 0; i < size; i += LANES) store_part(to + i, load_part(from + i, size - i), size - i);
}
template <class T>
PAGEDFLASH_INLINE void narrow_row(T* to, const float* from, int64_t size) {
  for (int64_t i = 0; i < size; i += LANES) store_part(to + i, load_part(from + i, size - i), size - i);
}

}  // namespace PAGEDFLASH_ISA
}  // namespace pagedflash
