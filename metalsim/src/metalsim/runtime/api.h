// What compiled kernels and the runtime know of each other.
#pragma once

namespace metalsim {

typedef __UINT32_TYPE__ u32;
typedef __UINT64_TYPE__ u64;
typedef __UINT16_TYPE__ u16;
typedef __UINT8_TYPE__ u8;
typedef __UINTPTR_TYPE__ uptr;

constexpr u32 kLanes = 32;

/// What a lane brings to a simd operation, and where it finds its result.
struct alignas(64) Slot {
    u8 bytes[64];
};

/// Computes a simd operation in place for the lanes whose bit is set in `active`.
typedef void (*Collective)(Slot* slots, u32 active);

/// Kinds of meeting, for the counters and the checks.
enum Meeting : u32 { kSimd, kMatrix, kSimdgroupBarrier };

enum AtomicAccess : u32 { kAtomicLoad, kAtomicStore, kAtomicBoth };

struct Uint3 {
    u32 x, y, z;
};

/// Positions of one thread, as the kernel's attributes name them.
struct Position {
    Uint3 thread_position_in_grid, thread_position_in_threadgroup, threadgroup_position_in_grid;
    Uint3 threads_per_threadgroup, threads_per_grid, threadgroups_per_grid, dispatch_threads_per_threadgroup;
    Uint3 thread_index_in_threadgroup, thread_index_in_simdgroup, simdgroup_index_in_threadgroup;
    Uint3 simdgroups_per_threadgroup, threads_per_simdgroup, thread_execution_width;
    Uint3 dispatch_simdgroups_per_threadgroup, thread_index_in_quadgroup, quadgroup_index_in_threadgroup;
    Uint3 quadgroups_per_threadgroup;
};

typedef void (*Entry)(void* const* buffers, const Position* position);

}  // namespace metalsim

extern "C" {
/// The slot of the running lane.
metalsim::Slot* metalsim_slot();
/// Wait until every active lane of the simdgroup has come here; `compute` then runs once.
__attribute__((convergent, nomerge)) void metalsim_meet(metalsim::Collective compute, metalsim::u32 meeting, metalsim::u32 flags);
/// Wait until every thread of the threadgroup has come here.
__attribute__((convergent, nomerge)) void metalsim_barrier(metalsim::u32 flags);
/// Storage of the `site`-th threadgroup variable: shared by the threads of one threadgroup.
void* metalsim_threadgroup_variable(metalsim::u32 site, const char* name, metalsim::u64 size, metalsim::u64 align);
/// A shuffle reads from a lane that takes no part.
void metalsim_inactive_source(metalsim::u32 lane, metalsim::u32 source, const char* operation);
void metalsim_atomic(const void* address, metalsim::u32 size, metalsim::u32 access);
}
