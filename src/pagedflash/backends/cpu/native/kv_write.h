// kv_write: rotary on the new keys, and each new token into its slot.
#pragma once

#include "kv_format.h"
#include "rotary.h"

namespace pagedflash {
namespace PAGEDFLASH_ISA {

PAGEDFLASH_INLINE int64_t offset(const Strides& stride, int64_t batch, int64_t token, int64_t head) {
  return batch * stride.batch + token * stride.token + head * stride.head;
}

template <class T, class KV>
void kv_write_tokens(const CacheWrite& write, Range tokens) {
  using Element = typename KV::Element;
  for (int64_t t = tokens.begin; t < tokens.end; t++) {
    const int64_t b = t / write.num_new_tokens, i = t % write.num_new_tokens;
    if (write.seqused_k[b] < 0) continue;

    const int64_t position = write.seqused_k[b] + i;
    int64_t page = write.cache_batch_idx ? write.cache_batch_idx[b] : b, slot = position;
    if (write.paged()) {
      page = write.block_table[b * write.table_width + position / write.page_size];
      slot = position % write.page_size;
    }
    for (int64_t head = 0; head < write.kv_heads; head++) {
      const T* k_new = static_cast<const T*>(write.k_new) + offset(write.k_new_stride, b, i, head);
      const T* v_new = static_cast<const T*>(write.v_new) + offset(write.v_new_stride, b, i, head);
      Element* k = static_cast<Element*>(write.k) + offset(write.k_stride, page, slot, head);
      Element* v = static_cast<Element*>(write.v) + offset(write.v_stride, page, slot, head);
      int64_t rotated = 0;
      if (write.rotary_cos)
        rotated = rotate_row(k_new, write, position, [&](int64_t i, const float* x, int64_t n) { KV::store(k + i, x, n); });
      KV::store(k + rotated, k_new + rotated, write.head_dim - rotated);
      KV::store(v, v_new, write.v_head_dim);
    }
  }
}

}  // namespace PAGEDFLASH_ISA
}  // namespace pagedflash
