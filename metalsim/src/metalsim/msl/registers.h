// In place of the runtime, where registers are counted (registers.py): a GPU's compiler sees lanes that bring and fetch values,
// and nothing moves across a barrier.
#pragma once
#include "prelude.h"

#define METALSIM_LOCAL inline __attribute__((always_inline))

extern "C" {
__attribute__((address_space(1))) metalsim::Slot metalsim_slots[metalsim::kLanes];
__attribute__((address_space(1))) metalsim::Position metalsim_positions[metalsim::kLanes];

METALSIM_LOCAL metalsim::u32 metalsim_lane() { return __builtin_amdgcn_workitem_id_x() % metalsim::kLanes; }
METALSIM_LOCAL metalsim::Slot* metalsim_slot() {
    return (metalsim::Slot*)&metalsim_slots[metalsim_lane()];
}
METALSIM_LOCAL void metalsim_meet(metalsim::Collective, metalsim::u32, metalsim::u32) { asm volatile("" ::: "memory"); }
METALSIM_LOCAL void metalsim_barrier(metalsim::u32) { asm volatile("" ::: "memory"); }
METALSIM_LOCAL void* metalsim_threadgroup_variable(metalsim::u32 site, const char*, metalsim::u64, metalsim::u64) {
    return (void*)(__attribute__((address_space(3))) char*)((site + 1) * 4096);
}
METALSIM_LOCAL void metalsim_inactive_source(metalsim::u32, metalsim::u32, const char*) {}
METALSIM_LOCAL void metalsim_atomic(const void*, metalsim::u32, metalsim::u32) {}
}

#undef METALSIM_HOST
#define METALSIM_HOST static __attribute__((unused))

/// Kernel `n` with as many registers as it wants, and with `limit` at most. Its position differs from lane to lane.
#define METALSIM_COUNTED(n, name, ...)                                                                        \
    extern "C" __attribute__((amdgpu_kernel, amdgpu_flat_work_group_size(32, 32), __VA_ARGS__))               \
    void metalsim_##name##_##n(void* const* buffers) {                                                        \
        metalsim_kernel_##n(buffers, (metalsim::Position*)&metalsim_positions[metalsim_lane()]);              \
    }
#define METALSIM_COUNT(n, limit)                                                                              \
    METALSIM_COUNTED(n, free, used)                                                                           \
    METALSIM_COUNTED(n, limited, amdgpu_num_vgpr(limit))
