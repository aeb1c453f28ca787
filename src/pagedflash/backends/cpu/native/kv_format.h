// How keys and values lie in a cache: every kernel loads and stores cache elements through a format.
//
// Kernels are templates over T, the dtype of q, new tokens and out, and over a format KV, which offers
//
//   Element                            what the cache holds
//   store(to, from, n)                 n new elements, of T or as floats, into the cache            (kv_write)
//   load_floats(p, n)                  the first n of LANES elements; n a multiple of 8             (prefill)
//   load_value(p), load_value_part(p, n), restore_order(chunk)
//                                      CHUNK elements as floats, in the order of load_chunk         (decode, output)
//   Query, Key, store_query(to, row), load_query(p), load_key(p), load_key_part(p, n), dot(key, query, accumulator)
//                                      dot products of CHUNK elements a step                        (decode, scores)
#pragma once

#include "vec.h"

namespace pagedflash {
namespace PAGEDFLASH_ISA {

// Dot products in float: keys are widened as they are loaded, queries once.
template <class T>
struct DotProduct {
  using Query = float;
  using Key = Chunk;
  static PAGEDFLASH_INLINE void store_query(Query* to, const T* row) {
    const Chunk chunk = load_chunk(row);
    store(to, chunk.a);
    store(to + LANES, chunk.b);
  }
  static PAGEDFLASH_INLINE Key load_query(const Query* p) { return {load(p), load(p + LANES)}; }
  static PAGEDFLASH_INLINE Key load_key(const T* p) { return load_chunk(p); }
  static PAGEDFLASH_INLINE Key load_key_part(const T* p, int64_t n) { return load_chunk_part(p, n); }
  static PAGEDFLASH_INLINE Vec dot(const Key& key, const Key& query, Vec accumulator) {
    return fma(key.b, query.b, fma(key.a, query.a, accumulator));
  }
};

#if defined(PAGEDFLASH_ISA_avx512bf16)
// VDPBF16 multiplies pairs of bfloat16 as they are: no conversion, products exact, accumulated in float32.
template <>
struct DotProduct<bf16> {
  using Query = bf16;
  using Key = __m512bh;
  static PAGEDFLASH_INLINE void store_query(Query* to, const bf16* row) { memcpy(to, row, CHUNK * sizeof(bf16)); }
  static PAGEDFLASH_INLINE Key load_query(const Query* p) { return load_key(p); }
  static PAGEDFLASH_INLINE Key load_key(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static PAGEDFLASH_INLINE Key load_key_part(const bf16* p, int64_t n) {
    return (__m512bh)_mm512_maskz_loadu_epi16(first_lanes32(n), p);
  }
  static PAGEDFLASH_INLINE Vec dot(const Key& key, const Key& query, Vec accumulator) {
    return _mm512_dpbf16_ps(accumulator, key, query);
  }
};
#endif

// A cache in the dtype of the queries.
template <class T>
struct KVFormat : DotProduct<T> {
  using Element = T;
  static PAGEDFLASH_INLINE void store(Element* to, const T* from, int64_t n) { memcpy(to, from, n * sizeof(T)); }
  template <class Float>
  static PAGEDFLASH_INLINE void store(Element* to, const Float* from, int64_t n) { convert(to, from, n); }
  static PAGEDFLASH_INLINE Vec load_floats(const Element* p, int64_t n) { return load_part(p, n); }
  static PAGEDFLASH_INLINE Chunk load_value(const Element* p) { return load_chunk(p); }
  static PAGEDFLASH_INLINE Chunk load_value_part(const Element* p, int64_t n) {
    return n >= CHUNK ? load_chunk(p) : load_chunk_part(p, n);
  }
  static PAGEDFLASH_INLINE void restore_order(Chunk& chunk) { PAGEDFLASH_ISA::restore_order<T>(chunk); }
};

}  // namespace PAGEDFLASH_ISA
}  // namespace pagedflash
