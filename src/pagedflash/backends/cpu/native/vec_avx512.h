// AVX-512 (F, BW, DQ, VL): 32 registers of 16 floats. With AVX-512-BF16, products of pairs. See vec.h.
#pragma once

#include <immintrin.h>

namespace pagedflash {
namespace PAGEDFLASH_ISA {

using Vec = __m512;
constexpr int LANES = 16;
constexpr int ACCUMULATORS = 16;
constexpr int GEMM_ROWS = 12, GEMM_VECS = 2;

PAGEDFLASH_INLINE __mmask16 first_lanes(int64_t n) { return n >= 16 ? 0xFFFF : (__mmask16)((1u << n) - 1); }
PAGEDFLASH_INLINE __mmask32 first_lanes32(int64_t n) { return n >= 32 ? 0xFFFFFFFF : (__mmask32)((1u << n) - 1); }

PAGEDFLASH_INLINE Vec zero() { return _mm512_setzero_ps(); }
PAGEDFLASH_INLINE Vec splat(float x) { return _mm512_set1_ps(x); }
PAGEDFLASH_INLINE Vec iota() { return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
PAGEDFLASH_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
PAGEDFLASH_INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
PAGEDFLASH_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
PAGEDFLASH_INLINE Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
PAGEDFLASH_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
PAGEDFLASH_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
PAGEDFLASH_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
PAGEDFLASH_INLINE Vec abs(Vec a) { return _mm512_abs_ps(a); }
// As in vec.h, but 0 below -126 already: subnormal results would take hundreds of cycles. The polynomial is the minimax one on
// [0, 1], for 2^(x - floor(x)).
#define PAGEDFLASH_EXP2 1
PAGEDFLASH_INLINE Vec exp2(Vec x) {
  const Vec f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);
  Vec y = splat(0.00186713f);
  y = fma(y, f, splat(0.00901703f));
  y = fma(y, f, splat(0.05579991f));
  y = fma(y, f, splat(0.24016445f));
  y = fma(y, f, splat(0.69315131f));
  y = fma(y, f, splat(1.0f));
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, splat(-126.0f), _CMP_NLT_UQ), y, x);  // y * 2^floor(x); NaN stays NaN
}
PAGEDFLASH_INLINE Vec select_in_range(Vec a, Vec i, Vec lo, Vec hi, Vec other) {
  const __mmask16 inside = _mm512_cmp_ps_mask(i, lo, _CMP_GE_OQ) & _mm512_cmp_ps_mask(i, hi, _CMP_LT_OQ);
  return _mm512_mask_blend_ps(inside, other, a);
}
PAGEDFLASH_INLINE float reduce_max(Vec a) { return _mm512_reduce_max_ps(a); }
PAGEDFLASH_INLINE float reduce_sum(Vec a) { return _mm512_reduce_add_ps(a); }

// Fold pairs of registers onto each other, halving the lanes that each sum still lies in: 16 -> 8 -> 4 -> 2 -> 1 registers.
PAGEDFLASH_INLINE Vec reduce_sums(const Vec v[LANES]) {
  Vec pair[8], quad[4], half[2];
  for (int i = 0; i < 8; i++)
    pair[i] = add(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
  for (int i = 0; i < 4; i++)
    quad[i] = add(_mm512_shuffle_ps(pair[2 * i], pair[2 * i + 1], 0x44),
                  _mm512_shuffle_ps(pair[2 * i], pair[2 * i + 1], 0xEE));
  for (int i = 0; i < 2; i++)
    half[i] = add(_mm512_shuffle_f32x4(quad[2 * i], quad[2 * i + 1], 0x88),
                  _mm512_shuffle_f32x4(quad[2 * i], quad[2 * i + 1], 0xDD));
  return add(_mm512_shuffle_f32x4(half[0], half[1], 0x88), _mm512_shuffle_f32x4(half[0], half[1], 0xDD));
}

PAGEDFLASH_INLINE void transpose(Vec v[LANES]) {
  Vec t[LANES];
  for (int i = 0; i < LANES; i += 4) {  // 4 x 4 inside each quarter
    const Vec a = _mm512_unpacklo_ps(v[i], v[i + 1]), b = _mm512_unpackhi_ps(v[i], v[i + 1]);
    const Vec c = _mm512_unpacklo_ps(v[i + 2], v[i + 3]), d = _mm512_unpackhi_ps(v[i + 2], v[i + 3]);
    t[i] = _mm512_shuffle_ps(a, c, 0x44);
    t[i + 1] = _mm512_shuffle_ps(a, c, 0xEE);
    t[i + 2] = _mm512_shuffle_ps(b, d, 0x44);
    t[i + 3] = _mm512_shuffle_ps(b, d, 0xEE);
  }
  for (int i = 0; i < 4; i++) {  // quarters to their rows
    const Vec a = _mm512_shuffle_f32x4(t[i], t[i + 4], 0x44), b = _mm512_shuffle_f32x4(t[i], t[i + 4], 0xEE);
    const Vec c = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0x44), d = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0xEE);
    v[i] = _mm512_shuffle_f32x4(a, c, 0x88);
    v[i + 4] = _mm512_shuffle_f32x4(a, c, 0xDD);
    v[i + 8] = _mm512_shuffle_f32x4(b, d, 0x88);
    v[i + 12] = _mm512_shuffle_f32x4(b, d, 0xDD);
  }
}

PAGEDFLASH_INLINE Vec widen(const f16*, __m256i bits) { return _mm512_cvtph_ps(bits); }
PAGEDFLASH_INLINE Vec widen(const bf16*, __m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
PAGEDFLASH_INLINE Vec widen(const i8*, __m128i bits) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bits)); }
PAGEDFLASH_INLINE Vec widen(const e5m2*, __m128i bits) {
  return _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(bits), 8));
}
// As float16 first, whose exponent has another bias: 2^8 times too small. NaN, the one magnitude of all ones, is carried over.
// e4m3 as float16, whose exponent has another bias: E4M3_SCALE times too small. The sign comes twice, as the two highest bits.
// Of these the lower one is cleared, but where the element is NaN, all ones: there the addition carries into it.
PAGEDFLASH_INLINE __m512i e4m3_to_f16(__m256i bytes) {
  const __m512i x = _mm512_slli_epi16(_mm512_cvtepi8_epi16(bytes), 7), carried = _mm512_add_epi16(x, _mm512_set1_epi16(0x80));
  return _mm512_ternarylogic_epi32(x, carried, _mm512_set1_epi16(0x4000), 0x78);  // x ^ (carried & 0x4000)
}
PAGEDFLASH_INLINE Vec widen(const e4m3*, __m128i bits) {
  const __m512i halves = e4m3_to_f16(_mm256_zextsi128_si256(bits));
  return mul(_mm512_cvtph_ps(_mm512_castsi512_si256(halves)), splat(E4M3_SCALE));
}
PAGEDFLASH_INLINE __m256i narrow(const f16*, Vec a) { return _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT); }
PAGEDFLASH_INLINE __m256i narrow(const bf16*, Vec a) {
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_blend_epi32(nan, rounded, _mm512_set1_epi32(0x7FC00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
}

PAGEDFLASH_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
PAGEDFLASH_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a); }
PAGEDFLASH_INLINE Vec load_part(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
PAGEDFLASH_INLINE void store_part(float* p, Vec a, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), a); }
template <class T>
PAGEDFLASH_INLINE Vec load(const T* p) {
  if constexpr (sizeof(T) == 1) return widen(p, _mm_loadu_si128((const __m128i*)p));
  else return widen(p, _mm256_loadu_si256((const __m256i*)p));
}
template <class T>
PAGEDFLASH_INLINE void store(T* p, Vec a) { _mm256_storeu_si256((__m256i*)p, narrow(p, a)); }
template <class T>
PAGEDFLASH_INLINE Vec load_part(const T* p, int64_t n) {
  if constexpr (sizeof(T) == 1) return widen(p, _mm_maskz_loadu_epi8(first_lanes(n), p));
  else return widen(p, _mm256_maskz_loadu_epi16(first_lanes(n), p));
}
template <class T>
PAGEDFLASH_INLINE void store_part(T* p, Vec a, int64_t n) { _mm256_mask_storeu_epi16(p, first_lanes(n), narrow(p, a)); }

struct Chunk {
  Vec a, b;
};
template <>
constexpr float CHUNK_SCALE<e4m3> = E4M3_SCALE;
template <class T>
PAGEDFLASH_INLINE Chunk load_chunk(const T* p) { return {load(p), load(p + LANES)}; }
template <class T>
PAGEDFLASH_INLINE Chunk load_chunk_part(const T* p, int64_t n) {
  return {load_part(p, n), n > LANES ? load_part(p + LANES, n - LANES) : zero()};
}
template <class T>
PAGEDFLASH_INLINE void restore_order(Chunk&) {}

PAGEDFLASH_INLINE Chunk chunk_of_halves(__m512i halves) {
  return {_mm512_cvtph_ps(_mm512_castsi512_si256(halves)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1))};
}
template <>
PAGEDFLASH_INLINE Chunk load_chunk(const e4m3* p) { return chunk_of_halves(e4m3_to_f16(_mm256_loadu_si256((const __m256i*)p))); }
template <>
PAGEDFLASH_INLINE Chunk load_chunk_part(const e4m3* p, int64_t n) {
  return chunk_of_halves(e4m3_to_f16(_mm256_maskz_loadu_epi8(first_lanes32(n), p)));
}

// bfloat16: the even and the odd elements, two instructions for 32.
PAGEDFLASH_INLINE Chunk even_and_odd(__m512i pairs) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xFFFF0000)))};
}
template <>
PAGEDFLASH_INLINE Chunk load_chunk(const bf16* p) { return even_and_odd(_mm512_loadu_si512(p)); }
template <>
PAGEDFLASH_INLINE Chunk load_chunk_part(const bf16* p, int64_t n) {
  return even_and_odd(_mm512_maskz_loadu_epi16(first_lanes32(n), p));
}
template <>
PAGEDFLASH_INLINE void restore_order<bf16>(Chunk& chunk) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  chunk = {_mm512_permutex2var_ps(chunk.a, low, chunk.b), _mm512_permutex2var_ps(chunk.a, high, chunk.b)};
}

#if defined(PAGEDFLASH_ISA_avx512bf16) || defined(PAGEDFLASH_ISA_amx)
#define PAGEDFLASH_BF16_PAIRS 1
PAGEDFLASH_INLINE Vec load_pairs(const bf16* p, int64_t n) {
  return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(first_lanes32(n), p));
}
PAGEDFLASH_INLINE Vec dot_pairs(Vec a, Vec b, Vec c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
PAGEDFLASH_INLINE void interleave_pairs(Vec v[2]) {
  // Words of v[0] have numbers from 0 on, those of v[1] from 32: i and i + 32 side by side, from i = 0, and from i = 16.
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i low = _mm512_or_si512(lanes, _mm512_slli_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(32)), 16));
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  const __m512i a = _mm512_castps_si512(v[0]), b = _mm512_castps_si512(v[1]);
  v[0] = _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, low, b));
  v[1] = _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, high, b));
}
PAGEDFLASH_INLINE Vec round_pairs(Vec low, Vec high) { return (Vec)_mm512_cvtne2ps_pbh(high, low); }
PAGEDFLASH_INLINE void store_rounded(bf16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(a));
}
#endif

}  // namespace PAGEDFLASH_ISA
}  // namespace pagedflash
