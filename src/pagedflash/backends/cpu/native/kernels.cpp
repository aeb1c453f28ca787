// The four kernels for one instruction set (see CMakeLists.txt), for the three dtypes.
#include "combine.h"
#include "decode.h"
#include "kernels.h"
#include "kv_write.h"
#include "prefill.h"

namespace pagedflash {
namespace PAGEDFLASH_ISA {
namespace {

void kv_write(const CacheWrite& write, Range tokens) {
  switch (write.dtype) {
    case FLOAT32: return kv_write_tokens<float>(write, tokens);
    case FLOAT16: return kv_write_tokens<f16>(write, tokens);
    case BFLOAT16: return kv_write_tokens<bf16>(write, tokens);
  }
}

void decode(const Plan& plan, const Task& task, void* scratch) {
  switch (plan.call->write.dtype) {
    case FLOAT32: return Decode<float>(plan, task, scratch).run();
    case FLOAT16: return Decode<f16>(plan, task, scratch).run();
    case BFLOAT16: return Decode<bf16>(plan, task, scratch).run();
  }
}

void prefill(const Plan& plan, const Task& task, void* scratch) {
  switch (plan.call->write.dtype) {
    case FLOAT32: return Prefill<float>(plan, task, scratch).run();
    case FLOAT16: return Prefill<f16>(plan, task, scratch).run();
    case BFLOAT16: return Prefill<bf16>(plan, task, scratch).run();
  }
}

void combine(const Plan& plan, Range rows) {
  switch (plan.call->write.dtype) {
    case FLOAT32: return combine_rows<float>(plan, rows);
    case FLOAT16: return combine_rows<f16>(plan, rows);
    case BFLOAT16: return combine_rows<bf16>(plan, rows);
  }
}

int64_t scratch_bytes(const AttentionCall& call) { return greater(decode_scratch_bytes(call), prefill_scratch_bytes(call)); }

}  // namespace

extern const Kernels KERNELS;
const Kernels KERNELS = {kv_write, decode, prefill, scratch_bytes, combine};

}  // namespace PAGEDFLASH_ISA
}  // namespace pagedflash
