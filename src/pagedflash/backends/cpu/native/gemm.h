// The matrix products of prefill, accumulated in float32: c (rows x PANEL) = a (rows x depth) x b (depth x PANEL).
//
// What is multiplied lies in groups: a lane of 32 bits with elements that are neighbours along the depth. A group is one
// float, or a pair of bfloat16 where the processor multiplies those. Strides and depths count groups, and arrays of groups are
// arrays of float.
//
//   a    rows x groups       queries, or the probabilities of a tile
//   b    groups x PANEL      keys, transposed; or values, GROUP tokens interleaved
//
// Gemm<T>, for queries of T, offers
//
//   GROUP                               elements of a group
//   Element                             what it is made of
//   ROWS                                rows of a block
//   TILE_KEYS                           keys of a tile
//   PASS_ROWS                           rows that see a tile before the next ones do
//   PADDING                             groups between rows of a and c, which should not lie a power of two apart
//   STEP                                elements: a multiple of this is multiplied
//   Session                             lives while a thread multiplies
//   store_query(to, row, n)             n elements of T as groups
//   load_groups(p, n)                   LANES groups: the first n elements of a cache, zeros beyond them
//   load_groups(p, n, scale)            the same times a scale
//   interleave(v[GROUP])                LANES groups of GROUP tokens; then each group has one element of every token
//   store_elements(row, i, v)           elements i to i + LANES of a row of a, from floats, which may have lain at its start
//   multiply_block(a, a_stride, b, depth, c, c_stride, alpha)
//                                       a block: c = a x b, or with alpha c = c * alpha[row] + a x b
#pragma once

#include "kv_format.h"
#include "plan.h"
#if defined(PAGEDFLASH_ISA_amx)
#include "gemm_amx.h"
#endif

namespace pagedflash {
namespace PAGEDFLASH_ISA {

// A block in registers. dot(a, b, c) = a * b + c, group by group.
template <class Dot>
struct RegisterGemm {
  static constexpr int64_t ROWS = GEMM_ROWS, STEP = Dot::STEP;
  static constexpr int64_t TILE_KEYS = 128;
  static constexpr int64_t PADDING = 0;  // rows are read one after another
  static constexpr int64_t PASS_ROWS = 96;  // a panel is in the first-level cache while all of them pass
  struct Session {};

  static PAGEDFLASH_INLINE void multiply_block(const float* a, int64_t a_stride, const float* b, int64_t depth, float* c,
                                               int64_t c_stride, const float* alpha) {
    Vec sum[GEMM_ROWS][GEMM_VECS];
    for (int r = 0; r < GEMM_ROWS; r++)
      for (int i = 0; i < GEMM_VECS; i++)
        sum[r][i] = alpha ? mul(splat(alpha[r]), load(c + r * c_stride + i * LANES)) : zero();
#pragma GCC unroll 4
    for (int64_t k = 0; k < depth; k++) {
      Vec column[GEMM_VECS];
      for (int i = 0; i < GEMM_VECS; i++) column[i] = load(b + k * PANEL + i * LANES);
      for (int r = 0; r < GEMM_ROWS; r++) {
        const Vec factor = splat(a[r * a_stride + k]);
        for (int i = 0; i < GEMM_VECS; i++) sum[r][i] = Dot::dot(factor, column[i], sum[r][i]);
      }
    }
    for (int r = 0; r < GEMM_ROWS; r++)
      for (int i = 0; i < GEMM_VECS; i++) store(c + r * c_stride + i * LANES, sum[r][i]);
  }
};

struct FloatDot {
  static constexpr int64_t STEP = 1;
  static PAGEDFLASH_INLINE Vec dot(Vec a, Vec b, Vec c) { return fma(a, b, c); }
};

template <class T>
struct Gemm : RegisterGemm<FloatDot> {
  using Element = float;
  static constexpr int64_t GROUP = 1;
  static PAGEDFLASH_INLINE void store_query(float* to, const T* row, int64_t n) { convert(to, row, n); }
  template <class E>
  static PAGEDFLASH_INLINE Vec load_groups(const E* p, int64_t n) {
    return load_part(p, n);
  }
  template <class E>
  static PAGEDFLASH_INLINE Vec load_groups(const E* p, int64_t n, Vec scale) {
    return mul(load_part(p, n), scale);
  }
  static PAGEDFLASH_INLINE void interleave(Vec[GROUP]) {}
  static PAGEDFLASH_INLINE void store_elements(float* row, int64_t i, Vec v) { store(row + i, v); }
};

#if PAGEDFLASH_BF16_PAIRS
struct PairDot {
  static constexpr int64_t STEP = 2;
  static PAGEDFLASH_INLINE Vec dot(Vec a, Vec b, Vec c) { return dot_pairs(a, b, c); }
};

#if defined(PAGEDFLASH_ISA_amx)
using PairGemm = TileGemm;
#else
using PairGemm = RegisterGemm<PairDot>;
#endif

// bfloat16 as it is; probabilities are rounded to it.
template <>
struct Gemm<bf16> : PairGemm {
  using Element = bf16;
  static constexpr int64_t GROUP = 2;
  static PAGEDFLASH_INLINE void store_query(float* to, const bf16* row, int64_t n) { memcpy(to, row, n * sizeof(bf16)); }
  static PAGEDFLASH_INLINE Vec load_groups(const bf16* p, int64_t n) { return load_pairs(p, n); }
  template <class E>
  static PAGEDFLASH_INLINE Vec load_groups(const E* p, int64_t n) {
    return load_groups(p, n, splat(1.0f));
  }
  template <class E>
  static PAGEDFLASH_INLINE Vec load_groups(const E* p, int64_t n, Vec scale) {
    const Vec high = n > LANES ? load_part(p + LANES, n - LANES) : zero();
    return round_pairs(mul(load_part(p, n), scale), mul(high, scale));
  }
  static PAGEDFLASH_INLINE void interleave(Vec v[GROUP]) { interleave_pairs(v); }
  static PAGEDFLASH_INLINE void store_elements(float* row, int64_t i, Vec v) {
    store_rounded(reinterpret_cast<bf16*>(row) + i, v);
  }
};
#endif

}  // namespace PAGEDFLASH_ISA
}  // namespace pagedflash
