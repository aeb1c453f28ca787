// Stackful fibers: a stack and a saved stack pointer.
#pragma once
#include "api.h"

extern "C" {
/// Save the callee-saved registers and the stack pointer to `*save`, then continue on the stack `resume`.
void metalsim_switch(void** save, void* resume);
void metalsim_fiber_start();
/// Where a fresh fiber begins; never returns.
void metalsim_fiber_main();
void* mmap(void*, unsigned long, int, int, int, long);
}

#if defined(__x86_64__)
asm(R"(
.text
.globl metalsim_switch
metalsim_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    retq
.globl metalsim_fiber_start
metalsim_fiber_start:
    xorl %ebp, %ebp
    callq metalsim_fiber_main@PLT
    ud2
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl metalsim_switch
.p2align 2
metalsim_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.globl metalsim_fiber_start
.p2align 2
metalsim_fiber_start:
    bl metalsim_fiber_main
    brk #1
)");
#else
#error "metalsim has fibers for x86-64 and arm64 only"
#endif

namespace metalsim {

constexpr int kReadWrite = 3;
constexpr int kLazyMemory = 0x4022;  // MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE: pages exist once touched
constexpr u32 kMaxThreads = 1024;
// Stacks are an odd number of cache lines apart, so that the same variable of neighbouring lanes falls into different
// cache sets.
constexpr uptr kStackStride = 128 * 1024 + 64;

/// The stacks of all threads of a threadgroup, one mapping, touched page by page as they are used.
struct Stacks {
    u8* memory = nullptr;

    void reserve() {
        if (memory) return;
        memory = static_cast<u8*>(mmap(nullptr, kMaxThreads * kStackStride, kReadWrite, kLazyMemory, -1, 0));
        if (memory == reinterpret_cast<u8*>(-1)) __builtin_trap();
    }
    u8* bottom(u32 thread) const { return memory + thread * kStackStride; }
    u8* top(u32 thread) const { return bottom(thread) + kStackStride; }

    /// Prepare a stack so that switching to the result enters metalsim_fiber_main.
    void* fresh(u32 thread) {
        *reinterpret_cast<u64*>(bottom(thread)) = kCanary;
        uptr* frame = reinterpret_cast<uptr*>(uptr(top(thread)) & ~uptr(63));
#if defined(__x86_64__)
        *--frame = 0;
        *--frame = 0;  // metalsim_fiber_start finds the stack aligned to 16 bytes
        *--frame = reinterpret_cast<uptr>(&metalsim_fiber_start);
        for (int i = 0; i < 6; ++i) *--frame = 0;
#else
        frame -= 20;
        for (int i = 0; i < 20; ++i) frame[i] = 0;
        frame[11] = reinterpret_cast<uptr>(&metalsim_fiber_start);
#endif
        return frame;
    }
    bool overflowed(u32 thread) const { return *reinterpret_cast<u64*>(bottom(thread)) != kCanary; }

  private:
    static constexpr u64 kCanary = 0x6d6574616c73696dull;
};

}  // namespace metalsim
