// One sequence of a problem: its lengths, the keys that its queries see, and where its outputs go.
//
// All query heads of a KV head meet its keys together, as packed-GQA rows: row r of KV head h is query r / group of query head
// h * group + r % group.
#pragma once

#include <math.h>
#include <string.h>

#include "arithmetic.h"

namespace pagedflash {

struct Sequence {
  int64_t batch;      // its index
  int64_t q_begin;    // its first query, in tokens of q and out (dense: batch * q_tokens)
  int64_t seqlen_q;
  int64_t seqused_k;  // keys before the append; -1 = skip the sequence
  int64_t seqlen_k;   // keys with the append
  int64_t leftpad;    // its first valid key

  // Position of a query among the keys: the last query is aligned with the last key.
  PAGEDFLASH_INLINE int64_t position(int64_t query) const { return query + seqlen_k - seqlen_q; }

  // Keys that a query sees.
  PAGEDFLASH_INLINE Range kv_range(const AttentionProblem& problem, int64_t query) const {
    const int64_t p = position(query);
    return {problem.window_left < 0 ? leftpad : max(leftpad, p - problem.window_left),
            problem.window_right < 0 ? seqlen_k : min(seqlen_k, p + problem.window_right + 1)};
  }
  // Keys that any of the queries sees: ranges of later queries never begin or end before those of earlier ones.
  PAGEDFLASH_INLINE Range kv_range(const AttentionProblem& problem, Range queries) const {
    return {kv_range(problem, queries.begin).begin, kv_range(problem, queries.end - 1).end};
  }
};

PAGEDFLASH_INLINE Sequence sequence_of(const AttentionProblem& problem, int64_t b) {
  const CacheWrite& write = problem.write;
  Sequence sequence;
  sequence.batch = b;
  if (problem.cu_seqlens_q) {
    sequence.q_begin = problem.cu_seqlens_q[b];
    sequence.seqlen_q = problem.seqused_q ? problem.seqused_q[b] : problem.cu_seqlens_q[b + 1] - sequence.q_begin;
  } else {
    sequence.q_begin = b * problem.q_tokens;
    sequence.seqlen_q = problem.q_tokens;
  }
  if (write.seqused_k) {
    sequence.seqused_k = write.seqused_k[b];
  } else if (write.cu_seqlens_k) {
    sequence.seqused_k = write.cu_seqlens_k[b + 1] - write.cu_seqlens_k[b];
  } else {
    sequence.seqused_k = write.capacity();
  }
  sequence.seqlen_k = sequence.seqused_k;
  if (write.k_new && sequence.seqused_k >= 0) sequence.seqlen_k += write.new_tokens_of(b);
  sequence.leftpad = write.cache_leftpad ? write.cache_leftpad[b] : 0;
  return sequence;
}

// Where the row of query token `token` (of all sequences) and query head `head` lies in out and in lse, in elements.
PAGEDFLASH_INLINE int64_t out_offset(const AttentionProblem& problem, int64_t token, int64_t head) {
  return (token * problem.q_heads + head) * problem.write.v_head_dim;
}
PAGEDFLASH_INLINE int64_t lse_offset(const AttentionProblem& problem, int64_t batch, int64_t token, int64_t head) {
  if (problem.cu_seqlens_q) return head * problem.q_tokens + token;
  return (batch * problem.q_heads + head) * problem.q_tokens + token - batch * problem.q_tokens;
}

PAGEDFLASH_INLINE void write_lse(const AttentionProblem& problem, int64_t batch, int64_t token, int64_t head, float lse) {
  if (problem.lse) problem.lse[lse_offset(problem, batch, token, head)] = lse;
}

// The output of a row that sees no key.
PAGEDFLASH_INLINE void write_empty_row(const AttentionProblem& problem, int64_t batch, int64_t token, int64_t head) {
  const int64_t size = element_size(problem.write.dtype);
  memset(static_cast<char*>(problem.out) + out_offset(problem, token, head) * size, 0, problem.write.v_head_dim * size);
  write_lse(problem, batch, token, head, INFINITY);
}

}  // namespace pagedflash
