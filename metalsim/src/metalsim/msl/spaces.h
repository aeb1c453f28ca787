// The address spaces, for the parse that finds what Apple's compiler rejects (rejections.py). Included after the other
// headers, which then leave out the functions that take pointers: they are declared here for each address space.
#pragma once

#define device __attribute__((address_space(1)))
#define constant const __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
// A scalar constant of the program is an ordinary constant, marked to tell it from one without an address space.
#define metalsim_program_constant const __attribute__((annotate("constant")))

namespace metalsim {
template <class T>
T& threadgroup_variable(u32 site, const char* name, u64 align);
}

namespace metal {

#define METALSIM_MATRIX_MEMORY(space)                                                                         \
    template <class T>                                                                                        \
    void simdgroup_load(simdgroup_matrix<T, 8, 8>& out, const space T* from, ulong elements_per_row = 8,      \
                        vec<ulong, 2> origin = 0, bool transpose = false);                                    \
    template <class T>                                                                                        \
    void simdgroup_store(simdgroup_matrix<T, 8, 8> matrix, space T* to, ulong elements_per_row = 8,           \
                         vec<ulong, 2> origin = 0, bool transpose = false);
METALSIM_MATRIX_MEMORY(device)
METALSIM_MATRIX_MEMORY(threadgroup)
template <class T>
void simdgroup_load(simdgroup_matrix<T, 8, 8>& out, constant T* from, ulong elements_per_row = 8,
                    vec<ulong, 2> origin = 0, bool transpose = false);

#define METALSIM_FETCH(space, name)                                                                           \
    template <class T>                                                                                        \
    T atomic_##name##_explicit(volatile space atomic<T>* object, identity_t<T> operand, memory_order);
#define METALSIM_ATOMICS(space)                                                                               \
    template <class T>                                                                                        \
    T atomic_load_explicit(const volatile space atomic<T>* object, memory_order);                             \
    template <class T>                                                                                        \
    void atomic_store_explicit(volatile space atomic<T>* object, identity_t<T> desired, memory_order);        \
    template <class T>                                                                                        \
    bool atomic_compare_exchange_weak_explicit(volatile space atomic<T>* object, T* expected,                 \
                                               identity_t<T> desired, memory_order, memory_order);            \
    METALSIM_FETCH(space, exchange)                                                                           \
    METALSIM_FETCH(space, fetch_add)                                                                          \
    METALSIM_FETCH(space, fetch_sub)                                                                          \
    METALSIM_FETCH(space, fetch_and)                                                                          \
    METALSIM_FETCH(space, fetch_or)                                                                           \
    METALSIM_FETCH(space, fetch_xor)                                                                          \
    METALSIM_FETCH(space, fetch_min)                                                                          \
    METALSIM_FETCH(space, fetch_max)
METALSIM_ATOMICS(device)
METALSIM_ATOMICS(threadgroup)

}  // namespace metal
