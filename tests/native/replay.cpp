// Runs one recorded attention call, for processors that are only emulated here: see tests/test_cpu_arm64.py.
//
//   replay FILE      FILE holds the packed call, then the memory its pointers lead to; it is answered in place
//
// In the file a pointer is the position in the file it leads to; 0 is null.
#include <stdio.h>
#include <stdlib.h>

#include <initializer_list>

#include "../../src/pagedflash/backends/cpu/native/abi.h"

using namespace pagedflash;

extern "C" int64_t pagedflash_attention(const AttentionCall* call, int64_t isa);
extern "C" void pagedflash_use_pool(void* parallel_for, void* get_num_threads);

static int32_t one_after_another(int64_t begin, int64_t end, int64_t grain, void (*run)(int64_t, int64_t, void*), void* context) {
  for (int64_t i = begin; i < end; i += grain) run(i, i + grain < end ? i + grain : end, context);
  return 0;
}

static int32_t three_threads(uint32_t* threads) {
  *threads = 3;
  return 0;
}

template <class T>
static void relocate(T*& pointer, char* file) {
  if (pointer) pointer = reinterpret_cast<T*>(file + reinterpret_cast<intptr_t>(pointer));
}

int main(int, char** arguments) {
  FILE* stream = fopen(arguments[1], "r+b");
  fseek(stream, 0, SEEK_END);
  const size_t size = ftell(stream);
  char* file = static_cast<char*>(malloc(size));
  rewind(stream);
  if (fread(file, 1, size, stream) != size) return 3;

  AttentionCall call = *reinterpret_cast<AttentionCall*>(file);
  CacheWrite& write = call.write;
  for (Rows* rows : {&write.k_new, &write.v_new, &write.k, &write.v, &call.q}) relocate(rows->data, file);
  relocate(write.lengths, file);
  relocate(write.block_table, file);
  relocate(write.cache_batch_idx, file);
  relocate(write.rotary_cos, file);
  relocate(write.rotary_sin, file);
  relocate(call.out, file);
  relocate(call.lse, file);
  relocate(call.cu_seqlens_q, file);
  relocate(call.cu_seqlens_k, file);
  relocate(call.seqused_q, file);
  relocate(call.cache_leftpad, file);
  relocate(call.alibi_slopes, file);
  relocate(call.sinks, file);

  pagedflash_use_pool(reinterpret_cast<void*>(one_after_another), reinterpret_cast<void*>(three_threads));
  const int64_t status = pagedflash_attention(&call, 0);
  rewind(stream);
  if (fwrite(file, 1, size, stream) != size) return 3;
  fclose(stream);
  return static_cast<int>(status);
}
