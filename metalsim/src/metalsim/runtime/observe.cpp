#include "threadgroup_memory.h"
namespace metalsim {
static ThreadgroupMemory threadgroup_memory;
static Dispatch* watched;
void observe_dispatch(Dispatch* dispatch) { watched = dispatch; }
void observe_threadgroup(u32, u32) { threadgroup_memory.clear(); }
void observe_meeting(u32, u32, u32, u32, u32) {}
void observe_barrier(u32, u32) {}
void observe_end() {}
}
using namespace metalsim;
extern "C" {
void* metalsim_threadgroup_variable(u32 site, const char* name, u64 size, u64 align) {
    return threadgroup_memory.variable(watched, site, name, size, align);
}
void metalsim_inactive_source(u32, u32, const char*) {}
void metalsim_atomic(const void*, u32, u32) {}
void metalsim_fence(u32, u32) {}
}
