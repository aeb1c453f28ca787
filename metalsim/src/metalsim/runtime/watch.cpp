// What a checked run sees: every access to device and threadgroup memory, every meeting and barrier.
// An unchecked run passes through here only for its threadgroup variables.
#include "coalescer.h"
#include "fiber.h"
#include "shadow.h"
#include "threadgroup_memory.h"

extern "C" {
struct SharedObject {
    const char* file;
    void* base;
    const char* symbol;
    void* symbol_address;
};
int dladdr(const void*, SharedObject*);
int munmap(void*, unsigned long);
}

namespace metalsim {

enum AccessFlags : u32 { kStore = 1, kAnyAlignment = 2 };
enum MemoryFlags : u32 { kDeviceMemory = 1, kThreadgroupMemory = 2 };  // metal::mem_flags

/// A threadgroup variable, in words.
struct Name {
    char text[96];
    explicit Name(const char* variable) { snprintf(text, sizeof text, "threadgroup variable '%s'", variable); }
};

struct Watch {
    Dispatch* dispatch = nullptr;
    ThreadgroupMemory threadgroup_memory;
    Cell threadgroup_cells[sizeof(ThreadgroupMemory::memory)];
    RaceDetector threadgroup_races, device_races;
    Coalescer coalescer;  // the running simdgroup's accesses since it last met
    u32 now = 1;
    void* image = nullptr;  // the kernel's shared object: its constant tables may be read

    bool checked() const { return dispatch->checked; }
    Counters& counters() { return dispatch->counters; }

    u32 running_group() const {
        const Position& p = *running_position();
        const Uint3 n = p.threadgroups_per_grid, g = p.threadgroup_position_in_grid;
        return (g.z * n.y + g.y) * n.x + g.x;
    }

    // -- accesses ---------------------------------------------------------------------------------------------------

    void access(uptr address, u64 size, u32 flags, uptr site) {
        if (is_private(address)) return;
        if (threadgroup_memory.contains(address))
            access_threadgroup(address, size, flags, site);
        else
            access_device(address, size, flags, site);
    }

    const char* verb(u32 flags) const { return flags & kStore ? "store" : "load"; }

    void access_threadgroup(uptr address, u64 size, u32 flags, uptr site) {
        const auto* variable = threadgroup_memory.at(address);
        if (!variable || address + size > uptr(variable->begin) + variable->size) {
            const auto* nearest = threadgroup_memory.nearest(address);
            if (!nearest) report(site, "%s of %llu bytes of threadgroup memory that is not declared", verb(flags), ull(size));
            report(site, "out-of-bounds %s of %llu bytes at byte %lld of %s, which has %llu bytes", verb(flags), ull(size),
                   sll(address - uptr(nearest->begin)), Name(nearest->name).text, ull(nearest->size));
        }
        u64 offset = address - uptr(variable->begin);
        if (misaligned(address, size, flags)) report_misaligned(size, flags, site, Name(variable->name).text, offset);
        (flags & kStore ? counters().threadgroup_bytes_stored : counters().threadgroup_bytes_loaded) += size;
        u32 thread = number_of(running_group(), running_thread());
        Cell* cells = threadgroup_cells + (address - uptr(threadgroup_memory.memory));
        for (u64 i = 0; i < size; ++i) {
            if (!(flags & kStore) && !cells[i].writer)
                report(site, "uninitialised threadgroup memory: load of %llu bytes at byte %llu of %s, where no thread has "
                       "stored", ull(size), ull(offset), Name(variable->name).text);
            Race race = flags & kStore ? threadgroup_races.store(cells[i], thread, now)
                                       : threadgroup_races.load(cells[i], thread, now);
            if (race.other) report_race(race, site, verb(flags), Name(variable->name).text, offset + i);
        }
    }

    void access_device(uptr address, u64 size, u32 flags, uptr site) {
        Region* region = region_at(address);
        if (!region) {
            if (in_image(address)) return;
            report_outside(address, size, verb(flags), site);
        }
        if (address + size > uptr(region->end)) report_outside(address, size, verb(flags), site);
        u64 offset = address - uptr(region->begin);
        if (misaligned(address, size, flags)) report_misaligned(size, flags, site, region->name, offset);
        if (!region->cells) return;  // a constant
        if (flags & kStore) region->written = 1;
        (flags & kStore ? counters().device_bytes_stored : counters().device_bytes_loaded) += size;
        if (!coalescer.add(site, running_thread() % kLanes, address, u32(size), flags & kStore))
            report(site, "a simdgroup accesses device memory from more places in the code than can be told apart");
        u32 thread = number_of(running_group(), running_thread());
        Cell* cells = region->cells + offset;
        for (u64 i = 0; i < size; ++i) {
            Race race = flags & kStore ? device_races.store(cells[i], thread, now)
                                       : device_races.load(cells[i], thread, now);
            if (race.other) report_race(race, site, verb(flags), region->name, offset + i);
        }
    }

    void atomic(uptr address, u32 size, AtomicAccess kind, uptr site) {
        const bool writes = kind != kAtomicLoad;
        counters().atomic_operations += 1;
        u32 thread = number_of(running_group(), running_thread());
        if (threadgroup_memory.contains(address)) {
            const auto* variable = threadgroup_memory.at(address);
            if (!variable) report(site, "out-of-bounds atomic operation on threadgroup memory");
            Name name(variable->name);
            Cell* cells = threadgroup_cells + (address - uptr(threadgroup_memory.memory));
            if (!cells->writer && kind != kAtomicStore)
                report(site, "uninitialised threadgroup memory: atomic operation on %s, where no thread has stored", name.text);
            atomic(cells, threadgroup_races, size, thread, writes, site, name.text, address - uptr(variable->begin));
        } else {
            Region* region = region_at(address);
            if (!region || address + size > uptr(region->end)) report_outside(address, size, "atomic operation", site);
            u64 offset = address - uptr(region->begin);
            if (writes) region->written = 1;
            atomic(region->cells + offset, device_races, size, thread, writes, site, region->name, offset);
        }
    }
    void atomic(Cell* cells, RaceDetector& races, u32 size, u32 thread, bool writes, uptr site, const char* name,
                u64 offset) {
        if (offset % size) report(site, "misaligned atomic operation at byte %llu of %s", ull(offset), name);
        for (u32 i = 0; i < size; ++i) {
            Race race = races.atomic(cells[i], thread, now, writes);
            if (race.other) report_race(race, site, "atomic operation", name, offset + i);
        }
    }

    Region* region_at(uptr address) {
        for (u64 i = 0; i < dispatch->region_count; ++i) {
            Region& r = dispatch->regions[i];
            if (address >= uptr(r.begin) && address < uptr(r.end)) return &r;
        }
        return nullptr;
    }
    bool in_image(uptr address) {
        SharedObject object;
        return dladdr(reinterpret_cast<void*>(address), &object) && object.base == image;
    }

    // -- reports ----------------------------------------------------------------------------------------------------

    static unsigned long long ull(u64 x) { return x; }
    static long long sll(uptr x) { return (long long)x; }

    static bool misaligned(uptr address, u64 size, u32 flags) {
        return !(flags & kAnyAlignment) && address & (size - 1);
    }
    [[noreturn]] void report_misaligned(u64 size, u32 flags, uptr site, const char* name, u64 offset) {
        report(site, "misaligned %s of %llu bytes at byte %llu of %s", verb(flags), ull(size), ull(offset), name);
    }

    [[noreturn]] void report_outside(uptr address, u64 size, const char* what, uptr site) {
        Region* nearest = nullptr;
        uptr distance = ~uptr(0);
        for (u64 i = 0; i < dispatch->region_count; ++i) {
            Region& r = dispatch->regions[i];
            uptr d = address < uptr(r.begin) ? uptr(r.begin) - address : address - uptr(r.end);
            if (address >= uptr(r.begin) && address < uptr(r.end)) d = 0;
            if (d < distance) distance = d, nearest = &r;
        }
        constexpr uptr kFar = 1ull << 32;
        if (!nearest || distance > kFar) report(site, "%s of %llu bytes at wild address %p", what, ull(size), (void*)address);
        report(site, "out-of-bounds %s of %llu bytes at byte %lld of %s, which has %llu bytes", what, ull(size),
               sll(address - uptr(nearest->begin)), nearest->name, ull(nearest->end - nearest->begin));
    }

    [[noreturn]] void report_race(Race race, uptr site, const char* what, const char* name, u64 offset) {
        u32 group = threadgroup_of(race.other);
        const Uint3 n = dispatch->threadgroups_per_grid;
        report(site, "data race at byte %llu of %s: this %s and a %s by thread %u of threadgroup (%u, %u, %u) have no "
               "barrier between them that orders this memory", ull(offset), name, what,
               race.other_wrote ? "store" : "load", (race.other - 1) % 1024, group % n.x, group / n.x % n.y,
               group / n.x / n.y);
    }

    template <class... A>
    [[noreturn]] void report(uptr site, const char* format, A... arguments) {
        char text[700];
        if constexpr (sizeof...(A) == 0)
            snprintf(text, sizeof text, "%s", format);
        else
            snprintf(text, sizeof text, format, arguments...);
        dispatch->fail("%s; by %s", text, Words(*running_position()).text);
        dispatch->site = site ? site - 1 - uptr(image) : 0;
        abandon();
    }

    // -- progress ---------------------------------------------------------------------------------------------------

    void begin(Dispatch* d) {
        dispatch = d;
        if (!d->checked) return;
        SharedObject object;
        image = dladdr(reinterpret_cast<void*>(d->entry), &object) ? object.base : nullptr;
        now = 1;
        for (u64 i = 0; i < d->region_count; ++i) {
            Region& r = d->regions[i];
            if (r.constant) continue;
            r.cells = static_cast<Cell*>(
                mmap(nullptr, u64(r.end - r.begin + 1) * sizeof(Cell), kReadWrite, kLazyMemory, -1, 0));
            if (r.cells == reinterpret_cast<Cell*>(-1)) __builtin_trap();
        }
    }

    void end() {
        if (!checked()) return;
        coalescer.flush(counters());
        forget_threadgroup();
        for (u64 i = 0; i < dispatch->region_count; ++i) {
            Region& r = dispatch->regions[i];
            if (r.cells) munmap(r.cells, u64(r.end - r.begin + 1) * sizeof(Cell));
        }
    }

    void forget_threadgroup() { memset(threadgroup_cells, 0, threadgroup_memory.placed * sizeof(Cell)); }

    void threadgroup(u32 threads, u32 simdgroups) {
        if (checked()) {
            forget_threadgroup();
            ++now;
            threadgroup_races.times.clear(0);
            device_races.times.clear(0);
            counters().threadgroups += 1;
            counters().simdgroups += simdgroups;
            counters().threads += threads;
        }
        threadgroup_memory.clear();
    }

    void meeting(u32 simdgroup, u32 active, u32 existing, u32 kind, u32 flags) {
        if (!checked()) return;
        coalescer.flush(counters());
        if (kind == kSimd) {
            counters().simd_operations += 1;
        } else if (kind == kMatrix) {
            counters().matrix_operations += 1;
            counters().matrix_multiplies += flags;
            if (active != ~0u)
                report(0, "divergent simdgroup matrix operation: only lanes 0x%08x of the simdgroup take part", active);
        } else {
            counters().simdgroup_barriers += 1;
            if (active != existing)
                report(0, "divergent simdgroup_barrier: only lanes 0x%08x of 0x%08x have come to it", active, existing);
            ++now;
            if (flags & kDeviceMemory) device_races.times.simdgroup[simdgroup] = now;
            if (flags & kThreadgroupMemory) threadgroup_races.times.simdgroup[simdgroup] = now;
        }
    }

    void barrier(u32 flags) {
        if (!checked()) return;
        counters().threadgroup_barriers += 1;
        ++now;
        if (flags & kDeviceMemory) device_races.times.threadgroup = now;
        if (flags & kThreadgroupMemory) threadgroup_races.times.threadgroup = now;
    }
};

static Watch watch;

void observe_dispatch(Dispatch* dispatch) { watch.begin(dispatch); }
void observe_threadgroup(u32 threads, u32 simdgroups) { watch.threadgroup(threads, simdgroups); }
void observe_simdgroup_stops() {
    if (watch.checked()) watch.coalescer.flush(watch.counters());
}
void observe_meeting(u32 simdgroup, u32 active, u32 existing, u32 kind, u32 flags) {
    watch.meeting(simdgroup, active, existing, kind, flags);
}
void observe_barrier(u32 flags) { watch.barrier(flags); }
void observe_end() { watch.end(); }

}  // namespace metalsim

using namespace metalsim;

extern "C" {
void* metalsim_threadgroup_variable(u32 site, const char* name, u64 size, u64 align) {
    return watch.threadgroup_memory.variable(watch.dispatch, site, name, size, align);
}
void metalsim_inactive_source(u32 lane, u32 source, const char* operation) {
    if (watch.checked())
        watch.report(0, "%s: lane %u reads from lane %u, which does not take part", operation, lane, source);
}
void metalsim_access(uptr address, u64 size, u32 flags, uptr site) { watch.access(address, size, flags, site); }
void metalsim_atomic(const void* address, u32 size, u32 kind) {
    if (watch.checked()) watch.atomic(uptr(address), size, AtomicAccess(kind), uptr(__builtin_return_address(0)));
}
}
