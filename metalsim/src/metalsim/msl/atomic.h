// <metal_atomic>. All threads of the simulator share one host thread, so plain operations are atomic; the runtime is
// told of each, since an atomic and a plain access to one address still race.
#pragma once
#include "simd.h"

namespace metal {

enum memory_order { memory_order_relaxed, memory_order_acquire, memory_order_release, memory_order_acq_rel,
                    memory_order_seq_cst };
enum thread_scope { thread_scope_thread, thread_scope_simdgroup, thread_scope_threadgroup, thread_scope_device };

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

METAL_FUNC void atomic_thread_fence(mem_flags flags, memory_order, thread_scope scope = thread_scope_device) {
    metalsim_fence(uint(flags), uint(scope));
}

template <class T>
METAL_FUNC T atomic_load_explicit(const volatile atomic<T>* object, memory_order) {
    metalsim_atomic(const_cast<const atomic<T>*>(object), sizeof(T), 0);
    T value;
    __atomic_load(&object->value, &value, __ATOMIC_RELAXED);
    return value;
}
template <class T>
METAL_FUNC void atomic_store_explicit(volatile atomic<T>* object, T desired, memory_order) {
    metalsim_atomic(const_cast<atomic<T>*>(object), sizeof(T), 1);
    __atomic_store(&object->value, &desired, __ATOMIC_RELAXED);
}
template <class T>
METAL_FUNC T atomic_exchange_explicit(volatile atomic<T>* object, T desired, memory_order) {
    metalsim_atomic(const_cast<atomic<T>*>(object), sizeof(T), 2);
    T before;
    __atomic_exchange(&object->value, &desired, &before, __ATOMIC_RELAXED);
    return before;
}
template <class T>
METAL_FUNC bool atomic_compare_exchange_weak_explicit(volatile atomic<T>* object, T* expected, T desired, memory_order,
                                                      memory_order) {
    metalsim_atomic(const_cast<atomic<T>*>(object), sizeof(T), 2);
    return __atomic_compare_exchange(&object->value, expected, &desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
}

#define METALSIM_FETCH(name, expression)                                                                      \
    template <class T>                                                                                        \
    METAL_FUNC T atomic_fetch_##name##_explicit(volatile atomic<T>* object, T operand, memory_order) {        \
        metalsim_atomic(const_cast<atomic<T>*>(object), sizeof(T), 2);                                        \
        T before, after;                                                                                      \
        __atomic_load(&object->value, &before, __ATOMIC_RELAXED);                                             \
        after = T(expression);                                                                                \
        __atomic_store(&object->value, &after, __ATOMIC_RELAXED);                                             \
        return before;                                                                                        \
    }
METALSIM_FETCH(add, before + operand)
METALSIM_FETCH(sub, before - operand)
METALSIM_FETCH(and, before & operand)
METALSIM_FETCH(or, before | operand)
METALSIM_FETCH(xor, before ^ operand)
METALSIM_FETCH(min, before < operand ? before : operand)
METALSIM_FETCH(max, before > operand ? before : operand)
#undef METALSIM_FETCH

}  // namespace metal
