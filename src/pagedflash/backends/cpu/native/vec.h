// The vector layer: everything that differs between instruction sets. kernels.cpp is compiled once for each of them, in a
// namespace of its own, with PAGEDFLASH_ISA naming it.
//
// A layer (vec_*.h) offers
//
//   Vec, LANES                         a register of floats
//   ACCUMULATORS                       registers that a loop may accumulate in (a multiple of LANES, at least 8)
//   GEMM_ROWS, GEMM_VECS               the block of accumulators of the matrix product: rows x registers
//   zero splat load store              add sub mul div fma(a, b, c) = a * b + c    abs min max
//   reduce_max(v) reduce_sum(v)        over the lanes
//   reduce_sums(v[LANES])              lane i = reduce_sum(v[i])
//   iota()                             0, 1, 2, ...
//   select_in_range(v, i, lo, hi, w)   lane by lane: v where lo <= i < hi, else w
//   float_of_exponent(v)               the low bits of each lane become the exponent of a float: n + 127 gives 2^n, 0 gives 0;
//                                      or, where PAGEDFLASH_EXP2 is defined, exp2(v) itself
//   transpose(v[LANES])                in place, LANES x LANES
//   load(T*) store(T*)                 also for f16 and bf16, rounding to nearest even; load for i8, e4m3 and e5m2 too
//   load_part store_part(T*, n)        the first n > 0 elements; zeros beyond them
//   load_chunk(T*)                     2 * LANES elements as two registers; of bf16 first the even ones, then the odd ones
//   load_chunk_part(T*, n)             the first n > 0 elements of a chunk; zeros beyond them
//   CHUNK_SCALE<T>                     how many times too small the elements of a chunk are
//   restore_order<T>(chunk)            that order back to the order in memory
//
// and, where PAGEDFLASH_BF16_PAIRS is defined, on LANES pairs of bfloat16:
//
//   load_pairs(bf16*, n)               the first n of 2 * LANES elements; zeros beyond them
//   dot_pairs(a, b, c)                 a.even * b.even + a.odd * b.odd + c, in float
//   interleave_pairs(v[2])             a0 a1 a2 ..., b0 b1 b2 ... become a0 b0 a1 b1 ..., in place
//   round_pairs(low, high)             2 * LANES floats in this order, rounded to bfloat16
//   store_rounded(bf16*, v)            floats rounded to bfloat16; subnormal ones to zero
//
// min and max give the second operand if either is NaN, or NaN.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "arithmetic.h"

namespace pagedflash {
namespace PAGEDFLASH_ISA {

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};
struct i8 {
  int8_t bits;
};
struct e4m3 {  // no infinity; NaN is all ones
  uint8_t bits;
};
struct e5m2 {  // the upper half of an f16
  uint8_t bits;
};

template <class T>
constexpr float CHUNK_SCALE = 1;
constexpr float E4M3_SCALE = 256;  // of the bits of an e4m3, read as those of a float16

PAGEDFLASH_INLINE float float_of_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
PAGEDFLASH_INLINE uint32_t bits_of_float(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

}  // namespace PAGEDFLASH_ISA
}  // namespace pagedflash

#if defined(PAGEDFLASH_ISA_avx512) || defined(PAGEDFLASH_ISA_avx512bf16) || defined(PAGEDFLASH_ISA_amx)
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

using pagedflash::max;  // of sizes: those of registers hide them
using pagedflash::min;

constexpr int CHUNK = 2 * LANES;
constexpr int64_t PANEL = GEMM_VECS * LANES;  // columns of a packed panel of the matrix product

// Where load_chunk puts element i.
template <class T>
PAGEDFLASH_INLINE constexpr int chunk_position(int i) { return i; }
template <>
PAGEDFLASH_INLINE constexpr int chunk_position<bf16>(int i) { return i % 2 * LANES + i / 2; }

constexpr float LOG2_E = 1.44269504088896f, LN_2 = 0.693147180559945f;

#if !defined(PAGEDFLASH_EXP2)
// 2^x for x <= 127, relative error below 2e-7; exact for whole x; exactly 0 for x <= -127, and for -inf. The polynomial is
// the minimax one on [-1/2, 1/2] of those that are 1 at 0.
PAGEDFLASH_INLINE Vec exp2(Vec x) {
  // A float so large has no bits for a fraction: adding it rounds x to n, and n + 127 are the low bits of the sum.
  const Vec large = splat(0x1.8p23f + 127.0f);
  x = max(splat(-127.0f), x);
  const Vec sum = add(x, large), f = sub(x, sub(sum, large));
  Vec y = splat(0.001326472722f);
  y = fma(y, f, splat(0.009671512640f));
  y = fma(y, f, splat(0.05550733743f));
  y = fma(y, f, splat(0.2402224209f));
  y = fma(y, f, splat(0.6931469776f));
  y = fma(y, f, splat(1.0f));
  return mul(y, float_of_exponent(sum));
}
#endif

template <class T>
PAGEDFLASH_INLINE void convert(T* to, const T* from, int64_t n) {
  memcpy(to, from, n * sizeof(T));
}

// n elements from one type to another. Nothing behind them is touched.
template <class To, class From>
PAGEDFLASH_INLINE void convert(To* to, const From* from, int64_t n) {
  for (int64_t i = 0; i < n; i += LANES) store_part(to + i, load_part(from + i, n - i), n - i);
}

}  // namespace PAGEDFLASH_ISA
}  // namespace pagedflash
