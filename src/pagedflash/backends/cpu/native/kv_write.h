// kv_write: rotary on the new keys, and each new token into its slot.
#pragma once

#include "kv_format.h"
#include "rotary.h"

namespace pagedflash {
namespace PAGEDFLASH_ISA {

PAGEDFLASH_INLINE int64_t offset(const Strides& stride, int64_t batch, int64_t token, int64_t head) {
  return batch * stride.batch + token * stride.token + head * stride.head;
}
PAGEDFLASH_INLINE int64_t offset(const ScaleStrides& stride, int64_t sequence, int64_t batch, int64_t token, int64_t head) {
  return sequence * stride.sequence + batch * stride.batch + token * stride.token + head * stride.head;
}

// One new key or value, in the cache's format. A key is rotated to its position if it is not negative.
template <class T, class E>
void store_row(const CacheWrite& write, const T* row, int64_t size, int64_t position, E* to, float* descale, bool writes_descale) {
  // Calls store(i, x, n) for elements i to i + n, until all are stored: rotated ones as floats, the others as they are.
  const auto store_parts = [&](const auto& store) {
    const int64_t rotated = position >= 0 ? rotate_row(row, write, position, store) : 0;
    store(rotated, row + rotated, size - rotated);
  };
  if constexpr (LARGEST<E> > 0) {
    const auto store_floats = [&](const auto& store) {
      store_parts([&](int64_t begin, const auto* x, int64_t n) {
        constexpr int64_t PART = 128;
        float part[PART];
        for (int64_t i = 0; i < n; i += PART) {
          convert(part, x + i, min(PART, n - i));
          store(begin + i, part, min(PART, n - i));
        }
      });
    };
    if (writes_descale) {
      float largest = 0;
      store_floats([&](int64_t, const float* x, int64_t n) { largest = largest_of(x, n, largest); });
      *descale = scale_of<E>(largest);
    }
    store_floats([&](int64_t i, const float* x, int64_t n) { quantize(to + i, x, n, *descale); });
  } else {
    store_parts([&](int64_t i, const auto* x, int64_t n) { convert(to + i, x, n); });
  }
}

// A new token: its sequence, where it lies among the new tokens, and where it goes. Page -1: nowhere.
struct NewToken {
  int64_t sequence, batch, row;
  int64_t position, page, slot;
};

// The new tokens from one on, one after another.
class NewTokens {
 public:
  NewTokens(const CacheWrite& write, int64_t token) : write_(write), token_(token) {}

  NewToken next() {
    const int64_t t = token_++, n = write_.num_new_tokens;
    if (write_.slot_mapping) {
      const int64_t where = write_.slot_mapping[t];
      return {t, 0, t, where, where < 0 ? -1 : where / write_.page_size, where % write_.page_size};
    }
    if (!write_.cu_seqlens_new) return behind(t / n, t / n, t % n, t % n);
    while (b_ < write_.batch_size && write_.cu_seqlens_new[b_ + 1] <= t) b_++;
    if (b_ == write_.batch_size) return {0, 0, 0, 0, -1, 0};
    return behind(b_, 0, t, t - write_.cu_seqlens_new[b_]);
  }

 private:
  // The i-th new token of sequence b.
  NewToken behind(int64_t b, int64_t batch, int64_t row, int64_t i) const {
    if (write_.seqused_k[b] < 0) return {b, batch, row, 0, -1, 0};
    const int64_t position = write_.seqused_k[b] + i;
    if (!write_.paged()) return {b, batch, row, position, write_.cache_batch_idx ? write_.cache_batch_idx[b] : b, position};
    const int32_t* table = write_.block_table + b * write_.table_width;
    return {b, batch, row, position, table[position / write_.page_size], position % write_.page_size};
  }

  const CacheWrite& write_;
  int64_t token_, b_ = 0;
};

template <class T>
void kv_write_tokens(const CacheWrite& write, Range tokens) {
  const bool v_is_in_k = write.v_is_in_k();
  NewTokens new_tokens(write, tokens.begin);
  for (int64_t t = tokens.begin; t < tokens.end; t++) {
    const NewToken token = new_tokens.next();
    if (token.page < 0) continue;
    for (int64_t head = 0; head < write.kv_heads; head++) {
      const T* k_new = static_cast<const T*>(write.k_new) + offset(write.k_new_stride, token.batch, token.row, head);
      const T* v_new = static_cast<const T*>(write.v_new) + offset(write.v_new_stride, token.batch, token.row, head);
      const int64_t k_scale = offset(write.k_descale_stride, token.sequence, token.page, token.slot, head);
      const int64_t v_scale = offset(write.v_descale_stride, token.sequence, token.page, token.slot, head);
      with_format(write.k_dtype, [&](auto element) {
        auto* k = static_cast<decltype(element)*>(write.k) + offset(write.k_stride, token.page, token.slot, head);
        store_row(write, k_new, write.head_dim, write.rotary_cos ? token.position : -1, k, write.k_descale + k_scale,
                  write.writes_k_descale);
      });
      if (v_is_in_k) continue;
      with_format(write.v_dtype, [&](auto element) {
        auto* v = static_cast<decltype(element)*>(write.v) + offset(write.v_stride, token.page, token.slot, head);
        store_row(write, v_new, write.v_head_dim, -1, v, write.v_descale + v_scale, write.writes_v_descale);
      });
    }
  }
}

}  // namespace PAGEDFLASH_ISA
}  // namespace pagedflash
