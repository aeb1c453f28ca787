// NEON on arm64: 32 registers of 4 floats. See vec.h.
#pragma once

#include <arm_neon.h>

namespace pagedflash {
namespace PAGEDFLASH_ISA {

using Vec = float32x4_t;
constexpr int LANES = 4;
constexpr int ACCUMULATORS = 16;
constexpr int GEMM_ROWS = 6, GEMM_VECS = 4;

PAGEDFLASH_INLINE Vec zero() { return vdupq_n_f32(0.0f); }
PAGEDFLASH_INLINE Vec splat(float x) { return vdupq_n_f32(x); }
PAGEDFLASH_INLINE Vec iota() { return Vec{0.0f, 1.0f, 2.0f, 3.0f}; }
PAGEDFLASH_INLINE Vec add(Vec a, Vec b) { return vaddq_f32(a, b); }
PAGEDFLASH_INLINE Vec sub(Vec a, Vec b) { return vsubq_f32(a, b); }
PAGEDFLASH_INLINE Vec mul(Vec a, Vec b) { return vmulq_f32(a, b); }
PAGEDFLASH_INLINE Vec div(Vec a, Vec b) { return vdivq_f32(a, b); }
PAGEDFLASH_INLINE Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
PAGEDFLASH_INLINE Vec min(Vec a, Vec b) { return vminq_f32(a, b); }
PAGEDFLASH_INLINE Vec max(Vec a, Vec b) { return vmaxq_f32(a, b); }
PAGEDFLASH_INLINE Vec abs(Vec a) { return vabsq_f32(a); }
PAGEDFLASH_INLINE Vec float_of_exponent(Vec a) { return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(a), 23)); }
PAGEDFLASH_INLINE Vec select_in_range(Vec a, Vec i, Vec lo, Vec hi, Vec other) {
  return vbslq_f32(vandq_u32(vcgeq_f32(i, lo), vcltq_f32(i, hi)), a, other);
}
PAGEDFLASH_INLINE float reduce_max(Vec a) { return vmaxvq_f32(a); }
PAGEDFLASH_INLINE float reduce_sum(Vec a) { return vaddvq_f32(a); }
PAGEDFLASH_INLINE Vec reduce_sums(const Vec v[LANES]) { return vpaddq_f32(vpaddq_f32(v[0], v[1]), vpaddq_f32(v[2], v[3])); }
PAGEDFLASH_INLINE void transpose(Vec v[LANES]) {
  const float64x2_t a = vreinterpretq_f64_f32(vtrn1q_f32(v[0], v[1])), b = vreinterpretq_f64_f32(vtrn2q_f32(v[0], v[1]));
  const float64x2_t c = vreinterpretq_f64_f32(vtrn1q_f32(v[2], v[3])), d = vreinterpretq_f64_f32(vtrn2q_f32(v[2], v[3]));
  v[0] = vreinterpretq_f32_f64(vtrn1q_f64(a, c));
  v[1] = vreinterpretq_f32_f64(vtrn1q_f64(b, d));
  v[2] = vreinterpretq_f32_f64(vtrn2q_f64(a, c));
  v[3] = vreinterpretq_f32_f64(vtrn2q_f64(b, d));
}

PAGEDFLASH_INLINE Vec load(const float* p) { return vld1q_f32(p); }
PAGEDFLASH_INLINE void store(float* p, Vec a) { vst1q_f32(p, a); }
PAGEDFLASH_INLINE Vec load(const f16* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits))); }
PAGEDFLASH_INLINE void store(f16* p, Vec a) { vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32(a))); }
PAGEDFLASH_INLINE Vec load(const bf16* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&p->bits), 16)); }
PAGEDFLASH_INLINE void store(bf16* p, Vec a) {
  const uint32x4_t bits = vreinterpretq_u32_f32(a);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
  vst1_u16(&p->bits, vshrn_n_u32(vbslq_u32(vceqq_f32(a, a), rounded, vdupq_n_u32(0x7FC00000)), 16));
}
PAGEDFLASH_INLINE uint8x8_t load_bytes(const void* p) {  // LANES of them
  uint32_t bytes;
  memcpy(&bytes, p, 4);
  return vreinterpret_u8_u32(vdup_n_u32(bytes));
}
PAGEDFLASH_INLINE Vec load(const i8* p) {
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u8(load_bytes(p))))));
}
PAGEDFLASH_INLINE Vec load(const e5m2* p) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vshl_n_u16(vget_low_u16(vmovl_u8(load_bytes(p))), 8)));
}
// As float16 first, whose exponent has another bias: 2^8 times too small. NaN, the one magnitude of all ones, is carried over.
PAGEDFLASH_INLINE Vec load(const e4m3* p) {
  const uint16x4_t x = vget_low_u16(vmovl_u8(load_bytes(p)));
  uint16x4_t magnitude = vand_u16(vshl_n_u16(x, 7), vdup_n_u16(0x3F80));
  magnitude = vadd_u16(magnitude, vand_u16(vadd_u16(magnitude, vdup_n_u16(0x80)), vdup_n_u16(0x4000)));
  const uint16x4_t sign = vshl_n_u16(vand_u16(x, vdup_n_u16(0x80)), 8);
  return mul(vcvt_f32_f16(vreinterpret_f16_u16(vorr_u16(magnitude, sign))), splat(256.0f));
}
template <class T>
PAGEDFLASH_INLINE Vec load_part(const T* p, int64_t n) {
  if (n >= LANES) return load(p);
  T part[LANES] = {};
  for (int64_t i = 0; i < n; i++) part[i] = p[i];
  return load(part);
}
template <class T>
PAGEDFLASH_INLINE void store_part(T* p, Vec a, int64_t n) {
  if (n >= LANES) return store(p, a);
  T part[LANES];
  store(part, a);
  for (int64_t i = 0; i < n; i++) p[i] = part[i];
}

struct Chunk {
  Vec a, b;
};
template <class T>
PAGEDFLASH_INLINE Chunk load_chunk(const T* p) { return {load(p), load(p + LANES)}; }
template <class T>
PAGEDFLASH_INLINE void restore_order(Chunk&) {}

// bfloat16: the even and the odd elements, two instructions for 8.
template <>
PAGEDFLASH_INLINE Chunk load_chunk(const bf16* p) {
  const uint32x4_t pairs = vreinterpretq_u32_u16(vld1q_u16(&p->bits));
  return {vreinterpretq_f32_u32(vshlq_n_u32(pairs, 16)),
          vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xFFFF0000)))};
}
template <>
PAGEDFLASH_INLINE void restore_order<bf16>(Chunk& chunk) {
  chunk = {vzip1q_f32(chunk.a, chunk.b), vzip2q_f32(chunk.a, chunk.b)};
}
template <class T>
PAGEDFLASH_INLINE Chunk load_chunk_part(const T* p, int64_t n) {
  if (n >= 2 * LANES) return load_chunk(p);
  T part[2 * LANES] = {};
  for (int64_t i = 0; i < n; i++) part[i] = p[i];
  return load_chunk(part);
}

}  // namespace PAGEDFLASH_ISA
}  // namespace pagedflash
