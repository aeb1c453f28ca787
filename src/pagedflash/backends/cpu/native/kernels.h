// The kernels of one instruction set, as the rest of the library sees them.
#pragma once

#include "plan.h"

namespace pagedflash {

struct Kernels {
  // Writes new tokens `tokens` of total_new_tokens() into the cache.
  void (*kv_write)(const CacheWrite& write, Range tokens);
  // Attends one task. `scratch` holds what scratch_bytes(plan) says, aligned to 64 bytes.
  void (*decode)(const Plan& plan, const Task& task, void* scratch);
  void (*prefill)(const Plan& plan, const Task& task, void* scratch);
  int64_t (*scratch_bytes)(const Plan& plan);
  // Reduces the splits of rows `rows` of plan.reduced_rows. Overwrites their partials.
  void (*combine)(const Plan& plan, Range rows);

  // Writes d_q and delta of one task, and its partial d_k and d_v.
  void (*backward)(const BackwardPlan& plan, const BackwardTask& task, void* scratch);
  int64_t (*backward_scratch_bytes)(const BackwardProblem& problem);
  // Writes d_k and d_v of keys `keys` of plan.keys.
  void (*reduce_keys)(const BackwardPlan& plan, Range keys);
};

// Null if this processor lacks the instructions. Instruction sets are numbered from 0 on, the newest first.
const Kernels* kernels_of(int64_t isa);
const char* isa_name(int64_t isa);  // null behind the last
int64_t best_isa();                 // the fastest that this processor has; -1 if it has none

}  // namespace pagedflash
