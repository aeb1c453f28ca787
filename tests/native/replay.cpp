// Runs one recorded attention problem, for processors that are only emulated here: see tests/test_cpu_arm64.py.
//
//   replay FILE      FILE holds the packed addresses and shape, then the memory the addresses lead to; outputs are written
//                    into it
//
// In the file an address is the position in the file it leads to; 0 is null.
#include <stdio.h>
#include <stdlib.h>

#include "../../src/pagedflash/backends/cpu/native/abi.h"

using namespace pagedflash;

extern "C" int64_t pagedflash_attention(const AttentionShape* shape, const AttentionAddresses* at, int64_t isa);
extern "C" void pagedflash_use_pool(void* parallel_for, void* get_num_threads);

static int32_t one_after_another(int64_t begin, int64_t end, int64_t grain, void (*run)(int64_t, int64_t, void*), void* context) {
  for (int64_t i = begin; i < end; i += grain) run(i, i + grain < end ? i + grain : end, context);
  return 0;
}

static int32_t three_threads(uint32_t* threads) {
  *threads = 3;
  return 0;
}

int main(int, char** arguments) {
  FILE* stream = fopen(arguments[1], "r+b");
  fseek(stream, 0, SEEK_END);
  const size_t size = ftell(stream);
  char* file = static_cast<char*>(malloc(size));
  rewind(stream);
  if (fread(file, 1, size, stream) != size) return 3;

  AttentionAddresses at = *reinterpret_cast<AttentionAddresses*>(file);
  char** const words = reinterpret_cast<char**>(&at);
  for (size_t i = 0; i < sizeof at / sizeof *words; i++)
    if (words[i]) words[i] = file + reinterpret_cast<intptr_t>(words[i]);

  pagedflash_use_pool(reinterpret_cast<void*>(one_after_another), reinterpret_cast<void*>(three_threads));
  const int64_t status = pagedflash_attention(reinterpret_cast<AttentionShape*>(file + sizeof at), &at, 0);
  rewind(stream);
  if (fwrite(file, 1, size, stream) != size) return 3;
  fclose(stream);
  return static_cast<int>(status);
}
