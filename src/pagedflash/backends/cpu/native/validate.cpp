#include "validate.h"

#include <stdlib.h>

#include "sequence.h"

namespace pagedflash {
namespace {

// Offsets start at 0, never fall, and end within `total`.
bool offsets_are_valid(const int32_t* offsets, int64_t batch_size, int64_t total) {
  if (offsets[0] != 0 || offsets[batch_size] > total) return false;
  for (int64_t b = 0; b < batch_size; b++)
    if (offsets[b + 1] < offsets[b]) return false;
  return true;
}

bool used_is_valid(const int32_t* used, const int32_t* offsets, int64_t batch_size, int32_t lowest) {
  for (int64_t b = 0; used && b < batch_size; b++)
    if (used[b] < lowest || used[b] > offsets[b + 1] - offsets[b]) return false;
  return true;
}

bool queries_are_valid(const AttentionProblem& problem) {
  if (!problem.cu_seqlens_q) return true;
  const int64_t batch_size = problem.write.batch_size;
  if (!offsets_are_valid(problem.cu_seqlens_q, batch_size, problem.q_tokens)) return false;
  for (int64_t b = 0; b < batch_size; b++)
    if (problem.cu_seqlens_q[b + 1] - problem.cu_seqlens_q[b] > problem.max_seqlen_q) return false;
  return used_is_valid(problem.seqused_q, problem.cu_seqlens_q, batch_size, 0);
}

bool new_tokens_are_valid(const CacheWrite& write) {
  return !write.cu_seqlens_new || offsets_are_valid(write.cu_seqlens_new, write.batch_size, write.num_new_tokens);
}

bool packed_keys_are_valid(const CacheWrite& write) {
  if (!write.cu_seqlens_k) return true;
  const int64_t total = write.packed() ? write.page_size : INT32_MAX;
  if (!offsets_are_valid(write.cu_seqlens_k, write.batch_size, total)) return false;
  return !write.packed() || used_is_valid(write.seqused_k, write.cu_seqlens_k, write.batch_size, -1);
}

// Every entry that tokens `first` to `end` of a sequence lie in is a page.
bool table_row_is_valid(const CacheWrite& write, int64_t batch, int64_t first, int64_t end) {
  const int32_t* row = write.block_table + batch * write.table_width;
  if (first >= end) return true;
  for (int64_t column = first / write.page_size; column * write.page_size < end; column++)
    if (row[column] < 0 || row[column] >= write.num_pages) return false;
  return true;
}

bool sequence_is_valid(const AttentionProblem& problem, int64_t b) {
  const CacheWrite& write = problem.write;
  const Sequence sequence = sequence_of(problem, b);
  if (sequence.seqused_k < 0) return sequence.seqused_k == -1;
  if (!write.packed() && sequence.seqlen_k > write.capacity()) return false;
  if (sequence.leftpad < 0 || sequence.leftpad > sequence.seqlen_k) return false;
  const bool rotates = write.rotary_cos && sequence.seqlen_q;
  if (rotates && problem.rotary_position(sequence.seqused_k, sequence.seqlen_q - 1) >= write.rotary_rows) return false;
  if (!write.paged()) return true;
  // All keys from the first that is read or written on are; those in front of a window may have lost their pages.
  int64_t first = sequence.seqused_k;
  if (sequence.seqlen_q) first = min(first, sequence.kv_range(problem, 0).begin);
  return table_row_is_valid(write, b, first, sequence.seqlen_k);
}

// cache_batch_idx names rows of the cache.
bool rows_are_valid(const CacheWrite& write) {
  for (int64_t b = 0; write.cache_batch_idx && b < write.batch_size; b++)
    if (write.cache_batch_idx[b] < 0 || write.cache_batch_idx[b] >= write.num_pages) return false;
  return true;
}

// cache_batch_idx names a different row for each sequence, even one that is skipped, whenever there is an append.
bool rows_are_distinct(const CacheWrite& write) {
  for (int64_t b = 1; write.cache_batch_idx && b < write.batch_size; b++)
    for (int64_t other = 0; other < b; other++)
      if (write.cache_batch_idx[b] == write.cache_batch_idx[other]) return false;
  return true;
}

// Slots `begin` to `end` of one page, about to be written.
struct WrittenSlots {
  int64_t page, begin, end;
};

int by_page_and_slot(const void* a, const void* b) {
  const WrittenSlots& one = *static_cast<const WrittenSlots*>(a);
  const WrittenSlots& two = *static_cast<const WrittenSlots*>(b);
  if (one.page != two.page) return one.page < two.page ? -1 : 1;
  return one.begin < two.begin ? -1 : one.begin > two.begin;
}

// No two new tokens go to one slot. Rows of a dense cache count as pages.
Status validate_slots(const CacheWrite& write) {
  constexpr int64_t ON_STACK = 64;
  WrittenSlots on_stack[ON_STACK], *written = on_stack;
  const int64_t most = write.slot_mapping ? write.num_new_tokens : 2 * write.batch_size + write.total_new_tokens() / write.page_size;
  if (most > ON_STACK) {
    written = static_cast<WrittenSlots*>(malloc(most * sizeof(WrittenSlots)));
    if (!written) return OUT_OF_MEMORY;
  }
  int64_t count = 0;
  for (int64_t t = 0; write.slot_mapping && t < write.num_new_tokens; t++) {
    const int64_t slot = write.slot_mapping[t];
    if (slot >= 0) written[count++] = {0, slot, slot + 1};
  }
  for (int64_t b = 0; !write.slot_mapping && b < write.batch_size; b++) {
    const int64_t first = write.seqused_k[b], end = first + write.new_tokens_of(b);
    if (first < 0) continue;
    if (!write.paged()) {
      written[count++] = {write.cache_batch_idx ? write.cache_batch_idx[b] : b, 0, write.page_size};
      continue;
    }
    const int32_t* row = write.block_table + b * write.table_width;
    for (int64_t token = first; token < end;) {
      const int64_t slot = token % write.page_size, tokens = min(end - token, write.page_size - slot);
      written[count++] = {row[token / write.page_size], slot, slot + tokens};
      token += tokens;
    }
  }
  qsort(written, count, sizeof(WrittenSlots), by_page_and_slot);
  Status status = OK;
  for (int64_t i = 1; i < count; i++)
    if (written[i].page == written[i - 1].page && written[i].begin < written[i - 1].end) status = INVALID_VALUES;
  if (written != on_stack) free(written);
  return status;
}

}  // namespace

Status validate(const CacheWrite& write) {
  for (int64_t t = 0; write.slot_mapping && t < write.num_new_tokens; t++)
    if (write.slot_mapping[t] < -1 || write.slot_mapping[t] >= write.num_pages * write.page_size) return INVALID_VALUES;
  if (write.slot_mapping) return validate_slots(write);
  if (!rows_are_valid(write) || !new_tokens_are_valid(write)) return INVALID_VALUES;
  for (int64_t b = 0; b < write.batch_size; b++) {
    const int64_t first = write.seqused_k[b], end = first + write.new_tokens_of(b);
    if (first < -1 || (first >= 0 && end > write.capacity())) return INVALID_VALUES;
    if (write.paged() && first >= 0 && !table_row_is_valid(write, b, first, end)) return INVALID_VALUES;
  }
  return write.num_new_tokens ? validate_slots(write) : OK;
}

Status validate(const AttentionProblem& problem) {
  const CacheWrite& write = problem.write;
  const bool appends = write.k_new && write.num_new_tokens;
  if (!queries_are_valid(problem) || !packed_keys_are_valid(write) || !rows_are_valid(write)) return INVALID_VALUES;
  if (!new_tokens_are_valid(write)) return INVALID_VALUES;
  if (appends && !rows_are_distinct(write)) return INVALID_VALUES;
  for (int64_t b = 0; b < write.batch_size; b++)
    if (!sequence_is_valid(problem, b)) return INVALID_VALUES;
  return appends ? validate_slots(write) : OK;
}

}  // namespace pagedflash
