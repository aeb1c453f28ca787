// Who touched each byte last, and whether a barrier lies in between: data races and uninitialised reads.
//
// Time is a count of barriers. Two accesses to a byte by different threads, one of them a store, race unless
//   - they are of one threadgroup and a threadgroup barrier lies between them, or
//   - they are of one simdgroup and a simdgroup barrier lies between them, or
//   - both are atomic.
// A barrier counts only for the memory that its flags name. Simd operations order nothing, and nothing orders the
// plain accesses of two threadgroups: Metal's atomics are relaxed.
#pragma once
#include "dispatch.h"

namespace metalsim {

/// The last accesses to one byte. Threads are numbered over the grid from 1; 0 means none.
struct Cell {
    u32 writer, write_time;
    u32 reader, read_time;
};

constexpr u32 kThreadBits = 29;
constexpr u32 kThreadMask = (1u << kThreadBits) - 1;
constexpr u32 kAtomicWrite = 1u << 31;  // in Cell::write_time
/// In Cell::reader: how far the readers are spread that no barrier separates.
enum Breadth : u32 {
    kOneThread = 0,
    kOneSimdgroup = 1u << kThreadBits,
    kOneThreadgroup = 2u << kThreadBits,
    kGrid = 3u << kThreadBits,
};
constexpr u32 kBreadthMask = 3u << kThreadBits;

inline u32 number_of(u32 threadgroup, u32 thread) { return threadgroup * 1024 + thread + 1; }
inline u32 threadgroup_of(u32 number) { return (number - 1) / 1024; }
inline u32 simdgroup_of(u32 number) { return (number - 1) / kLanes; }

/// Times of the last barriers that order one kind of memory (device or threadgroup).
struct BarrierTimes {
    u32 threadgroup, simdgroup[1024 / kLanes];
    void clear(u32 now) {
        threadgroup = now;
        for (u32& t : simdgroup) t = now;
    }
};

struct Race {
    u32 other;  // thread number, 0 when there is none
    bool other_wrote;
};

struct RaceDetector {
    BarrierTimes times;

    bool ordered(u32 earlier, u32 time, u32 now_thread) const {
        if (earlier == now_thread) return true;
        if (threadgroup_of(earlier) != threadgroup_of(now_thread)) return false;
        if (times.threadgroup > time) return true;
        return simdgroup_of(earlier) == simdgroup_of(now_thread) && times.simdgroup[simdgroup_of(earlier) % 32] > time;
    }
    /// Whether all the readers of a cell come before `thread`.
    bool readers_ordered(const Cell& cell, u32 thread) const {
        u32 reader = cell.reader & kThreadMask, breadth = cell.reader & kBreadthMask;
        if (!reader) return true;
        if (breadth == kOneThread) return ordered(reader, cell.read_time, thread);
        if (breadth == kGrid || threadgroup_of(reader) != threadgroup_of(thread)) return false;
        if (times.threadgroup > cell.read_time) return true;
        return breadth == kOneSimdgroup && simdgroup_of(reader) == simdgroup_of(thread) &&
               times.simdgroup[simdgroup_of(reader) % 32] > cell.read_time;
    }

    Race load(Cell& cell, u32 thread, u32 now) const {
        if (cell.writer && !ordered(cell.writer, cell.write_time & ~kAtomicWrite, thread)) return {cell.writer, true};
        u32 reader = cell.reader & kThreadMask;
        if (!reader || readers_ordered(cell, thread)) {
            cell.reader = thread;
        } else {
            u32 breadth = cell.reader & kBreadthMask;
            u32 needed = threadgroup_of(reader) != threadgroup_of(thread) ? kGrid
                         : simdgroup_of(reader) != simdgroup_of(thread)   ? kOneThreadgroup
                                                                          : kOneSimdgroup;
            cell.reader = thread | (needed > breadth ? needed : breadth);
        }
        cell.read_time = now;
        return {0, false};
    }
    Race store(Cell& cell, u32 thread, u32 now) const {
        if (cell.writer && !ordered(cell.writer, cell.write_time & ~kAtomicWrite, thread)) return {cell.writer, true};
        if (!readers_ordered(cell, thread)) return {cell.reader & kThreadMask, false};
        cell = {thread, now, 0, 0};
        return {0, false};
    }
    Race atomic(Cell& cell, u32 thread, u32 now, bool writes) const {
        if (cell.writer && !(cell.write_time & kAtomicWrite) && !ordered(cell.writer, cell.write_time, thread))
            return {cell.writer, true};
        if (!writes) return {0, false};
        if (!readers_ordered(cell, thread)) return {cell.reader & kThreadMask, false};
        cell = {thread, now | kAtomicWrite, 0, 0};
        return {0, false};
    }
};

}  // namespace metalsim
