// How a kernel function is entered: each parameter comes from a buffer or from the thread's position.
#pragma once
#include "atomic.h"

namespace metalsim {

/// A parameter's source: `buffer >= 0` is a buffer index, else `builtin` names a member of Position.
struct Binding {
    int buffer;
    Uint3 Position::* builtin;
};

template <class A>
METAL_FUNC A argument(const Binding& binding, void* const* buffers, const Position* position) {
    if constexpr (__is_pointer(A)) {
        return reinterpret_cast<A>(buffers[binding.buffer]);
    } else if constexpr (__is_lvalue_reference(A)) {
        return *reinterpret_cast<__remove_reference_t(A)*>(buffers[binding.buffer]);
    } else {
        const Uint3& value = position->*binding.builtin;
        if constexpr (!is_vector<A>)
            return A(value.x);
        else if constexpr (size<A> == 2)
            return A{element<A>(value.x), element<A>(value.y)};
        else
            return A{element<A>(value.x), element<A>(value.y), element<A>(value.z)};
    }
}

constexpr int kMaxBuffers = 31;
template <unsigned N>
constexpr bool buffers_in_range(const Binding (&bindings)[N]) {
    for (const Binding& b : bindings)
        if (b.buffer >= kMaxBuffers || b.buffer < -1) return false;
    return true;
}

template <class T, T... I>
struct Indices {};

template <auto Kernel, const auto& Bindings, class... A, u32... I>
METAL_FUNC void enter(void (*)(A...), Indices<u32, I...>, void* const* buffers, const Position* position) {
    Kernel(argument<A>(Bindings[I], buffers, position)...);
}
template <auto Kernel, const auto& Bindings, class... A>
METAL_FUNC void enter(void (*kernel)(A...), void* const* buffers, const Position* position) {
    enter<Kernel, Bindings>(kernel, __make_integer_seq<Indices, u32, sizeof...(A)>(), buffers, position);
}

#ifndef METALSIM_SPACES
/// The storage of a threadgroup variable.
template <class T>
METAL_FUNC T& threadgroup_variable(u32 site, const char* name, u64 align) {
    return *reinterpret_cast<T*>(
        metalsim_threadgroup_variable(site, name, sizeof(T), align > alignof(T) ? align : alignof(T)));
}
#endif

}  // namespace metalsim

/// The entry of kernel `n`, and its buffer indices for the host: not part of what a checked run watches.
#define METALSIM_HOST                                                                                         \
    extern "C" __attribute__((visibility("default"), no_sanitize("kernel-address")))
#define METALSIM_ENTRY(n, ...)                                                                                \
    static_assert(metalsim::buffers_in_range(metalsim_bindings_##n), "buffer indices are 0 to 30");           \
    METALSIM_HOST void metalsim_kernel_##n(void* const* buffers, const metalsim::Position* position) {        \
        metalsim::enter<&__VA_ARGS__, metalsim_bindings_##n>(&__VA_ARGS__, buffers, position);                \
    }                                                                                                         \
    METALSIM_HOST void metalsim_buffers_##n(int* out) {                                                       \
        for (const metalsim::Binding& b : metalsim_bindings_##n) *out++ = b.buffer;                           \
    }
