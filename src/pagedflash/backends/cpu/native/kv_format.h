// How keys and values lie in a cache: every kernel loads and stores cache elements as one of the formats of vec.h.
//
// The layer loads them: load_part (prefill), and load_chunk with restore_order (decode). Here are the dot products of decode,
// and what is stored. Elements of i8, e4m3 and e5m2 stand for element * descale. Products q.k are scaled, which keeps elements
// exact in any dtype of q; decode scales probabilities, prefill values as it packs them.
#pragma once

#include "vec.h"

namespace pagedflash {
namespace PAGEDFLASH_ISA {

// Calls run(T()) with the element type of queries, new tokens and output.
template <class Run>
PAGEDFLASH_INLINE void with_dtype(int64_t dtype, const Run& run) {
  switch (dtype) {
    case FLOAT32: return run(float());
    case FLOAT16: return run(f16());
    case BFLOAT16: return run(bf16());
  }
}

// Calls run(E()) with the element type of a cache.
template <class Run>
PAGEDFLASH_INLINE void with_format(int64_t dtype, const Run& run) {
  switch (dtype) {
    case INT8: return run(i8());
    case FLOAT8_E4M3: return run(e4m3());
    case FLOAT8_E5M2: return run(e5m2());
    default: return with_dtype(dtype, run);
  }
}

// Dot products of CHUNK elements a step: keys are widened to float as they are loaded, queries once, in the order of the keys.
template <class Q, class E>
struct DotProduct {
  using Query = Q;
  using Element = E;
  using Key = Chunk;
  template <class T>
  static PAGEDFLASH_INLINE void store_query(float* to, const T* row) {
    float chunk[CHUNK];
    convert(chunk, row, CHUNK);
    for (int i = 0; i < CHUNK; i++) to[chunk_position<E>(i)] = chunk[i];
  }
  static PAGEDFLASH_INLINE void store_query(float* to, const E* row) {
    const Chunk chunk = load_chunk(row);
    store(to, chunk.a), store(to + LANES, chunk.b);
  }
  static PAGEDFLASH_INLINE Key load_query(const float* p) { return {load(p), load(p + LANES)}; }
  static PAGEDFLASH_INLINE Key load_key(const E* p) { return load_chunk(p); }
  static PAGEDFLASH_INLINE Key load_key_part(const E* p, int64_t n) { return load_chunk_part(p, n); }
  static PAGEDFLASH_INLINE Vec dot(const Key& key, const Key& query, Vec accumulator) {
    return fma(key.b, query.b, fma(key.a, query.a, accumulator));
  }
};

#if defined(PAGEDFLASH_ISA_avx512bf16)
// Pairs of bfloat16 as they are: no conversion, products exact, accumulated in float32. Not where there is AMX: these
// processors take four times as long for VDPBF16 as for a multiply-add.
template <>
struct DotProduct<bf16, bf16> {
  using Query = bf16;
  using Element = bf16;
  using Key = Vec;
  template <class T>
  static PAGEDFLASH_INLINE void store_query(bf16* to, const T* row) { convert(to, row, CHUNK); }
  static PAGEDFLASH_INLINE Key load_query(const bf16* p) { return load_key(p); }
  static PAGEDFLASH_INLINE Key load_key(const bf16* p) { return load_key_part(p, CHUNK); }
  static PAGEDFLASH_INLINE Key load_key_part(const bf16* p, int64_t n) { return load_pairs(p, n); }
  static PAGEDFLASH_INLINE Vec dot(const Key& key, const Key& query, Vec accumulator) {
    return dot_pairs(key, query, accumulator);
  }
};
#endif

// Calls run(DotProduct()) with the dot product of queries of `dtype` and keys of `k_dtype`.
template <class Run>
PAGEDFLASH_INLINE void with_dot_product([[maybe_unused]] int64_t dtype, int64_t k_dtype, const Run& run) {
#if defined(PAGEDFLASH_ISA_avx512bf16)
  if (dtype == BFLOAT16 && k_dtype == BFLOAT16) return run(DotProduct<bf16, bf16>());
#endif
  with_format(k_dtype, [&](auto element) { run(DotProduct<float, decltype(element)>()); });
}

template <class E>
constexpr float LARGEST = 0;  // value that a quantized format stores
template <>
constexpr float LARGEST<i8> = 127;
template <>
constexpr float LARGEST<e4m3> = 448;
template <>
constexpr float LARGEST<e5m2> = 57344;

// x, which is at most LARGEST, rounded to nearest even.
PAGEDFLASH_INLINE void round_to(i8* to, float x) { to->bits = x == x ? (int8_t)nearbyintf(x) : 0; }

// A float of 8 bits: sign, exponent, mantissa.
template <int MANTISSA_BITS, int BIAS>
PAGEDFLASH_INLINE uint8_t round_to_float8(float x) {
  constexpr int DROPPED_BITS = 23 - MANTISSA_BITS;
  const uint32_t bits = bits_of_float(x), sign = bits >> 24 & 0x80, magnitude = bits & 0x7FFFFFFF;
  constexpr uint32_t LEAST_NORMAL = (uint32_t)(127 - BIAS + 1) << 23;
  if (x != x) return sign | 0x7F;
  if (magnitude < LEAST_NORMAL)  // a multiple of 2^(1 - BIAS - MANTISSA_BITS)
    return sign | (uint8_t)nearbyintf(float_of_bits(magnitude) * (float)(1 << (BIAS - 1 + MANTISSA_BITS)));
  const uint32_t odd = magnitude >> DROPPED_BITS & 1, rounded = magnitude + (1u << (DROPPED_BITS - 1)) - 1 + odd;
  return sign | ((rounded >> DROPPED_BITS) - ((127 - BIAS) << MANTISSA_BITS));
}
PAGEDFLASH_INLINE void round_to(e4m3* to, float x) { to->bits = round_to_float8<3, 7>(x); }
PAGEDFLASH_INLINE void round_to(e5m2* to, float x) { to->bits = round_to_float8<2, 15>(x); }

constexpr float SMALLEST_SCALE = 0x1p-126f;  // one below it counts as 0: what is quantized with it is 0

// The largest of `largest` and the magnitudes of some values, NaN aside.
PAGEDFLASH_INLINE float largest_of(const float* values, int64_t size, float largest) {
  for (int64_t i = 0; i < size; i++) largest = fabsf(values[i]) > largest ? fabsf(values[i]) : largest;
  return largest;
}

// The scale of a token and head: its largest magnitude becomes the largest value of the format.
template <class E>
PAGEDFLASH_INLINE float scale_of(float largest) {
  const float scale = largest / LARGEST<E>;
  return scale < SMALLEST_SCALE ? 0.0f : scale;
}

// Stores values / scale, saturating.
template <class E>
PAGEDFLASH_INLINE void quantize(E* to, const float* values, int64_t size, float scale) {
  const float reciprocal = fabsf(scale) < SMALLEST_SCALE ? 0.0f : 1.0f / scale;
  for (int64_t i = 0; i < size; i++) {
    const float x = values[i] * reciprocal;
    round_to(to + i, x > LARGEST<E> ? LARGEST<E> : x < -LARGEST<E> ? -LARGEST<E> : x);
  }
}

}  // namespace PAGEDFLASH_ISA
}  // namespace pagedflash
