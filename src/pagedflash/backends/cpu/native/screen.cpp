#include "screen.h"

#include <stdlib.h>

namespace pagedflash {
namespace {

// Offsets start at 0, never fall, and end within `total`.
bool offsets_are_good(const int32_t* offsets, int64_t batch, int64_t total) {
  if (offsets[0] != 0 || offsets[batch] > total) return false;
  for (int64_t b = 0; b < batch; b++)
    if (offsets[b + 1] < offsets[b]) return false;
  return true;
}

bool used_is_good(const int32_t* used, const int32_t* offsets, int64_t batch, int32_t lowest) {
  for (int64_t b = 0; used && b < batch; b++)
    if (used[b] < lowest || used[b] > offsets[b + 1] - offsets[b]) return false;
  return true;
}

bool queries_are_good(const AttentionCall& call) {
  if (!call.cu_seqlens_q) return true;
  int64_t batch = call.write.batch;
  if (!offsets_are_good(call.cu_seqlens_q, batch, call.q_tokens)) return false;
  for (int64_t b = 0; b < batch; b++)
    if (call.cu_seqlens_q[b + 1] - call.cu_seqlens_q[b] > call.max_seqlen_q) return false;
  return used_is_good(call.seqused_q, call.cu_seqlens_q, batch, 0);
}

// Every entry that tokens `first` to `end` of sequence b reach is a page.
bool table_row_is_good(const CacheWrite& write, int64_t b, int64_t first, int64_t end) {
  const int32_t* row = write.block_table + b * write.table_width;
  for (int64_t column = first / write.page_size; column * write.page_size < end; column++)
    if (row[column] < 0 || row[column] >= write.num_pages) return false;
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

// No two new tokens go to one slot. Unpaged caches count as pages as long as a row.
bool slots_are_distinct(const CacheWrite& write) {
  const int64_t pages_a_sequence = write.new_tokens / write.page_size + 2;
  WrittenSlots on_stack[64];
  WrittenSlots* written = on_stack;
  if (write.batch * pages_a_sequence > 64) {
    written = static_cast<WrittenSlots*>(malloc(write.batch * pages_a_sequence * sizeof(WrittenSlots)));
    if (!written) return false;
  }
  int64_t count = 0;
  for (int64_t b = 0; b < write.batch; b++) {
    const int64_t first = write.lengths[b], end = first + write.new_tokens;
    if (first < 0) continue;
    if (!write.paged()) {
      written[count++] = {write.cache_batch_idx ? write.cache_batch_idx[b] : b, 0, write.page_size};
      continue;
    }
    const int32_t* row = write.block_table + b * write.table_width;
    for (int64_t token = first; token < end;) {
      const int64_t slot = token % write.page_size, room = write.page_size - slot;
      const int64_t here = end - token < room ? end - token : room;
      written[count++] = {row[token / write.page_size], slot, slot + here};
      token += here;
    }
  }
  qsort(written, count, sizeof(WrittenSlots), by_page_and_slot);
  bool distinct = true;
  for (int64_t i = 1; i < count; i++)
    if (written[i].page == written[i - 1].page && written[i].begin < written[i - 1].end) distinct = false;
  if (written != on_stack) free(written);
  return distinct;
}

bool lengths_fit(const CacheWrite& write, int64_t new_tokens, int64_t capacity) {
  for (int64_t b = 0; b < write.batch; b++)
    if (write.lengths[b] < -1 || (write.lengths[b] >= 0 && write.lengths[b] + new_tokens > capacity)) return false;
  return true;
}

bool rows_are_good(const CacheWrite& write) {
  for (int64_t b = 0; write.cache_batch_idx && b < write.batch; b++)
    if (write.cache_batch_idx[b] < 0 || write.cache_batch_idx[b] >= write.num_pages) return false;
  return true;
}

// cache_batch_idx names a different row for each sequence, even one that is skipped, whenever there is an append.
bool rows_are_distinct(const CacheWrite& write) {
  for (int64_t b = 1; write.cache_batch_idx && b < write.batch; b++)
    for (int64_t other = 0; other < b; other++)
      if (write.cache_batch_idx[b] == write.cache_batch_idx[other]) return false;
  return true;
}

}  // namespace

bool values_are_good(const CacheWrite& write) {
  if (!lengths_fit(write, write.new_tokens, write.capacity()) || !rows_are_good(write)) return false;
  for (int64_t b = 0; write.paged() && b < write.batch; b++)
    if (write.lengths[b] >= 0 && !table_row_is_good(write, b, write.lengths[b], write.lengths[b] + write.new_tokens))
      return false;
  return !write.new_tokens || slots_are_distinct(write);
}

bool values_are_good(const AttentionCall& call) {
  const CacheWrite& write = call.write;
  const int64_t new_tokens = write.k_new ? write.new_tokens : 0;
  if (!queries_are_good(call) || !rows_are_good(write)) return false;
  if (new_tokens && !rows_are_distinct(write)) return false;
  if (call.cu_seqlens_k) {
    if (!offsets_are_good(call.cu_seqlens_k, write.batch, call.ragged_keys() ? call.k_tokens : INT32_MAX)) return false;
    if (call.ragged_keys() && !used_is_good(write.lengths, call.cu_seqlens_k, write.batch, -1)) return false;
  }
  for (int64_t b = 0; b < write.batch; b++) {
    int64_t length = call.write.capacity();
    if (write.lengths) {
      length = write.lengths[b];
    } else if (call.cu_seqlens_k) {
      length = call.cu_seqlens_k[b + 1] - call.cu_seqlens_k[b];
    }
    if (length < -1) return false;
    if (length < 0) continue;
    if (!call.ragged_keys() && length + new_tokens > call.write.capacity()) return false;
    const int64_t first = call.cache_leftpad ? call.cache_leftpad[b] : 0;
    if (first < 0 || first > length + new_tokens) return false;
    if (write.paged() && !table_row_is_good(write, b, first < length ? first : length, length + new_tokens)) return false;
  }
  return !new_tokens || slots_are_distinct(write);
}

}  // namespace pagedflash
