// Scratch memory of a task.
#pragma once

#include "arithmetic.h"

namespace pagedflash {
namespace PAGEDFLASH_ISA {

// Hands out arrays of a task's scratch memory, aligned to 64 bytes. Over null memory it only measures.
class ScratchArena {
 public:
  explicit ScratchArena(void* memory) : memory_(reinterpret_cast<uintptr_t>(memory)) {}
  template <class T>
  T* allocate(int64_t count) {
    T* array = reinterpret_cast<T*>(memory_ + used_);
    used_ += round_up(count * sizeof(T), 64);
    return array;
  }
  int64_t used() const { return used_; }

 private:
  const uintptr_t memory_;
  int64_t used_ = 0;
};

}  // namespace PAGEDFLASH_ISA
}  // namespace pagedflash
