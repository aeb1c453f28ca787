// Where keys and values lie: paged, packed or dense.
#pragma once

#include "sequence.h"

namespace pagedflash {
namespace PAGEDFLASH_ISA {

constexpr int64_t CACHE_LINE = 64;  // bytes

// Into the second-level cache: the first is full of what is worked on.
PAGEDFLASH_INLINE void prefetch(const void* line) { __builtin_prefetch(line, 0, 2); }

// Addresses of KV head 0 of `count` keys and values from `first` on; other heads are k_stride.head, v_stride.head further.
// All must be keys that some query sees: entries of the block table to their left may be anything.
template <class Element>
void locate(const AttentionProblem& problem, const Sequence& sequence, int64_t first, int64_t count, const Element** k,
            const Element** v) {
  const CacheWrite& write = problem.write;
  const Element *k_data = static_cast<const Element*>(write.k), *v_data = static_cast<const Element*>(write.v);
  if (!write.paged()) {
    const int64_t b = sequence.batch;
    const int64_t row = write.packed() ? 0 : write.cache_batch_idx ? write.cache_batch_idx[b] : b;
    if (write.packed()) first += write.cu_seqlens_k[b];
    k_data += row * write.k_stride.batch;
    v_data += row * write.v_stride.batch;
    for (int64_t t = 0; t < count; t++) {
      k[t] = k_data + (first + t) * write.k_stride.token;
      v[t] = v_data + (first + t) * write.v_stride.token;
    }
    return;
  }
  const int32_t* table = write.block_table + sequence.batch * write.table_width;
  int64_t column = first / write.page_size, slot = first % write.page_size;
  for (int64_t t = 0; t < count; column++, slot = 0) {
    const Element* k_page = k_data + table[column] * write.k_stride.batch;
    const Element* v_page = v_data + table[column] * write.v_stride.batch;
    for (; slot < write.page_size && t < count; slot++, t++) {
      k[t] = k_page + slot * write.k_stride.token;
      v[t] = v_page + slot * write.v_stride.token;
    }
  }
}

}  // namespace PAGEDFLASH_ISA
}  // namespace pagedflash
