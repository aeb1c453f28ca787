// The four kernels of one instruction set, as the rest of the library sees them.
#pragma once

#include "plan.h"

namespace pagedflash {

struct Kernels {
  // Writes new tokens `tokens` of batch * new_tokens into the cache.
  void (*kv_write)(const CacheWrite& write, Range tokens);
  // Attends one task. `scratch` holds what scratch_bytes(call) says, aligned to 64 bytes.
  void (*decode)(const Plan& plan, const Task& task, void* scratch);
  void (*prefill)(const Plan& plan, const Task& task, void* scratch);
  int64_t (*scratch_bytes)(const AttentionCall& call);
  // Merges rows `rows` of plan.merged_rows from the partial answers of their splits.
  void (*combine)(const Plan& plan, Range rows);
};

// Null if this processor lacks the instructions. Instruction sets are numbered from the best down: 0 .. ISA_COUNT - 1.
const Kernels* kernels_of(int64_t isa);
const char* isa_name(int64_t isa);  // null behind the last

}  // namespace pagedflash
