// From a call to tasks: which rows of queries meet which keys, and who merges what was split.
//
// A "row" is one query of one query head. The rows of one key head are ordered query by query, the heads of its group
// together: row r is query r / group of query head kv_head * group + r % group.
//
// How keys are split does not depend on the number of threads, and every task writes to its own place: the answer is the
// same, bit for bit, whatever the number of threads and whichever thread takes which task.
#pragma once

#include <stdlib.h>

#include "abi.h"

namespace pagedflash {

constexpr int64_t PREFILL_ROWS = 192;    // most rows of a prefill task
constexpr int64_t MAX_DECODE_ROWS = 16;  // more rows than this for a key head: prefill

PAGEDFLASH_INLINE int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
PAGEDFLASH_INLINE int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }
PAGEDFLASH_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
PAGEDFLASH_INLINE int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

struct Range {
  int64_t begin, end;
  PAGEDFLASH_INLINE int64_t size() const { return end > begin ? end - begin : 0; }
};

struct Sequence {
  int64_t index;
  int64_t first_row;  // of q and out, in tokens (dense: index * q_tokens)
  int64_t queries;
  int64_t keys;      // the append included
  int64_t first_key; // cache_leftpad
  int64_t rotary_start;

  // Key position of query i: aligned to the bottom right.
  PAGEDFLASH_INLINE int64_t position(int64_t query) const { return query + keys - queries; }

  // Keys that query i sees.
  PAGEDFLASH_INLINE Range visible(const AttentionCall& call, int64_t query) const {
    const int64_t p = position(query);
    return {call.window_left < 0 ? first_key : greater(first_key, p - call.window_left),
            call.window_right < 0 ? keys : lesser(keys, p + call.window_right + 1)};
  }
  // Keys that any of the queries sees (the ranges of later queries never begin or end before those of earlier ones).
  PAGEDFLASH_INLINE Range visible(const AttentionCall& call, Range of_queries) const {
    return {visible(call, of_queries.begin).begin, visible(call, of_queries.end - 1).end};
  }
};

enum Kernel { DECODE, PREFILL };

struct Task {
  Kernel kernel;
  int64_t sequence;  // which of Plan::sequences
  Range heads;       // key heads
  Range rows;        // of each of these heads
  Range keys;
  int64_t partial_row;  // where in Plan's partials the rows of this sequence and split begin; -1: write the answer itself
};

struct Merge {
  int64_t sequence;
  int64_t splits;
  int64_t partial_row;  // of split 0; split s is s * queries * q_heads behind
  int64_t merged_row;   // rows of the merges before this one
};

// As much of a vector as is needed here: no C++ runtime is linked.
template <class T>
class Array {
 public:
  ~Array() { free(items_); }
  Array() = default;
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  bool append(const T& item) {
    if (size_ == room_) {
      const int64_t room = room_ ? 2 * room_ : 64;
      T* items = static_cast<T*>(realloc(items_, room * sizeof(T)));
      if (!items) return false;
      items_ = items;
      room_ = room;
    }
    items_[size_++] = item;
    return true;
  }
  PAGEDFLASH_INLINE int64_t size() const { return size_; }
  PAGEDFLASH_INLINE const T& operator[](int64_t i) const { return items_[i]; }

 private:
  T* items_ = nullptr;
  int64_t size_ = 0, room_ = 0;
};

struct Plan {
  const AttentionCall* call;
  Array<Sequence> sequences;
  Array<Task> tasks;
  Array<Merge> merges;
  int64_t partial_rows = 0;
  int64_t merged_rows = 0;
  float* partial_out = nullptr;  // (partial_rows, v_head_dim)
  float* partial_lse = nullptr;  // (partial_rows), base 2, sinks not counted, -inf if no key was seen

  // False if memory ran out. Rows that belong to no task are answered at once: out 0, LSE +inf.
  bool make(const AttentionCall& of_call, int64_t threads);

 private:
  bool add_decode(int64_t sequence, Range keys, int64_t chunk, int64_t head_parts);
  bool add_prefill(int64_t sequence, Range keys, int64_t chunk);
  int64_t add_merge(int64_t sequence, int64_t splits);
};

// Where query row `row` of key head `kv_head` lies in out (in elements) and in lse.
struct Place {
  int64_t query, head, out, lse;
};
PAGEDFLASH_INLINE Place place(const AttentionCall& call, const Sequence& sequence, int64_t kv_head, int64_t row) {
  const int64_t group = call.group();
  const int64_t query = row / group, head = kv_head * group + row % group;
  const int64_t out = ((sequence.first_row + query) * call.q_heads + head) * call.write.v_head_dim;
  const int64_t lse = call.cu_seqlens_q ? head * call.q_tokens + sequence.first_row + query
                                        : (sequence.index * call.q_heads + head) * call.q_tokens + query;
  return {query, head, out, lse};
}

PAGEDFLASH_INLINE int64_t element_size(int64_t dtype) { return dtype == FLOAT32 ? 4 : 2; }

}  // namespace pagedflash
