// Any processor: registers of 4 floats as the compiler's own vector type (SSE2 on x86-64). See vec.h.
#pragma once

namespace pagedflash {
namespace PAGEDFLASH_ISA {

typedef float Vec __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
typedef uint32_t Bits __attribute__((vector_size(16)));
constexpr int LANES = 4;
constexpr int ACCUMULATORS = 8;
constexpr int GEMM_ROWS = 6, GEMM_VECS = 2;

PAGEDFLASH_INLINE Vec splat(float x) { return Vec{x, x, x, x}; }
PAGEDFLASH_INLINE Vec zero() { return splat(0.0f); }
PAGEDFLASH_INLINE Vec iota() { return Vec{0.0f, 1.0f, 2.0f, 3.0f}; }
PAGEDFLASH_INLINE Vec select(Ints mask, Vec a, Vec b) { return (Vec)((mask & (Ints)a) | (~mask & (Ints)b)); }
PAGEDFLASH_INLINE Vec add(Vec a, Vec b) { return a + b; }
PAGEDFLASH_INLINE Vec sub(Vec a, Vec b) { return a - b; }
PAGEDFLASH_INLINE Vec mul(Vec a, Vec b) { return a * b; }
PAGEDFLASH_INLINE Vec div(Vec a, Vec b) { return a / b; }
PAGEDFLASH_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
PAGEDFLASH_INLINE Vec min(Vec a, Vec b) { return select(a < b, a, b); }
PAGEDFLASH_INLINE Vec max(Vec a, Vec b) { return select(a > b, a, b); }
PAGEDFLASH_INLINE Vec abs(Vec a) { return (Vec)((Ints)a & 0x7FFFFFFF); }
PAGEDFLASH_INLINE Vec float_of_exponent(Vec a) { return (Vec)((Bits)a << 23); }
PAGEDFLASH_INLINE Vec select_in_range(Vec a, Vec i, Vec lo, Vec hi, Vec other) { return select((i >= lo) & (i < hi), a, other); }
PAGEDFLASH_INLINE float reduce_max(Vec a) {
  const float one = a[0] > a[1] ? a[0] : a[1], two = a[2] > a[3] ? a[2] : a[3];
  return one > two ? one : two;
}
PAGEDFLASH_INLINE float reduce_sum(Vec a) { return (a[0] + a[2]) + (a[1] + a[3]); }
PAGEDFLASH_INLINE void transpose(Vec v[LANES]) {
  const Vec a = v[0], b = v[1], c = v[2], d = v[3];
  for (int i = 0; i < LANES; i++) v[i] = Vec{a[i], b[i], c[i], d[i]};
}
PAGEDFLASH_INLINE Vec reduce_sums(const Vec v[LANES]) {
  Vec t[LANES] = {v[0], v[1], v[2], v[3]};
  transpose(t);
  return (t[0] + t[2]) + (t[1] + t[3]);
}

PAGEDFLASH_INLINE float widen(f16 h) {
  const uint32_t sign = (uint32_t)(h.bits & 0x8000) << 16, rest = (uint32_t)(h.bits & 0x7FFF) << 13;
  // 2^112 moves the exponent's bias from 15 to 127, subnormals included; infinity and NaN keep theirs.
  const float magnitude = rest >= 0x7C00u << 13 ? float_of_bits(rest | 0x7F800000) : float_of_bits(rest) * 0x1p112f;
  return float_of_bits(bits_of_float(magnitude) | sign);
}
PAGEDFLASH_INLINE f16 narrow_to_f16(float x) {
  const uint32_t bits = bits_of_float(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
  uint32_t half;
  if (magnitude > 0x7F800000) {
    half = 0x7E00;
  } else if (magnitude >= 0x477FF000) {  // 65520 and more round to infinity
    half = 0x7C00;
  } else if (magnitude < 0x38800000) {  // below 2^-14: adding 0.5 rounds to a multiple of 2^-24
    half = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3F000000;
  } else {
    half = (magnitude - (112u << 23) + 0xFFF + (magnitude >> 13 & 1)) >> 13;
  }
  return {(uint16_t)(sign | half)};
}
PAGEDFLASH_INLINE float widen(bf16 b) { return float_of_bits((uint32_t)b.bits << 16); }
PAGEDFLASH_INLINE float widen(i8 x) { return x.bits; }
PAGEDFLASH_INLINE float widen(e5m2 x) { return widen(f16{(uint16_t)(x.bits << 8)}); }
PAGEDFLASH_INLINE float widen(e4m3 x) {
  const uint32_t sign = (uint32_t)(x.bits & 0x80) << 24, rest = (uint32_t)(x.bits & 0x7F) << 20;
  // 2^120 moves the exponent's bias from 7 to 127, subnormals included.
  const float magnitude = (x.bits & 0x7F) == 0x7F ? float_of_bits(0x7FC00000) : float_of_bits(rest) * 0x1p120f;
  return float_of_bits(bits_of_float(magnitude) | sign);
}
PAGEDFLASH_INLINE bf16 narrow_to_bf16(float x) {
  const uint32_t bits = bits_of_float(x);
  return {(uint16_t)(x != x ? 0x7FC0 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

PAGEDFLASH_INLINE Vec load(const float* p) {
  Vec a;
  memcpy(&a, p, sizeof a);
  return a;
}
PAGEDFLASH_INLINE void store(float* p, Vec a) { memcpy(p, &a, sizeof a); }
template <class T>
PAGEDFLASH_INLINE Vec load(const T* p) { return Vec{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])}; }
PAGEDFLASH_INLINE void store(f16* p, Vec a) {
  for (int i = 0; i < LANES; i++) p[i] = narrow_to_f16(a[i]);
}
PAGEDFLASH_INLINE void store(bf16* p, Vec a) {
  for (int i = 0; i < LANES; i++) p[i] = narrow_to_bf16(a[i]);
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

// bfloat16: the even and the odd elements of a little-endian machine, two instructions for 8.
template <>
PAGEDFLASH_INLINE Chunk load_chunk(const bf16* p) {
  Bits pairs;
  memcpy(&pairs, p, sizeof pairs);
  return {(Vec)(pairs << 16), (Vec)(pairs & 0xFFFF0000)};
}
template <>
PAGEDFLASH_INLINE void restore_order<bf16>(Chunk& chunk) {
  const Vec a = chunk.a, b = chunk.b;
  chunk = {Vec{a[0], b[0], a[1], b[1]}, Vec{a[2], b[2], a[3], b[3]}};
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
