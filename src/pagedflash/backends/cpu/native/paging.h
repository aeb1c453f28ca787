// Where keys and values lie: paged, packed or dense.
#pragma once

#include "sequence.h"

namespace pagedflash {
namespace PAGEDFLASH_ISA {

constexpr int64_t CACHE_LINE = 64;  // bytes

// Into the second-level cache: the first is full of what is worked on.
PAGEDFLASH_INLINE void prefetch(const void* line) { __builtin_prefetch(line, 0, 2); }

// Addresses of KV head 0 of some tokens; other heads are k_stride.head, v_stride.head elements further, and their scales
// k_descale_stride.head, v_descale_stride.head. Without scales these addresses mean nothing.
struct TokenAddresses {
  const char **k, **v;
  const float **k_descale, **v_descale;

  PAGEDFLASH_INLINE TokenAddresses operator+(int64_t tokens) const {
    return {k + tokens, v + tokens, k_descale + tokens, v_descale + tokens};
  }
};

// Where one side of the cache has tokens of a page (or row), one after another.
PAGEDFLASH_INLINE void locate_in_page(const void* data, const Strides& stride, int64_t element_bytes, const float* descales,
                                      const ScaleStrides& descale_stride, int64_t sequence, int64_t page, int64_t slot,
                                      int64_t count, const char** to, const float** to_descales) {
  const char* token = static_cast<const char*>(data) + (page * stride.batch + slot * stride.token) * element_bytes;
  for (int64_t t = 0; t < count; t++) to[t] = token + t * stride.token * element_bytes;
  if (!descales) return;
  descales += sequence * descale_stride.sequence + page * descale_stride.batch + slot * descale_stride.token;
  for (int64_t t = 0; t < count; t++) to_descales[t] = descales + t * descale_stride.token;
}

// Finds `count` keys and values from `first` on. All must be keys that some query sees: entries of the block table to their
// left may be anything.
inline void locate(const AttentionProblem& problem, const Sequence& sequence, int64_t first, int64_t count,
                   const TokenAddresses& to) {
  const CacheWrite& write = problem.write;
  const int64_t b = sequence.batch, k_bytes = element_size(write.k_dtype), v_bytes = element_size(write.v_dtype);
  const auto locate_run = [&](int64_t page, int64_t slot, int64_t tokens, int64_t t) {
    locate_in_page(write.k, write.k_stride, k_bytes, write.k_descale, write.k_descale_stride, b, page, slot, tokens,
                   to.k + t, to.k_descale + t);
    locate_in_page(write.v, write.v_stride, v_bytes, write.v_descale, write.v_descale_stride, b, page, slot, tokens,
                   to.v + t, to.v_descale + t);
  };
  if (write.packed()) return locate_run(0, write.cu_seqlens_k[b] + first, count, 0);
  if (!write.paged()) return locate_run(write.cache_batch_idx ? write.cache_batch_idx[b] : b, first, count, 0);
  const int32_t* table = write.block_table + b * write.table_width;
  for (int64_t t = 0; t < count;) {
    const int64_t slot = (first + t) % write.page_size, tokens = min(count - t, write.page_size - slot);
    locate_run(table[(first + t) / write.page_size], slot, tokens, t);
    t += tokens;
  }
}

}  // namespace PAGEDFLASH_ISA
}  // namespace pagedflash
