// kv_write: rotary on the new keys, and each new token into its slot.
#pragma once

#include "rotary.h"

namespace pagedflash {
namespace PAGEDFLASH_ISA {

template <class T>
PAGEDFLASH_INLINE T* at(void* data, const Strides& stride, int64_t batch, int64_t token, int64_t head) {
  return static_cast<T*>(data) + batch * stride.batch + token * stride.token + head * stride.head;
}

template <class T>
void kv_write_tokens(const CacheWrite& write, Range tokens) {
  for (int64_t t = tokens.begin; t < tokens.end; t++) {
    const int64_t b = t / write.new_tokens, i = t % write.new_tokens;
    if (write.lengths[b] < 0) continue;

    const int64_t position = write.lengths[b] + i;
    int64_t page = write.cache_batch_idx ? write.cache_batch_idx[b] : b, slot = position;
    if (write.paged()) {
      page = write.block_table[b * write.table_width + position / write.page_size];
      slot = position % write.page_size;
    }
    for (int64_t head = 0; head < write.kv_heads; head++) {
      const T* k_new = at<const T>(write.k_new, write.k_new_stride, b, i, head);
      const T* v_new = at<const T>(write.v_new, write.v_new_stride, b, i, head);
      T* k = at<T>(write.k, write.k_stride, page, slot, head);
      T* v = at<T>(write.v, write.v_stride, page, slot, head);
      if (write.rotary_cos) {
        rotate_row(k, k_new, write, position);
      } else {
        memcpy(k, k_new, write.head_dim * sizeof(T));
      }
      memcpy(v, v_new, write.v_head_dim * sizeof(T));
    }
  }
}

}  // namespace PAGEDFLASH_ISA
}  // namespace pagedflash
