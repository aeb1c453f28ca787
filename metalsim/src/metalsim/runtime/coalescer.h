// Groups the device accesses of a simdgroup's lanes into instructions, and counts the 128-byte lines each touches.
//
// Lanes run one after another, so an instruction is put together afterwards: the n-th execution of one place in the
// code, counted by each lane since the simdgroup last met, is one instruction of the simdgroup.
#pragma once
#include "dispatch.h"

namespace metalsim {

/// A growing array that is emptied often and never gives memory back.
template <class T>
struct Pool {
    T* items = nullptr;
    u32 count = 0, capacity = 0;

    T& add() {
        if (count == capacity) {
            u32 wider = capacity ? capacity * 2 : 256;
            T* moved = static_cast<T*>(malloc(u64(wider) * sizeof(T)));
            if (count) memcpy(moved, items, u64(count) * sizeof(T));
            free(items);
            items = moved;
            capacity = wider;
        }
        return items[count++];
    }
};

struct Coalescer {
    static constexpr u32 kMaxSites = 4096;
    static constexpr uptr kLine = 128;

    struct Access {
        uptr address;
        u32 size;
    };
    struct Instruction {
        u32 next;  // the following execution of the same site, or kNone
        u32 count;
        bool store;
        Access accesses[kLanes];
    };
    static constexpr u32 kNone = ~0u;
    struct Site {
        uptr address;
        u32 first;                // instruction of the first execution
        u32 at[kLanes];           // the instruction that each lane executed last, kNone before its first
    };

    Pool<Instruction> instructions;
    Site sites[kMaxSites];
    u32 used[kMaxSites], used_count = 0;

    /// Note one lane's access. False when the kernel has too many places to tell apart.
    bool add(uptr place, u32 lane, uptr address, u32 size, bool store) {
        u32 slot = u32(place * 0x9e3779b1u) % kMaxSites;
        while (sites[slot].address != place) {
            if (!sites[slot].address) {
                if (used_count > kMaxSites / 2) return false;
                sites[slot].address = place;
                sites[slot].first = kNone;
                for (u32& at : sites[slot].at) at = kNone;
                used[used_count++] = slot;
            }else slot = (slot + 1) % kMaxSites;
        }
        Site& site = sites[slot];
        u32 previous = site.at[lane];
        u32 index = previous == kNone ? site.first : instructions.items[previous].next;
        if (index == kNone) {
            index = instructions.count;
            Instruction& fresh = instructions.add();
            fresh.next = kNone;
            fresh.count = 0;
            fresh.store = store;
            (previous == kNone ? site.first : instructions.items[previous].next) = index;
        }
        site.at[lane] = index;
        Instruction& instruction = instructions.items[index];
        instruction.accesses[instruction.count++] = {address, size};
        return true;
    }

    /// The simdgroup has met: count what its lanes did since it met before.
    void flush(Counters& counters) {
        for (u32 i = 0; i < instructions.count; ++i) count(instructions.items[i], counters);
        instructions.count = 0;
        for (u32 i = 0; i < used_count; ++i) sites[used[i]].address = 0;
        used_count = 0;
    }

  private:
    static void count(const Instruction& instruction, Counters& counters) {
        struct Line {
            uptr number;
            u64 bytes[2];  // which of its bytes are touched
        };
        Line lines[64];
        u32 line_count = 0;
        u64 overflow_lines = 0, overflow_bytes = 0;
        for (u32 i = 0; i < instruction.count; ++i) {
            uptr address = instruction.accesses[i].address, end = address + instruction.accesses[i].size;
            while (address < end) {
                uptr number = address / kLine, stop = (number + 1) * kLine < end ? (number + 1) * kLine : end;
                u32 at = line_count;
                while (at > 0 && lines[at - 1].number != number) --at;
                if (at == 0 && line_count == 64) {  // only copies of large structures come here
                    ++overflow_lines;
                    overflow_bytes += stop - address;
                    address = stop;
                    continue;
                }
                if (at == 0) lines[line_count++] = {number, {0, 0}};
                Line& line = lines[at == 0 ? line_count - 1 : at - 1];
                for (; address < stop; ++address) line.bytes[address % kLine / 64] |= 1ull << address % 64;
            }
        }
        u64 bytes = overflow_bytes;
        for (u32 i = 0; i < line_count; ++i)
            bytes += u64(__builtin_popcountll(lines[i].bytes[0]) + __builtin_popcountll(lines[i].bytes[1]));
        (instruction.store ? counters.store_instructions : counters.load_instructions) += 1;
        (instruction.store ? counters.store_transactions : counters.load_transactions) += line_count + overflow_lines;
        (instruction.store ? counters.unique_bytes_stored : counters.unique_bytes_loaded) += bytes;
    }
};

}  // namespace metalsim
