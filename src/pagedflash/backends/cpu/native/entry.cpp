// The C functions that ../launch.py calls, and torch's thread pool.
//
//   pagedflash_attention     validate -> plan -> kv_write -> decode and prefill tasks -> combine
//   pagedflash_kv_write      validate -> kv_write
//   pagedflash_backward      validate -> plan -> backward tasks -> reduce_keys
#include <stdlib.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels.h"
#include "validate.h"

#if defined(_WIN32)
#define PAGEDFLASH_EXPORT extern "C" __declspec(dllexport)
#else
#define PAGEDFLASH_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace pagedflash {
namespace {

// torch/csrc/stable/c/shim.h, since torch 2.10. Their addresses are handed in: this library links to nothing of torch.
using ParallelFunction = void (*)(int64_t begin, int64_t end, void* context);
using TorchParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, ParallelFunction, void* context);
using TorchNumThreads = int32_t (*)(uint32_t*);
TorchParallelFor torch_parallel_for = nullptr;
TorchNumThreads torch_get_num_threads = nullptr;

// Runs body(range) over parts of 0 .. count of at least `grain`, on the threads torch is set to use.
template <class Body>
void parallel(int64_t count, int64_t grain, const Body& body) {
  if (count <= grain) return body(Range{0, count});
  torch_parallel_for(
      0, count, grain,
      [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(Range{begin, end}); },
      const_cast<Body*>(&body));
}

constexpr int64_t GRAIN_BYTES = 64 << 10;  // less is not worth waking a thread for
constexpr int64_t ALIGNMENT = 64;

// A large output lies in memory that nobody has touched: thousands of page faults, or few where the system has huge pages to
// give. Only advice (as NumPy gives for its arrays); it changes no result.
void advise_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t HUGE_PAGE = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / HUGE_PAGE * HUGE_PAGE;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

void kv_write(const Kernels& kernels, const CacheWrite& write) {
  parallel(write.total_new_tokens(), GRAIN_BYTES / max<int64_t>(1, write.token_bytes()) + 1,
           [&](Range tokens) { kernels.kv_write(write, tokens); });
}

// Runs run(task, scratch) for tasks 0 .. count, each worker with so many bytes of scratch memory of its own.
template <class Run>
void run_tasks(int64_t count, int64_t workers, char* scratch, int64_t scratch_bytes, const Run& run) {
  int64_t next = 0;
  parallel(workers, 1, [&](Range mine) {
    char* my_scratch = scratch + mine.begin * scratch_bytes;
    for (;;) {
      const int64_t t = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (t >= count) return;
      run(t, my_scratch);
    }
  });
}

char* aligned(char* memory) { return memory + (ALIGNMENT - reinterpret_cast<uintptr_t>(memory) % ALIGNMENT); }

int64_t num_queries(const AttentionProblem& problem) {
  return problem.cu_seqlens_q ? problem.q_tokens : problem.write.batch_size * problem.q_tokens;
}

// Memory may run out while the cache is as it was: it is written last.
Status attention(const Kernels& kernels, const AttentionProblem& problem) {
  const CacheWrite& write = problem.write;
  uint32_t threads = 1;
  torch_get_num_threads(&threads);
  Plan plan(problem);
  if (!plan.build(threads)) return OUT_OF_MEMORY;

  const int64_t workers = min<int64_t>(threads, plan.tasks.size());
  const int64_t scratch_bytes = workers ? round_up(kernels.scratch_bytes(plan), ALIGNMENT) : 0;
  const int64_t partial_floats = plan.partial_rows * (write.v_head_dim + 1);
  char* memory = static_cast<char*>(malloc(workers * scratch_bytes + partial_floats * sizeof(float) + ALIGNMENT));
  if (!memory) return OUT_OF_MEMORY;
  char* scratch = aligned(memory);
  plan.partial_out = reinterpret_cast<float*>(scratch + workers * scratch_bytes);
  plan.partial_lse = plan.partial_out + plan.partial_rows * write.v_head_dim;

  if (write.k_new) kv_write(kernels, write);
  advise_huge_pages(problem.out, out_offset(problem, num_queries(problem), 0) * element_size(write.dtype));
  run_tasks(plan.tasks.size(), workers, scratch, scratch_bytes, [&](int64_t t, void* my_scratch) {
    const Task& task = plan.tasks[t];
    (task.kernel == DECODE ? kernels.decode : kernels.prefill)(plan, task, my_scratch);
  });
  if (plan.reduced_rows) {
    const int64_t row_bytes = plan.partial_rows / plan.reduced_rows * write.v_head_dim * sizeof(float);
    parallel(plan.reduced_rows, GRAIN_BYTES / max<int64_t>(1, row_bytes) + 1,
             [&](Range rows) { kernels.combine(plan, rows); });
  }
  free(memory);
  return OK;
}

void clear(void* memory, int64_t bytes) {
  if (!bytes) return;  // then there is no memory
  advise_huge_pages(memory, bytes);
  parallel(bytes, GRAIN_BYTES, [&](Range mine) { memset(static_cast<char*>(memory) + mine.begin, 0, mine.size()); });
}

Status backward(const Kernels& kernels, const BackwardProblem& problem) {
  const CacheWrite& write = problem.write;
  uint32_t threads = 1;
  torch_get_num_threads(&threads);
  BackwardPlan plan(problem);
  if (!plan.build()) return OUT_OF_MEMORY;

  const int64_t workers = min<int64_t>(threads, plan.tasks.size());
  const int64_t scratch_bytes = workers ? round_up(kernels.backward_scratch_bytes(problem), ALIGNMENT) : 0;
  const int64_t partial_bytes = plan.partial_keys * plan.partial_size * sizeof(float);
  char* memory = static_cast<char*>(malloc(workers * scratch_bytes + partial_bytes + ALIGNMENT));
  if (!memory) return OUT_OF_MEMORY;
  char* scratch = aligned(memory);
  plan.partials = reinterpret_cast<float*>(scratch + workers * scratch_bytes);
  advise_huge_pages(plan.partials, partial_bytes);

  const int64_t rows = num_queries(problem) * problem.q_heads;
  const int64_t keys = (write.packed() ? 1 : write.num_pages) * write.page_size * write.kv_heads;
  clear(problem.d_q, rows * write.head_dim * element_size(write.dtype));
  clear(problem.d_k, keys * write.head_dim * element_size(write.k_dtype));
  clear(problem.d_v, keys * write.v_head_dim * element_size(write.v_dtype));
  clear(problem.delta, rows * sizeof(float));
  run_tasks(plan.tasks.size(), workers, scratch, scratch_bytes,
            [&](int64_t t, void* my_scratch) { kernels.backward(plan, plan.tasks[t], my_scratch); });
  const int64_t key_bytes = write.kv_heads * plan.partial_size * sizeof(float);
  parallel(plan.keys, GRAIN_BYTES / key_bytes + 1, [&](Range mine) { kernels.reduce_keys(plan, mine); });
  free(memory);
  return OK;
}

constexpr char ABI[] =
#define STRUCT(name) #name
#define FIELD(type, name) " " #name ":" #type
#define TENSOR(type, name) " " #name
#define END "\n"
#include "abi.def"
    ;

}  // namespace
}  // namespace pagedflash

using namespace pagedflash;

// Every struct of abi.def, one a line: its name, then its fields.
PAGEDFLASH_EXPORT const char* pagedflash_abi() { return ABI; }

PAGEDFLASH_EXPORT void pagedflash_use_pool(void* parallel_for, void* get_num_threads) {
  torch_parallel_for = reinterpret_cast<TorchParallelFor>(parallel_for);
  torch_get_num_threads = reinterpret_cast<TorchNumThreads>(get_num_threads);
}

PAGEDFLASH_EXPORT const char* pagedflash_isa_name(int64_t isa) { return isa_name(isa); }
PAGEDFLASH_EXPORT int64_t pagedflash_best_isa() { return best_isa(); }
PAGEDFLASH_EXPORT int64_t pagedflash_isa_present(int64_t isa) { return kernels_of(isa) != nullptr; }

PAGEDFLASH_EXPORT int64_t pagedflash_attention(const AttentionShape* shape, const AttentionAddresses* at, int64_t isa) {
  const AttentionProblem problem(*at, *shape);
  const Status status = validate(problem);
  return status == OK ? attention(*kernels_of(isa), problem) : status;
}

PAGEDFLASH_EXPORT int64_t pagedflash_kv_write(const WriteShape* shape, const WriteAddresses* at, int64_t isa) {
  const CacheWrite write = {*at, *shape};
  const Status status = validate(write);
  if (status == OK) kv_write(*kernels_of(isa), write);
  return status;
}

PAGEDFLASH_EXPORT int64_t pagedflash_backward(const AttentionShape* shape, const BackwardAddresses* at, int64_t isa) {
  const BackwardProblem problem(*at, *shape);
  const Status status = validate(problem);
  return status == OK ? backward(*kernels_of(isa), problem) : status;
}
