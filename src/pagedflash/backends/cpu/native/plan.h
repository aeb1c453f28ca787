// From a problem to tasks: which packed-GQA rows meet which keys, and what is reduced over splits.
//
// How keys are split does not depend on the number of threads, and every task writes to its own place: the output is the
// same, bit for bit, whatever the number of threads and whichever thread takes which task.
#pragma once

#include <stdlib.h>

#include "sequence.h"

namespace pagedflash {

constexpr int64_t PREFILL_ROWS = 192;      // of a prefill task, if few tasks would remain; of a block in backward
constexpr int64_t MAX_PREFILL_ROWS = 768;  // most of a prefill task: keys are packed once for all of them
constexpr int64_t MAX_DECODE_ROWS = 16;    // more rows than this for a KV head: prefill

enum Kernel { DECODE, PREFILL };

struct Task {
  Kernel kernel;
  int64_t sequence;  // which of Plan::sequences
  Range kv_heads;
  Range rows;  // of each of these heads
  Range keys;
  int64_t partial_row;  // where in Plan's partials the rows of this sequence and split begin; -1: not split
};

// A sequence whose splits combine reduces.
struct Reduction {
  int64_t sequence;
  int64_t splits;
  int64_t partial_row;  // of split 0; split s is s * seqlen_q * q_heads behind
  int64_t first_row;    // rows of the reductions before this one
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
    if (size_ == allocated_) {
      const int64_t allocated = allocated_ ? 2 * allocated_ : 64;
      T* items = static_cast<T*>(realloc(items_, allocated * sizeof(T)));
      if (!items) return false;
      items_ = items;
      allocated_ = allocated;
    }
    items_[size_++] = item;
    return true;
  }
  PAGEDFLASH_INLINE int64_t size() const { return size_; }
  PAGEDFLASH_INLINE const T& operator[](int64_t i) const { return items_[i]; }
  PAGEDFLASH_INLINE T& operator[](int64_t i) { return items_[i]; }

 private:
  T* items_ = nullptr;
  int64_t size_ = 0, allocated_ = 0;
};

struct Plan {
  explicit Plan(const AttentionProblem& of) : problem(of) {}

  const AttentionProblem& problem;
  Array<Sequence> sequences;
  Array<Task> tasks;
  Array<Reduction> reductions;
  int64_t partial_rows = 0;
  int64_t reduced_rows = 0;
  int64_t prefill_rows = 0;  // most of a prefill task
  float* partial_out = nullptr;  // (partial_rows, v_head_dim)
  float* partial_lse = nullptr;  // (partial_rows), base 2, sinks not counted, -inf if no key was seen

  // False if memory ran out. Rows that belong to no task are written at once: out 0, LSE +inf.
  bool build(int64_t threads);

 private:
  bool add_decode(int64_t sequence, Range keys, int64_t split_keys, int64_t head_groups);
  bool add_prefill(int64_t sequence, Range keys, int64_t split_keys, int64_t task_rows);
  bool add_reduction(int64_t sequence, int64_t splits, int64_t* partial_row);
};

// The backward pass: a task takes some rows of a KV head, and has d_k and d_v of the keys that they see to itself: partial
// ones, which are reduced over the tasks of a head.
struct BackwardTask {
  int64_t sequence;  // which of BackwardPlan::sequences
  int64_t kv_head;
  Range rows;
  Range keys;        // that these rows see
  int64_t partial_key;  // where in BackwardPlan's partials they begin
};

struct BackwardSequence : Sequence {
  int64_t first_task;  // of KV head 0; those of the others follow
  int64_t tasks;       // of each KV head
  Range keys;          // that its rows see
  int64_t first_key;   // keys of the sequences before this one
};

struct BackwardPlan {
  explicit BackwardPlan(const BackwardProblem& of)
      : problem(of), d_v_offset(round_up(of.write.head_dim, PARTIAL_MULTIPLE)),
        partial_size(d_v_offset + round_up(of.write.v_head_dim, PARTIAL_MULTIPLE) + PARTIAL_PADDING) {}

  static constexpr int64_t PARTIAL_MULTIPLE = 32;  // at least the columns, and the rows, of a block of the matrix product
  static constexpr int64_t PARTIAL_PADDING = 16;   // partial keys should not lie a power of two apart

  const BackwardProblem& problem;
  Array<BackwardSequence> sequences;
  Array<BackwardTask> tasks;
  const int64_t d_v_offset, partial_size;  // floats of a partial key: d_k, then d_v from d_v_offset on
  int64_t partial_keys = 0, keys = 0;
  float* partials = nullptr;  // (partial_keys, partial_size)

  bool build();  // false if memory ran out
};

}  // namespace pagedflash
