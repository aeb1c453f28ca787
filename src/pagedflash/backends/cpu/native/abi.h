// What crosses from Python: addresses and shapes in a fixed layout, every field 8 bytes wide, packed by ../launch.py.
//
// Together they mirror CacheWrite and AttentionCall of pagedflash/call.py, which says what the options mean.
#pragma once

#include <stdint.h>

// What is compiled once for each instruction set must not be shared between them: functions of the common headers are
// inlined always, so that no copy with the wrong instructions is linked.
#define PAGEDFLASH_INLINE inline __attribute__((always_inline))

namespace pagedflash {

enum Dtype : int64_t { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

enum Status : int64_t { DONE = 0, BAD_VALUES = 1, OUT_OF_MEMORY = 2 };

// Strides of a tensor of rows of contiguous elements, in elements.
struct Strides {
  int64_t batch;  // from sequence to sequence, or from page to page; 0 if ragged
  int64_t token;
  int64_t head;
};

// Where the tensors lie: all that differs between calls alike. Null where an option is not given (a table without columns
// may be null too).
struct WriteAddresses {
  void* k_new;
  void* v_new;
  void* k;
  void* v;
  const int32_t* lengths;          // (batch) tokens before the write, -1 = skip the sequence
  const int32_t* block_table;      // (batch, table_width)
  const int32_t* cache_batch_idx;  // (batch)
  const void* rotary_cos;          // (rotary_rows, rotary_pairs)
  const void* rotary_sin;
};

struct AttentionAddresses {
  void* q;
  void* out;   // (batch, q_tokens, q_heads, v_head_dim), or (q_tokens, q_heads, v_head_dim) if ragged
  float* lse;  // (batch, q_heads, q_tokens), or (q_heads, q_tokens) if ragged
  const int32_t* cu_seqlens_q;   // (batch + 1); null = dense queries
  const int32_t* cu_seqlens_k;   // (batch + 1)
  const int32_t* seqused_q;      // (batch)
  const int32_t* cache_leftpad;  // (batch)
  const float* alibi_slopes;     // (q_heads), or (batch, q_heads) with alibi_batch_stride
  const float* sinks;            // (q_heads)
};

struct Addresses {
  WriteAddresses write;
  AttentionAddresses attention;
};

struct WriteShape {
  Strides k_new_stride;
  Strides v_new_stride;
  Strides k_stride;
  Strides v_stride;
  int64_t rotary_rows;
  int64_t rotary_pairs;
  int64_t rotary_interleaved;
  int64_t dtype;
  int64_t batch;
  int64_t new_tokens;
  int64_t kv_heads;
  int64_t head_dim;
  int64_t v_head_dim;
  int64_t num_pages;    // pages, or rows of an unpaged cache
  int64_t page_size;    // tokens of a page, or of a row of an unpaged cache
  int64_t table_width;  // -1 = no table
};

struct AttentionOptions {
  Strides q_stride;
  int64_t alibi_batch_stride;
  int64_t q_tokens;  // of each sequence, or in all if ragged
  int64_t k_tokens;  // in all, if the keys are ragged
  int64_t q_heads;
  int64_t max_seqlen_q;
  int64_t window_left;   // -1 = unbounded
  int64_t window_right;  // -1 = unbounded
  int64_t num_splits;    // 0 = decided by plan.cpp
  double scale;
  double softcap;  // 0 = none
};

struct AttentionShape {
  WriteShape write;
  AttentionOptions attention;
};

// What the kernels read.

struct CacheWrite : WriteAddresses, WriteShape {
  PAGEDFLASH_INLINE bool paged() const { return table_width >= 0; }
  // Tokens that the cache holds for one sequence.
  PAGEDFLASH_INLINE int64_t capacity() const { return paged() ? table_width * page_size : page_size; }
};

struct AttentionCall : AttentionAddresses, AttentionOptions {
  CacheWrite write;  // the append (none if k_new is null), and where the keys lie

  PAGEDFLASH_INLINE bool ragged_keys() const { return cu_seqlens_k && !write.paged(); }
  PAGEDFLASH_INLINE int64_t group() const { return q_heads / write.kv_heads; }  // query heads of one key head
};

}  // namespace pagedflash
