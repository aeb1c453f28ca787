// kv_write: rotary on the new keys, and each new token into its slot.
#pragma once

#include "rotary.h"

namespace pagedflash {
namespace PAGEDFLASH_ISA {

template <class T>
void kv_write_tokens(const CacheWrite& write, Range tokens) {
  for (int64_t t = tokens.begin; t < tokens.end; t++) {
    const int64_t b = t / write.new_tokens, i = t % write.new_tokens;
    if (write.lengths[b] < 0) continue;

    const int64_t position = write.lengths[b] + i;
    int64_t page = write.cache_batch_idx ? write.cache_batch_idx[b] : b, slot = position;
    if (write.block_table) {
      page = write.block_table[b * write.table_width + position / write.page_size];
      slot = position % write.page_size;
    }
    for (int64_t head = 0; head < write.kv_heads; head++) {
      const T* k_new = static_cast<const T*>(write.k_new.data) + b * write.k_new.batch + i * write.k_new.token + head * write.k_new.head;
      const T* v_new = static_cast<const T*>(write.v_new.data) + b * write.v_new.batch + i * write.v_new.token + head * write.v_new.head;
      T* k = static_cast<T*>(write.k.data) + page * write.k.batch + slot * write.k.token + head * write.k.head;
      T* v = static_cast<T*>(write.v.data) + page * write.v.batch + slot * write.v.token + head * write.v.head;
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
