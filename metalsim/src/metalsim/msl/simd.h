// <metal_simdgroup>, <metal_quadgroup> and the barriers.
//
// A lane writes its operand into its slot and meets the other lanes; the last to come computes the operation for all
// of them in place; each lane finds its result in its slot.
#pragma once
#include "../runtime/api.h"
#include "math.h"

namespace metalsim {

template <class T>
METAL_FUNC T& slot_value(Slot* slots, u32 lane) {
    return *reinterpret_cast<T*>(slots[lane].bytes);
}

template <class T, class Payload>
METAL_FUNC T meet(Payload operand, Collective compute) {
    static_assert(sizeof(Payload) <= sizeof(Slot) && sizeof(T) <= sizeof(Slot), "operand too large");
    Slot* slot = metalsim_slot();
    *reinterpret_cast<Payload*>(slot->bytes) = operand;
    metalsim_meet(compute, kSimd, 0);
    return *reinterpret_cast<T*>(slot->bytes);
}

// Combines the active lanes of each group of `Width` lanes pairwise, as a butterfly of shuffles does.
template <class T, class Operator, u32 Width>
void reduce(Slot* slots, u32 active) {
    for (u32 first = 0; first < kLanes; first += Width) {
        T value[Width];
        bool present[Width];
        for (u32 i = 0; i < Width; ++i) {
            present[i] = active >> (first + i) & 1;
            if (present[i]) value[i] = slot_value<T>(slots, first + i);
        }
        for (u32 step = Width / 2; step > 0; step /= 2)
            for (u32 i = 0; i < step; ++i) {
                if (present[i] && present[i + step])
                    value[i] = Operator::apply(value[i], value[i + step]);
                else if (present[i + step])
                    value[i] = value[i + step];
                present[i] |= present[i + step];
            }
        for (u32 i = 0; i < Width; ++i)
            if (active >> (first + i) & 1) slot_value<T>(slots, first + i) = value[0];
    }
}

template <class T, class Operator, bool Inclusive>
void scan(Slot* slots, u32 active) {
    T sum = T(Operator::identity);
    for (u32 lane = 0; lane < kLanes; ++lane) {
        if (!(active >> lane & 1)) continue;
        T own = slot_value<T>(slots, lane);
        T next = Operator::apply(sum, own);
        slot_value<T>(slots, lane) = Inclusive ? next : sum;
        sum = next;
    }
}

template <class T>
struct Shuffle {
    T value;
    u32 lane;  // the operand of the instruction: a lane, a mask or a distance
};

// `Source::of(lane, operand)` names the lane to read; a negative answer means the lane keeps its own value.
template <class T, class Source>
void shuffle(Slot* slots, u32 active) {
    T result[kLanes];
    for (u32 lane = 0; lane < kLanes; ++lane) {
        if (!(active >> lane & 1)) continue;
        const Shuffle<T>& own = slot_value<Shuffle<T>>(slots, lane);
        int source = Source::of(int(lane), int(own.lane));
        result[lane] = own.value;
        if (source < 0) continue;
        if (source >= int(kLanes) || !(active >> source & 1))
            metalsim_inactive_source(lane, u32(source), Source::name);
        else
            result[lane] = slot_value<Shuffle<T>>(slots, u32(source)).value;
    }
    for (u32 lane = 0; lane < kLanes; ++lane)
        if (active >> lane & 1) slot_value<T>(slots, lane) = result[lane];
}

template <class T>
struct FillDown {
    T value, fill;
    u32 distance;
};
template <class T, bool Down>
void shuffle_and_fill(Slot* slots, u32 active) {
    T result[kLanes];
    for (u32 lane = 0; lane < kLanes; ++lane) {
        if (!(active >> lane & 1)) continue;
        u32 distance = slot_value<FillDown<T>>(slots, lane).distance;
        int source = Down ? int(lane + distance) : int(lane) - int(distance);
        bool inside = Down ? source < int(kLanes) : source >= 0;
        u32 from = u32(source) & (kLanes - 1);
        if (!(active >> from & 1)) {
            metalsim_inactive_source(lane, from, "simd_shuffle_and_fill");
            from = lane;
        }
        const FillDown<T>& other = slot_value<FillDown<T>>(slots, from);
        result[lane] = inside ? other.value : other.fill;
    }
    for (u32 lane = 0; lane < kLanes; ++lane)
        if (active >> lane & 1) slot_value<T>(slots, lane) = result[lane];
}

template <u32 Width>
void ballot(Slot* slots, u32 active) {
    u64 votes = 0;
    for (u32 lane = 0; lane < kLanes; ++lane)
        if (active >> lane & 1 && slot_value<bool>(slots, lane)) votes |= 1ull << lane;
    for (u32 lane = 0; lane < kLanes; ++lane) {
        if (!(active >> lane & 1)) continue;
        u32 first = lane / Width * Width;
        u64 group = (1ull << Width) - 1;
        slot_value<u64>(slots, lane) = (votes >> first & group) << 32 | (active >> first & group);
    }
}
struct Votes {
    u32 active, votes;
};
template <u32 Width>
METAL_FUNC Votes vote(bool value) {
    u64 both = meet<u64, bool>(value, ballot<Width>);
    return {u32(both), u32(both >> 32)};
}

template <class T>
void first_active(Slot* slots, u32 active) {
    T value = slot_value<T>(slots, u32(__builtin_ctz(active)));
    for (u32 lane = 0; lane < kLanes; ++lane)
        if (active >> lane & 1) slot_value<T>(slots, lane) = value;
}

struct Add {
    static constexpr int identity = 0;
    template <class T>
    static T apply(T a, T b) { return a + b; }
};
struct Multiply {
    static constexpr int identity = 1;
    template <class T>
    static T apply(T a, T b) { return a * b; }
};
struct Min {
    template <class T>
    static T apply(T a, T b) { return metal::min(a, b); }
};
struct Max {
    template <class T>
    static T apply(T a, T b) { return metal::max(a, b); }
};
struct And {
    template <class T>
    static T apply(T a, T b) { return a & b; }
};
struct Or {
    template <class T>
    static T apply(T a, T b) { return a | b; }
};
struct Xor {
    template <class T>
    static T apply(T a, T b) { return a ^ b; }
};

template <u32 Width>
struct FromLane {
    static constexpr const char* name = Width == 32 ? "simd_shuffle" : "quad_shuffle";
    static int of(int lane, int operand) { return operand < int(Width) ? lane / int(Width) * int(Width) + operand : 99; }
};
template <u32 Width>
struct FromXor {
    static constexpr const char* name = Width == 32 ? "simd_shuffle_xor" : "quad_shuffle_xor";
    static int of(int lane, int operand) { return operand < int(Width) ? lane ^ operand : 99; }
};
template <u32 Width>
struct FromAbove {
    static constexpr const char* name = Width == 32 ? "simd_shuffle_down" : "quad_shuffle_down";
    static int of(int lane, int operand) { return lane % int(Width) + operand < int(Width) ? lane + operand : -1; }
};
template <u32 Width>
struct FromBelow {
    static constexpr const char* name = Width == 32 ? "simd_shuffle_up" : "quad_shuffle_up";
    static int of(int lane, int operand) { return lane % int(Width) >= operand ? lane - operand : -1; }
};
template <u32 Width>
struct RotateDown {
    static constexpr const char* name = "simd_shuffle_rotate_down";
    static int of(int lane, int operand) { return (lane + operand) % int(Width); }
};
template <u32 Width>
struct RotateUp {
    static constexpr const char* name = "simd_shuffle_rotate_up";
    static int of(int lane, int operand) { return (lane - operand % int(Width) + int(Width)) % int(Width); }
};

}  // namespace metalsim

namespace metal {

enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
METAL_FUNC constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }
METAL_FUNC constexpr mem_flags operator&(mem_flags a, mem_flags b) { return mem_flags(uint(a) & uint(b)); }

METAL_FUNC void threadgroup_barrier(mem_flags flags) { metalsim_barrier(uint(flags)); }
METAL_FUNC void simdgroup_barrier(mem_flags flags) { metalsim_meet(nullptr, metalsim::kSimdgroupBarrier, uint(flags)); }

#define METALSIM_REDUCTION(name, Operator)                                                                    \
    template <class T>                                                                                        \
    METAL_FUNC T simd_##name(T x) { return metalsim::meet<T, T>(x, metalsim::reduce<T, metalsim::Operator, 32>); } \
    template <class T>                                                                                        \
    METAL_FUNC T quad_##name(T x) { return metalsim::meet<T, T>(x, metalsim::reduce<T, metalsim::Operator, 4>); }
METALSIM_REDUCTION(sum, Add)
METALSIM_REDUCTION(product, Multiply)
METALSIM_REDUCTION(min, Min)
METALSIM_REDUCTION(max, Max)
METALSIM_REDUCTION(and, And)
METALSIM_REDUCTION(or, Or)
METALSIM_REDUCTION(xor, Xor)
#undef METALSIM_REDUCTION

#define METALSIM_SCAN(name, Operator, inclusive)                                                              \
    template <class T>                                                                                        \
    METAL_FUNC T name(T x) { return metalsim::meet<T, T>(x, metalsim::scan<T, metalsim::Operator, inclusive>); }
METALSIM_SCAN(simd_prefix_inclusive_sum, Add, true)
METALSIM_SCAN(simd_prefix_exclusive_sum, Add, false)
METALSIM_SCAN(simd_prefix_inclusive_product, Multiply, true)
METALSIM_SCAN(simd_prefix_exclusive_product, Multiply, false)
#undef METALSIM_SCAN

#define METALSIM_SHUFFLE(name, Source)                                                                        \
    template <class T>                                                                                        \
    METAL_FUNC T simd_##name(T x, ushort operand) {                                                           \
        return metalsim::meet<T>(metalsim::Shuffle<T>{x, operand}, metalsim::shuffle<T, metalsim::Source<32>>);  \
    }                                                                                                         \
    template <class T>                                                                                        \
    METAL_FUNC T quad_##name(T x, ushort operand) {                                                           \
        return metalsim::meet<T>(metalsim::Shuffle<T>{x, operand}, metalsim::shuffle<T, metalsim::Source<4>>);   \
    }
METALSIM_SHUFFLE(shuffle, FromLane)
METALSIM_SHUFFLE(broadcast, FromLane)
METALSIM_SHUFFLE(shuffle_xor, FromXor)
METALSIM_SHUFFLE(shuffle_down, FromAbove)
METALSIM_SHUFFLE(shuffle_up, FromBelow)
METALSIM_SHUFFLE(shuffle_rotate_down, RotateDown)
METALSIM_SHUFFLE(shuffle_rotate_up, RotateUp)
#undef METALSIM_SHUFFLE

template <class T>
METAL_FUNC T simd_shuffle_and_fill_down(T x, T fill, ushort distance) {
    return metalsim::meet<T>(metalsim::FillDown<T>{x, fill, distance}, metalsim::shuffle_and_fill<T, true>);
}
template <class T>
METAL_FUNC T simd_shuffle_and_fill_up(T x, T fill, ushort distance) {
    return metalsim::meet<T>(metalsim::FillDown<T>{x, fill, distance}, metalsim::shuffle_and_fill<T, false>);
}
template <class T>
METAL_FUNC T simd_broadcast_first(T x) {
    return metalsim::meet<T, T>(x, metalsim::first_active<T>);
}

class simd_vote {
  public:
    using vote_t = ulong;
    simd_vote(vote_t votes = 0) : votes_(votes) {}
    operator vote_t() const { return votes_; }
    bool all() const { return votes_ == 0xffffffffu; }
    bool any() const { return votes_ != 0; }

  private:
    vote_t votes_;
};

METAL_FUNC simd_vote simd_ballot(bool x) { return simd_vote(metalsim::vote<32>(x).votes); }
METAL_FUNC simd_vote simd_active_threads_mask() { return simd_vote(metalsim::vote<32>(true).active); }
METAL_FUNC bool simd_any(bool x) { return metalsim::vote<32>(x).votes != 0; }
METAL_FUNC bool simd_all(bool x) {
    metalsim::Votes v = metalsim::vote<32>(x);
    return v.votes == v.active;
}
METAL_FUNC bool quad_any(bool x) { return metalsim::vote<4>(x).votes != 0; }
METAL_FUNC bool quad_all(bool x) {
    metalsim::Votes v = metalsim::vote<4>(x);
    return v.votes == v.active;
}
METAL_FUNC bool simd_is_helper_thread() { return false; }

}  // namespace metal
