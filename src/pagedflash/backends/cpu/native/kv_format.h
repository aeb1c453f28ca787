// How keys and values lie in a cache: every kernel loads and stores cache elements through a format.
//
// Kernels are templates over T, the dtype of q, new tokens and out, and over a format KV, which offers
//
//   Element                            what the cache holds
//   store(to, from, n)                 n new elements, of T or as floats, into the cache            (kv_write)
//   load_floats(p, n)                  the first n of LANES elements; n a multiple of 8             (prefill)
//   load_pairs(p, n)                   the same of 2 * LANES, as bfloat16; (PAGEDFLASH_BF16_PAIRS)   (prefill)
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
// Pairs of bfloat16 as they are: no conversion, products exact, accumulated in float32. Not where there is AMX: these
// processors take four times as long for VDPBF16 as for a multiply-add.
template <>
struct DotProduct<bf16> {
  using Query = bf16;
  using Key = Vec;
  static PAGEDFLASH_INLINE void store_query(Query* to, const bf16* row) { memcpy(to, row, CHUNK * sizeof(bf16)); }
  static PAGEDFLASH_INLINE Key load_query(const Query* p) { return load_key(p); }
  static PAGEDFLASH_INLINE Key load_key(const bf16* p) { return load_key_part(p, CHUNK); }
  static PAGEDFLASH_INLINE Key load_key_part(const bf16* p, int64_t n) { return load_pairs(p, n); }
  static PAGEDFLASH_INLINE Vec dot(const Key& key, const Key& query, Vec accumulator) {
    return dot_pairs(key, query, accumulator);
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
#if PAGEDFLASH_BF16_PAIRS
  static PAGEDFLASH_INLINE Vec load_pairs(const Element* p, int64_t n) { return PAGEDFLASH_ISA::load_pairs(p, n); }
#endif
  static PAGEDFLASH_INLINE Chunk load_value(const Element* p) { return load_chunk(p); }
  static PAGEDFLASH_INLINE Chunk load_value_part(const Element* p, int64_t n) {
    return n >= CHUNK ? load_chunk(p) : load_chunk_part(p, n);
  }
  static PAGEDFLASH_INLINE void restore_order(Chunk& chunk) { PAGEDFLASH_ISA::restore_order<T>(chunk); }
};

}  // namespace PAGEDFLASH_ISA
}  // namespace pagedflash
