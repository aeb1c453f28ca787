// The kernels for one instruction set (see CMakeLists.txt), for all dtypes and formats of a cache.
#include "kernels.h"

#include "backward.h"
#include "combine.h"
#include "decode.h"
#if defined(PAGEDFLASH_ISA_amx)
#include "decode_amx.h"
#endif
#include "kv_write.h"
#include "prefill.h"

namespace pagedflash {
namespace PAGEDFLASH_ISA {
namespace {

void kv_write(const CacheWrite& write, Range tokens) {
  with_dtype(write.dtype, [&](auto element) { kv_write_tokens<decltype(element)>(write, tokens); });
}

void decode(const Plan& plan, const Task& task, void* scratch) {
#if defined(PAGEDFLASH_ISA_amx)
  if (TileDecode::takes(plan.problem.write, task)) return TileDecode(plan, task, scratch).run();
#endif
  Decode(plan, task, scratch).run();
}

void prefill(const Plan& plan, const Task& task, void* scratch) {
  with_dtype(plan.problem.write.dtype, [&](auto element) { Prefill<decltype(element)>(plan, task, scratch).run(); });
}

void combine(const Plan& plan, Range rows) {
  with_dtype(plan.problem.write.dtype, [&](auto element) { combine_rows<decltype(element)>(plan, rows); });
}

int64_t scratch_bytes(const Plan& plan) {
  const AttentionProblem& problem = plan.problem;
  int64_t bytes = 0;
  with_dtype(problem.write.dtype, [&](auto element) {
    using T = decltype(element);
    const ScratchArena nothing(nullptr);
#if defined(PAGEDFLASH_ISA_amx)
    using ForDecode = TileDecodeScratch;
#else
    using ForDecode = DecodeScratch;
#endif
    bytes = max(ForDecode(nothing, problem, problem.write.kv_heads, MAX_DECODE_ROWS).bytes,
                PrefillScratch<T>(nothing, problem, plan.prefill_rows).bytes);
  });
  return bytes;
}

void backward(const BackwardPlan& plan, const BackwardTask& task, void* scratch) {
  with_dtype(plan.problem.write.dtype, [&](auto element) { Backward<decltype(element)>(plan, task, scratch).run(); });
}

int64_t backward_scratch_bytes(const BackwardProblem& problem) {
  int64_t bytes = 0;
  with_dtype(problem.write.dtype, [&](auto element) {
    bytes = BackwardScratch<decltype(element)>(ScratchArena(nullptr), problem).bytes;
  });
  return bytes;
}

}  // namespace

extern const Kernels KERNELS;
const Kernels KERNELS = {kv_write, decode, prefill, scratch_bytes, combine, backward, backward_scratch_bytes, reduce_keys};

}  // namespace PAGEDFLASH_ISA
}  // namespace pagedflash
