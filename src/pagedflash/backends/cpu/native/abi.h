// The problem as the kernels see it: CacheWrite and AttentionProblem, of pagedflash/problem.py, as structs.
#pragma once

#include <stdint.h>

// What is compiled once for each instruction set must not be shared between them: functions of the common headers are
// inlined always, so that no copy with the wrong instructions is linked.
#define PAGEDFLASH_INLINE inline __attribute__((always_inline))

namespace pagedflash {

enum Dtype : int64_t { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2, INT8 = 3, FLOAT8_E4M3 = 4, FLOAT8_E5M2 = 5 };

PAGEDFLASH_INLINE int64_t element_size(int64_t dtype) { return dtype == FLOAT32 ? 4 : dtype <= BFLOAT16 ? 2 : 1; }

enum Status : int64_t { OK = 0, INVALID_VALUES = 1, OUT_OF_MEMORY = 2 };

#define STRUCT(name) struct name {
#define FIELD(type, name) type name;
#define TENSOR(type, name) type* name;
#define END };
#include "abi.def"

struct CacheWrite : WriteAddresses, WriteShape {
  PAGEDFLASH_INLINE bool paged() const { return table_width >= 0; }
  PAGEDFLASH_INLINE bool packed() const { return cu_seqlens_k && !paged(); }
  // Whether new tokens are packed: those of one sequence behind those of another, or each a sequence of its own.
  PAGEDFLASH_INLINE bool appends_packed() const { return cu_seqlens_new || slot_mapping; }
  PAGEDFLASH_INLINE int64_t total_new_tokens() const { return appends_packed() ? num_new_tokens : batch_size * num_new_tokens; }
  // New tokens of a sequence.
  PAGEDFLASH_INLINE int64_t new_tokens_of(int64_t b) const {
    return cu_seqlens_new ? cu_seqlens_new[b + 1] - cu_seqlens_new[b] : num_new_tokens;
  }
  // Tokens that the cache holds for one sequence.
  PAGEDFLASH_INLINE int64_t capacity() const { return paged() ? table_width * page_size : page_size; }
  // Each value is the first part of its key, in the same memory, as in MLA: an append writes keys only.
  PAGEDFLASH_INLINE bool v_is_in_k() const {
    return v == k && v_dtype == k_dtype && v_head_dim <= head_dim && v_stride.batch == k_stride.batch &&
           v_stride.token == k_stride.token && v_stride.head == k_stride.head;
  }
  // Bytes of a token in the cache.
  PAGEDFLASH_INLINE int64_t token_bytes() const {
    const int64_t v_bytes = v_is_in_k() ? 0 : v_head_dim * element_size(v_dtype);
    return kv_heads * (head_dim * element_size(k_dtype) + v_bytes);
  }
};

struct AttentionProblem : QueryAddresses, ScoreAddresses, OutputAddresses, QueryShape, ScoreParams {
  CacheWrite write;  // where the keys lie, and the append
  int64_t alibi_batch_stride, num_splits;

  AttentionProblem(const AttentionAddresses& at, const AttentionShape& shape)
      : QueryAddresses(at.queries), ScoreAddresses(at.scores), OutputAddresses(at.outputs), QueryShape(shape.queries),
        ScoreParams(shape.scores), write{at.write, shape.write}, alibi_batch_stride(shape.alibi_batch_stride),
        num_splits(shape.num_splits) {}

  PAGEDFLASH_INLINE int64_t group() const { return q_heads / write.kv_heads; }  // query heads of a KV head
  // Of a query behind `seqused_k` keys. Causal or windowed, each rotates by its own position; else all rotate by the first.
  PAGEDFLASH_INLINE int64_t rotary_position(int64_t seqused_k, int64_t query) const {
    return window_left >= 0 || window_right >= 0 ? seqused_k + query : seqused_k;
  }
};

struct BackwardProblem : AttentionProblem, GradientAddresses {
  BackwardProblem(const BackwardAddresses& at, const AttentionShape& shape)
      : AttentionProblem(at.attention, shape), GradientAddresses(at.gradients) {}
};

}  // namespace pagedflash
