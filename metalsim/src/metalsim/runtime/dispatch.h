// One dispatch, as Python fills it in (launch.py mirrors these structures), and what the scheduler tells the checks.
#pragma once
#include "api.h"

extern "C" {
void* malloc(unsigned long);
void free(void*);
void* memset(void*, int, unsigned long);
void* memcpy(void*, const void*, unsigned long);
void* memmove(void*, const void*, unsigned long);
int snprintf(char*, unsigned long, const char*, ...);
int vsnprintf(char*, unsigned long, const char*, __builtin_va_list);
}

namespace metalsim {

enum Order : u32 { kForward, kReverse, kRandom };

/// Memory that buffers reach: what lies in [begin, end) may be accessed.
struct Region {
    u8 *begin, *end;
    const char* name;
    u32 constant;        // numbers that the host passed: neither counted nor written
    u32 written;         // out: the kernel stores into it
    struct Cell* cells;  // the runtime's record of accesses, one for each byte
};

/// What one dispatch cost. Python reads them by position: launch.py names the same fields in the same order.
struct Counters {
    u64 device_bytes_loaded, device_bytes_stored;                // summed over lanes
    u64 unique_bytes_loaded, unique_bytes_stored;                // distinct bytes of each simdgroup instruction
    u64 load_transactions, store_transactions;                   // 128-byte lines touched by each instruction
    u64 load_instructions, store_instructions;                   // device accesses, per simdgroup
    u64 threadgroup_bytes_loaded, threadgroup_bytes_stored;      // summed over lanes
    u64 simd_operations, matrix_operations, matrix_multiplies;   // per simdgroup
    u64 simdgroup_barriers, threadgroup_barriers;                // per simdgroup, per threadgroup
    u64 atomic_operations;                                       // summed over lanes
    u64 threadgroups, simdgroups, threads;
};

struct Dispatch {
    Entry entry;
    void* buffers[31];
    Uint3 threads_per_grid, threads_per_threadgroup, threadgroups_per_grid;
    u32 order, checked;
    u64 seed;
    Region* regions;
    u64 region_count;
    u64 threadgroup_bytes;  // out: the threadgroup memory that the kernel declares
    Counters counters;
    u64 site;  // out: where in the library the failure is, 0 when unknown
    u32 failed;
    char message[1020];

    void fail(const char* format, ...) __attribute__((format(printf, 2, 3))) {
        if (failed) return;
        failed = 1;
        __builtin_va_list arguments;
        __builtin_va_start(arguments, format);
        vsnprintf(message, sizeof message, format, arguments);
        __builtin_va_end(arguments);
    }
};

/// A thread, in words.
struct Words {
    char text[160];
    explicit Words(const Position& p) {
        auto g = p.threadgroup_position_in_grid;
        auto t = p.thread_position_in_threadgroup;
        snprintf(text, sizeof text, "thread (%u, %u, %u) of threadgroup (%u, %u, %u) [simdgroup %u, lane %u]", t.x, t.y,
                 t.z, g.x, g.y, g.z, p.simdgroup_index_in_threadgroup.x, p.thread_index_in_simdgroup.x);
    }
};

// From the scheduler.
const Position* running_position();
const Position* position_of(u32 thread);
u32 running_thread();
/// Whether an address lies on a thread's stack or in the runtime itself.
bool is_private(uptr address);
[[noreturn]] void abandon();

// To the checks.
void observe_dispatch(Dispatch* dispatch);
void observe_threadgroup(u32 threads, u32 simdgroups);
void observe_meeting(u32 simdgroup, u32 active, u32 existing, u32 kind, u32 flags);
void observe_barrier(u32 flags);
/// The lanes of the running simdgroup have all stopped, at a barrier or their end.
void observe_simdgroup_stops();
void observe_end();

}  // namespace metalsim
