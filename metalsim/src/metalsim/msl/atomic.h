// <metal_atomic>. All threads of the simulator share one host thread, so plain operations are atomic; the runtime is
// told of each, since an atomic and a plain access to one address still race.
#pragma once
#include "simd.h"

namespace metal {

// The only order that Metal's atomic operations take.
enum memory_order { memory_order_relaxed };

template <class T>
struct identity {
    using type = T;
};
/// T where it is not to be deduced.
template <class T>
using identity_t = typename identity<T>::type;

template <class T>
struct atomic {
    T value;
    atomic() = default;
    atomic(const atomic&) = delete;
    atomic& operator=(const atomic&) = delete;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<bool> atomic_bool;
typedef atomic<ulong> atomic_ulong;
typedef atomic<float> atomic_float;

}  // namespace metal

#ifndef METALSIM_SPACES
namespace metalsim {
// Not part of what a checked run watches as plain accesses.
#define METALSIM_RAW __attribute__((noinline, no_sanitize("kernel-address")))
template <class T>
METALSIM_RAW T raw_load(const volatile T* from) {
    return *from;
}
template <class T>
METALSIM_RAW void raw_store(volatile T* to, T value) {
    *to = value;
}
#undef METALSIM_RAW

template <class T>
METAL_FUNC void note_atomic(const volatile metal::atomic<T>* object, AtomicAccess access) {
    metalsim_atomic(const_cast<const metal::atomic<T>*>(object), sizeof(T), access);
}
}  // namespace metalsim

namespace metal {

template <class T>
METAL_FUNC T atomic_load_explicit(const volatile atomic<T>* object, memory_order) {
    metalsim::note_atomic(object, metalsim::kAtomicLoad);
    return metalsim::raw_load(&object->value);
}
template <class T>
METAL_FUNC void atomic_store_explicit(volatile atomic<T>* object, identity_t<T> desired, memory_order) {
    metalsim::note_atomic(object, metalsim::kAtomicStore);
    metalsim::raw_store(&object->value, desired);
}
template <class T>
METAL_FUNC bool atomic_compare_exchange_weak_explicit(volatile atomic<T>* object, T* expected, identity_t<T> desired,
                                                      memory_order, memory_order) {
    metalsim::note_atomic(object, metalsim::kAtomicBoth);
    T before = metalsim::raw_load(&object->value);
    bool equal = before == *expected;
    if (equal) metalsim::raw_store(&object->value, desired);
    *expected = before;
    return equal;
}

#define METALSIM_READ_MODIFY_WRITE(name, expression)                                                          \
    template <class T>                                                                                        \
    METAL_FUNC T atomic_##name##_explicit(volatile atomic<T>* object, identity_t<T> operand, memory_order) {  \
        metalsim::note_atomic(object, metalsim::kAtomicBoth);                                                 \
        T before = metalsim::raw_load(&object->value);                                                        \
        metalsim::raw_store(&object->value, T(expression));                                                   \
        return before;                                                                                        \
    }
METALSIM_READ_MODIFY_WRITE(exchange, operand)
METALSIM_READ_MODIFY_WRITE(fetch_add, before + operand)
METALSIM_READ_MODIFY_WRITE(fetch_sub, before - operand)
METALSIM_READ_MODIFY_WRITE(fetch_and, before & operand)
METALSIM_READ_MODIFY_WRITE(fetch_or, before | operand)
METALSIM_READ_MODIFY_WRITE(fetch_xor, before ^ operand)
METALSIM_READ_MODIFY_WRITE(fetch_min, before < operand ? before : operand)
METALSIM_READ_MODIFY_WRITE(fetch_max, before > operand ? before : operand)
#undef METALSIM_READ_MODIFY_WRITE

}  // namespace metal
#endif
