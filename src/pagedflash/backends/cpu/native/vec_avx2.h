// AVX2, FMA and F16C: 16 registers of 8 floats. See vec.h.
#pragma once

#include <immintrin.h>

namespace pagedflash {
namespace PAGEDFLASH_ISA {

using Vec = __m256;
constexpr int LANES = 8;
constexpr int ACCUMULATORS = 8;
constexpr int GEMM_ROWS = 6, GEMM_VECS = 2;

PAGEDFLASH_INLINE Vec zero() { return _mm256_setzero_ps(); }
PAGEDFLASH_INLINE Vec splat(float x) { return _mm256_set1_ps(x); }
PAGEDFLASH_INLINE Vec iota() { return _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7); }
PAGEDFLASH_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
PAGEDFLASH_INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
PAGEDFLASH_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
PAGEDFLASH_INLINE Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
PAGEDFLASH_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
PAGEDFLASH_INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
PAGEDFLASH_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
PAGEDFLASH_INLINE Vec abs(Vec a) { return _mm256_andnot_ps(splat(-0.0f), a); }
PAGEDFLASH_INLINE Vec float_of_exponent(Vec a) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a), 23));
}
PAGEDFLASH_INLINE Vec select_in_range(Vec a, Vec i, Vec lo, Vec hi, Vec other) {
  const Vec inside = _mm256_and_ps(_mm256_cmp_ps(i, lo, _CMP_GE_OQ), _mm256_cmp_ps(i, hi, _CMP_LT_OQ));
  return _mm256_blendv_ps(other, a, inside);
}
PAGEDFLASH_INLINE float reduce_max(Vec a) {
  __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
}
PAGEDFLASH_INLINE float reduce_sum(Vec a) {
  __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}

// Fold pairs of registers onto each other, halving the lanes that each sum still lies in: 8 -> 4 -> 2 -> 1 registers.
PAGEDFLASH_INLINE Vec reduce_sums(const Vec v[LANES]) {
  Vec pair[4], quad[2];
  for (int i = 0; i < 4; i++)
    pair[i] = add(_mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]));
  for (int i = 0; i < 2; i++)
    quad[i] = add(_mm256_shuffle_ps(pair[2 * i], pair[2 * i + 1], 0x44),
                  _mm256_shuffle_ps(pair[2 * i], pair[2 * i + 1], 0xEE));
  return add(_mm256_permute2f128_ps(quad[0], quad[1], 0x20), _mm256_permute2f128_ps(quad[0], quad[1], 0x31));
}

PAGEDFLASH_INLINE void transpose(Vec v[LANES]) {
  Vec t[LANES];
  for (int i = 0; i < LANES; i += 4) {  // 4 x 4 inside each half
    const Vec a = _mm256_unpacklo_ps(v[i], v[i + 1]), b = _mm256_unpackhi_ps(v[i], v[i + 1]);
    const Vec c = _mm256_unpacklo_ps(v[i + 2], v[i + 3]), d = _mm256_unpackhi_ps(v[i + 2], v[i + 3]);
    t[i] = _mm256_shuffle_ps(a, c, 0x44);
    t[i + 1] = _mm256_shuffle_ps(a, c, 0xEE);
    t[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
    t[i + 3] = _mm256_shuffle_ps(b, d, 0xEE);
  }
  for (int i = 0; i < 4; i++) {
    v[i] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
    v[i + 4] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
  }
}

PAGEDFLASH_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
PAGEDFLASH_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a); }
PAGEDFLASH_INLINE Vec load(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
PAGEDFLASH_INLINE void store(f16* p, Vec a) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
PAGEDFLASH_INLINE Vec load(const bf16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
PAGEDFLASH_INLINE void store(bf16* p, Vec a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  const __m256i kept = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC00000), nan);
  const __m256i high = _mm256_srli_epi32(kept, 16);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
}
PAGEDFLASH_INLINE Vec load(const i8* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
PAGEDFLASH_INLINE Vec load(const e5m2* p) {
  return _mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i*)p)), 8));
}
// e4m3 as float16, whose exponent has another bias: E4M3_SCALE times too small. The sign comes twice, as the two highest bits.
// Of these the lower one is cleared, but where the element is NaN, all ones: there the addition carries into it.
PAGEDFLASH_INLINE __m256i e4m3_to_f16(__m128i bytes) {
  const __m256i x = _mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7), carried = _mm256_add_epi16(x, _mm256_set1_epi16(0x80));
  return _mm256_xor_si256(x, _mm256_and_si256(carried, _mm256_set1_epi16(0x4000)));
}
PAGEDFLASH_INLINE Vec load(const e4m3* p) {
  const __m256i halves = e4m3_to_f16(_mm_loadl_epi64((const __m128i*)p));
  return mul(_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), splat(E4M3_SCALE));
}
PAGEDFLASH_INLINE __m256i indices() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
PAGEDFLASH_INLINE __m256i first_lanes(int64_t n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)(n < 8 ? n : 8)), indices()); }
// The first n < 16 of 16 elements of 16 bits: pairs, and the last one if n is odd.
PAGEDFLASH_INLINE __m256i load_first_pairs(const void* p, int64_t n) {
  const __m256i pairs = _mm256_maskload_epi32(static_cast<const int*>(p), first_lanes(n / 2));
  if (n % 2 == 0) return pairs;
  const __m256i last = _mm256_set1_epi32(static_cast<const uint16_t*>(p)[n - 1]);
  return _mm256_or_si256(pairs, _mm256_and_si256(last, _mm256_cmpeq_epi32(_mm256_set1_epi32((int)(n / 2)), indices())));
}
template <class T>
PAGEDFLASH_INLINE Vec load_part(const T* p, int64_t n) {
  if (n >= LANES) return load(p);
  T part[LANES] = {};
  if constexpr (sizeof(T) == 2)
    _mm_storeu_si128((__m128i*)part, _mm256_castsi256_si128(load_first_pairs(p, n)));
  else
    for (int64_t i = 0; i < n; i++) part[i] = p[i];
  return load(part);
}
PAGEDFLASH_INLINE Vec load_part(const float* p, int64_t n) { return _mm256_maskload_ps(p, first_lanes(n)); }
template <class T>
PAGEDFLASH_INLINE void store_part(T* p, Vec a, int64_t n) {
  if (n >= LANES) return store(p, a);
  T part[LANES];
  store(part, a);
  for (int64_t i = 0; i < n; i++) p[i] = part[i];
}
PAGEDFLASH_INLINE void store_part(float* p, Vec a, int64_t n) { _mm256_maskstore_ps(p, first_lanes(n), a); }

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

PAGEDFLASH_INLINE Chunk load_halves(__m128i bytes) {
  const __m256i halves = e4m3_to_f16(bytes);
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
}
template <>
PAGEDFLASH_INLINE Chunk load_chunk(const e4m3* p) { return load_halves(_mm_loadu_si128((const __m128i*)p)); }
template <>
PAGEDFLASH_INLINE Chunk load_chunk_part(const e4m3* p, int64_t n) {
  return n > LANES ? load_chunk(p) : load_halves(_mm_loadl_epi64((const __m128i*)p));
}

// bfloat16: the even and the odd elements, two instructions for 16.
PAGEDFLASH_INLINE Chunk even_and_odd(__m256i pairs) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)),
          _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32((int)0xFFFF0000)))};
}
template <>
PAGEDFLASH_INLINE Chunk load_chunk(const bf16* p) { return even_and_odd(_mm256_loadu_si256((const __m256i*)p)); }
template <>
PAGEDFLASH_INLINE Chunk load_chunk_part(const bf16* p, int64_t n) {
  return n >= 2 * LANES ? load_chunk(p) : even_and_odd(load_first_pairs(p, n));
}
template <>
PAGEDFLASH_INLINE void restore_order<bf16>(Chunk& chunk) {
  const Vec low = _mm256_unpacklo_ps(chunk.a, chunk.b), high = _mm256_unpackhi_ps(chunk.a, chunk.b);
  chunk = {_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)};
}

}  // namespace PAGEDFLASH_ISA
}  // namespace pagedflash
