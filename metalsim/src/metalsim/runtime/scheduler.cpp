// Runs the threads of a dispatch: threadgroup after threadgroup, each thread a fiber.
//
//   a lane runs until it meets a simd operation, a barrier or its end
//     -> the next lane of its simdgroup runs                (Scheduler::next_lane)
//     -> all lanes wait: one simd operation is computed     (Scheduler::release)
//     -> all lanes wait at a barrier or ended: back to the threadgroup loop, which runs the next simdgroup
//   all simdgroups wait at the same barrier: it opens       (Scheduler::open_barrier)
#include "dispatch.h"
#include "fiber.h"

namespace metalsim {

struct Simdgroup {
    Slot slots[kLanes];
    // Masks over *places*, the order in which this dispatch runs the lanes, not over lane numbers.
    u32 runnable, meeting, at_barrier, done;
    u32 lanes;  // how many exist
    u8 lane_at[kLanes], place_of[kLanes];
};

struct Thread {
    void* stack_pointer;
    Simdgroup* simdgroup;
    Collective compute;
    u32 lane, index, meeting_kind, flags;
    uptr site, depth;  // where it waits: the return address and how deep its stack is there
    Position position;
};

struct Scheduler {
    Dispatch* dispatch = nullptr;
    Thread* current = nullptr;
    void* main_stack_pointer = nullptr;
    Stacks stacks;
    Thread threads[kMaxThreads];
    Simdgroup simdgroups[kMaxThreads / kLanes];
    u32 thread_count = 0, simdgroup_count = 0;
    u64 random_state = 0;

    u32 random_below(u32 n) {
        random_state += 0x9e3779b97f4a7c15ull;
        u64 z = random_state;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ z >> 27) * 0x94d049bb133111ebull;
        return u32((z ^ z >> 31) % n);
    }

    /// The order in which `n` equals run: forward, reverse or shuffled.
    template <class T>
    void order(T* out, u32 n) {
        for (u32 i = 0; i < n; ++i) out[i] = T(dispatch->order == kReverse ? n - 1 - i : i);
        if (dispatch->order != kRandom) return;
        for (u32 i = n; i > 1; --i) {
            u32 j = random_below(i);
            T t = out[i - 1];
            out[i - 1] = out[j];
            out[j] = t;
        }
    }

    Thread* thread_at(Simdgroup& group, u32 place) {
        return &threads[u32(&group - simdgroups) * kLanes + group.lane_at[place]];
    }

    /// The lane of `group` to run next, or nullptr when all wait at a barrier or have ended.
    Thread* next_lane(Simdgroup& group) {
        if (!group.runnable) {
            if (!group.meeting) return nullptr;
            release(group);
        }
        u32 place = u32(__builtin_ctz(group.runnable));
        group.runnable &= group.runnable - 1;
        return thread_at(group, place);
    }

    /// Compute one simd operation for the lanes that wait at the same place. Lanes that diverged wait at different
    /// places: those at the lowest code address go first, which is where GPUs' divergent lanes are met again.
    void release(Simdgroup& group) {
        Thread* first = nullptr;
        for (u32 places = group.meeting; places; places &= places - 1) {
            Thread* t = thread_at(group, u32(__builtin_ctz(places)));
            if (!first || t->depth > first->depth || (t->depth == first->depth && t->site < first->site)) first = t;
        }
        u32 together = 0, active = 0;
        for (u32 places = group.meeting; places; places &= places - 1) {
            u32 place = u32(__builtin_ctz(places));
            Thread* t = thread_at(group, place);
            if (t->site != first->site || t->depth != first->depth) continue;
            together |= 1u << place;
            active |= 1u << t->lane;
        }
        group.meeting &= ~together;
        group.runnable |= together;
        current = first;
        observe_meeting(u32(&group - simdgroups), active, existing(group), first->meeting_kind, first->flags);
        if (first->compute) first->compute(group.slots, active);
    }
    static u32 existing(const Simdgroup& group) { return group.lanes == kLanes ? ~0u : (1u << group.lanes) - 1; }

    /// Leave the running lane, which has set its own state.
    void yield() {
        Thread* from = current;
        Thread* to = next_lane(*from->simdgroup);
        current = to ? to : from;
        if (to == from) return;
        metalsim_switch(&from->stack_pointer, to ? to->stack_pointer : main_stack_pointer);
    }

    void set_up_threadgroup(Uint3 group) {
        const Uint3 size = dispatch->threads_per_threadgroup, grid = dispatch->threads_per_grid;
        const Uint3 origin = {group.x * size.x, group.y * size.y, group.z * size.z};
        auto smaller = [](u32 a, u32 b) { return a < b ? a : b; };
        // Threadgroups at the edge of the grid are smaller.
        const Uint3 extent = {smaller(size.x, grid.x - origin.x), smaller(size.y, grid.y - origin.y),
                              smaller(size.z, grid.z - origin.z)};
        thread_count = extent.x * extent.y * extent.z;
        simdgroup_count = (thread_count + kLanes - 1) / kLanes;
        for (u32 s = 0; s < simdgroup_count; ++s) {
            Simdgroup& g = simdgroups[s];
            g.lanes = smaller(kLanes, thread_count - s * kLanes);
            g.runnable = existing(g);
            g.meeting = g.at_barrier = g.done = 0;
            order(g.lane_at, g.lanes);
            for (u32 place = 0; place < g.lanes; ++place) g.place_of[g.lane_at[place]] = u8(place);
        }
        u32 i = 0;
        for (u32 z = 0; z < extent.z; ++z)
            for (u32 y = 0; y < extent.y; ++y)
                for (u32 x = 0; x < extent.x; ++x, ++i) {
                    Thread& t = threads[i];
                    t.index = i;
                    t.lane = i % kLanes;
                    t.simdgroup = &simdgroups[i / kLanes];
                    t.stack_pointer = stacks.fresh(i);
                    auto& p = t.position;
                    p.thread_position_in_grid = {origin.x + x, origin.y + y, origin.z + z};
                    p.thread_position_in_threadgroup = {x, y, z};
                    p.threadgroup_position_in_grid = group;
                    p.threads_per_threadgroup = extent;
                    p.dispatch_threads_per_threadgroup = size;
                    p.threads_per_grid = grid;
                    p.threadgroups_per_grid = dispatch->threadgroups_per_grid;
                    p.thread_index_in_threadgroup = {i, 0, 0};
                    p.thread_index_in_simdgroup = {i % kLanes, 0, 0};
                    p.simdgroup_index_in_threadgroup = {i / kLanes, 0, 0};
                    p.simdgroups_per_threadgroup = {simdgroup_count, 0, 0};
                    p.dispatch_simdgroups_per_threadgroup = {(size.x * size.y * size.z + kLanes - 1) / kLanes, 0, 0};
                    p.threads_per_simdgroup = p.thread_execution_width = {kLanes, 0, 0};
                    p.thread_index_in_quadgroup = {i % 4, 0, 0};
                    p.quadgroup_index_in_threadgroup = {i / 4, 0, 0};
                    p.quadgroups_per_threadgroup = {(thread_count + 3) / 4, 0, 0};
                }
    }

    /// All threads wait at a barrier or have ended. Opens the barrier; false when all have ended.
    bool open_barrier() {
        Thread* waiting = nullptr;
        for (u32 i = 0; i < thread_count; ++i) {
            const Simdgroup& g = *threads[i].simdgroup;
            if (g.at_barrier >> g.place_of[threads[i].lane] & 1) waiting = &threads[i];
        }
        if (!waiting) return false;
        for (u32 i = 0; i < thread_count; ++i) {
            Thread& t = threads[i];
            const Simdgroup& g = *t.simdgroup;
            bool ended = g.done >> g.place_of[t.lane] & 1;
            if (ended || t.site != waiting->site || t.depth != waiting->depth) {
                dispatch->fail("divergent threadgroup_barrier: %s waits at a barrier, but %s %s",
                               Words(waiting->position).text, Words(t.position).text,
                               ended ? "has ended" : "waits at another one");
                return false;
            }
        }
        for (u32 s = 0; s < simdgroup_count; ++s) {
            Simdgroup& g = simdgroups[s];
            g.runnable = g.at_barrier;
            g.at_barrier = 0;
        }
        observe_barrier(waiting->flags);
        return true;
    }

    void run_threadgroup(Uint3 group) {
        set_up_threadgroup(group);
        observe_threadgroup(thread_count, simdgroup_count);
        u32 turn[kMaxThreads / kLanes];
        do {
            order(turn, simdgroup_count);
            for (u32 s = 0; s < simdgroup_count; ++s) {
                Thread* lane = next_lane(simdgroups[turn[s]]);
                if (lane) {
                    current = lane;
                    metalsim_switch(&main_stack_pointer, lane->stack_pointer);
                }
                if (dispatch->failed) return;
                observe_simdgroup_stops();
            }
        } while (open_barrier());
        for (u32 i = 0; i < thread_count && !dispatch->failed; ++i)
            if (stacks.overflowed(i)) 
                dispatch->fail("more than 128 KB of variables on the stack of %s", Words(threads[i].position).text);
    }

    void run(Dispatch* d) {
        dispatch = d;
        random_state = d->seed;
        stacks.reserve();
        const Uint3 n = d->threadgroups_per_grid;
        const u64 count = u64(n.x) * n.y * n.z;
        u32* turn = static_cast<u32*>(malloc(count * sizeof(u32)));
        order(turn, u32(count));
        for (u64 i = 0; i < count && !d->failed; ++i)
            run_threadgroup({turn[i] % n.x, turn[i] / n.x % n.y, turn[i] / n.x / n.y});
        free(turn);
    }

    /// Give up the dispatch from within a lane.
    [[noreturn]] void abandon() {
        metalsim_switch(&current->stack_pointer, main_stack_pointer);
        __builtin_unreachable();
    }
};

static Scheduler scheduler;

const Position* running_position() { return &scheduler.current->position; }
const Position* position_of(u32 thread) { return &scheduler.threads[thread].position; }
u32 running_thread() { return scheduler.current->index; }
void abandon() { scheduler.abandon(); }
bool is_private(uptr address) {
    return address - uptr(scheduler.stacks.memory) < kMaxThreads * kStackStride ||
           address - uptr(&scheduler) < sizeof scheduler;
}

}  // namespace metalsim

using namespace metalsim;

extern "C" {

void metalsim_fiber_main() {
    Thread* t = scheduler.current;
    scheduler.dispatch->entry(scheduler.dispatch->buffers, &t->position);
    t->simdgroup->done |= 1u << t->simdgroup->place_of[t->lane];
    scheduler.yield();
    __builtin_unreachable();
}

Slot* metalsim_slot() { return &scheduler.current->simdgroup->slots[scheduler.current->lane]; }
u32 metalsim_lane() { return scheduler.current->lane; }

__attribute__((noinline)) void metalsim_meet(Collective compute, u32 meeting, u32 flags) {
    Thread* t = scheduler.current;
    t->site = uptr(__builtin_return_address(0));
    t->depth = uptr(scheduler.stacks.top(t->index)) - uptr(__builtin_frame_address(0));
    t->compute = compute;
    t->meeting_kind = meeting;
    t->flags = flags;
    t->simdgroup->meeting |= 1u << t->simdgroup->place_of[t->lane];
    scheduler.yield();
}

__attribute__((noinline)) void metalsim_barrier(u32 flags) {
    Thread* t = scheduler.current;
    t->site = uptr(__builtin_return_address(0));
    t->depth = uptr(scheduler.stacks.top(t->index)) - uptr(__builtin_frame_address(0));
    t->flags = flags;
    t->simdgroup->at_barrier |= 1u << t->simdgroup->place_of[t->lane];
    scheduler.yield();
}

void metalsim_dispatch(Dispatch* dispatch) {
    observe_dispatch(dispatch);
    scheduler.run(dispatch);
    observe_end();
}
}
