// The threadgroup variables of the running threadgroup.
#pragma once
#include "dispatch.h"

namespace metalsim {

struct ThreadgroupMemory {
    static constexpr u64 kLimit = 32 * 1024;
    static constexpr u32 kMaxVariables = 128;
    static constexpr u64 kGap = 256;  // between variables, so that an access past one is not an access to the next

    struct Variable {
        const char* name;
        u8* begin;
        u64 size;
    };

    alignas(256) u8 memory[kLimit + kMaxVariables * kGap + kGap];
    Variable variables[kMaxVariables];
    u32 declared[kMaxVariables];
    u32 count = 0;
    u64 used = 0, placed = 0;  // bytes as Metal counts them, and bytes with the gaps

    void clear() {
        for (u32 i = 0; i < count; ++i) variables[declared[i]].begin = nullptr;
        count = 0;
        used = placed = 0;
    }

    /// Bytes of 0xff are NaN in every floating point type, so that an uninitialised read shows in the results too.
    void* variable(Dispatch* dispatch, u32 site, const char* name, u64 size, u64 align) {
        if (site >= kMaxVariables) {
            dispatch->fail("more than %u threadgroup variables in one library", kMaxVariables);
            abandon();
        }
        Variable& v = variables[site];
        if (!v.begin) {
            used = (used + align - 1) / align * align + size;
            if (used > kLimit) {
                dispatch->fail("threadgroup memory: '%s' brings it to %llu bytes, more than the limit of %llu; by %s", name,
                               (unsigned long long)used, (unsigned long long)kLimit, Words(*running_position()).text);
                abandon();
            }
            u64 step = align > kGap ? align : kGap;
            v = {name, memory + placed, size};
            memset(v.begin, 0xff, size);
            placed = (placed + size + kGap + step - 1) / step * step;
            declared[count++] = site;
            if (used > dispatch->threadgroup_bytes) dispatch->threadgroup_bytes = used;
        }
        return v.begin;
    }
    bool contains(uptr address) const { return address - uptr(memory) < sizeof memory; }
    const Variable* at(uptr address) const {
        for (u32 i = 0; i < count; ++i) {
            const Variable& v = variables[declared[i]];
            if (address - uptr(v.begin) < v.size) return &v;
        }
        return nullptr;
    }
    /// The variable that an address outside of all belongs to most likely.
    const Variable* nearest(uptr address) const {
        const Variable* best = nullptr;
        for (u32 i = 0; i < count; ++i) {
            const Variable& v = variables[declared[i]];
            if (!best || (uptr(v.begin) <= address && (v.begin > best->begin || uptr(best->begin) > address))) best = &v;
        }
        return best;
    }
};

}  // namespace metalsim
