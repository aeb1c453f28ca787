// Conversions and vector constructors. The translator writes `float4(a, b)` as `metalsim_make<float4>(a, b)`,
// `static_cast<T>(x)` as `metalsim_cast<T>(x)` and `(T)x` as `metalsim_cast_to<T>{} ->* x`, because clang's own casts
// between vectors reinterpret bits where Metal's convert values.
#pragma once
#include "traits.h"

namespace metalsim {

template <class V, class A>
METAL_FUNC void append(V& out, int& at, A a) {
    if constexpr (is_packed<A>) {
        append(out, at, vec<element<A>, size<A>>(a));
    } else if constexpr (is_vector<A>) {
        for (int i = 0; i < size<A>; ++i) out[at++] = element<V>(a[i]);
    } else {
        out[at++] = element<V>(a);
    }
}

template <class V, class A>
METAL_FUNC V convert(A a) {
    if constexpr (is_packed<V>) {
        return V(convert<vec<element<V>, size<V>>>(a));
    } else if constexpr (is_packed<A>) {
        return convert<V>(vec<element<A>, size<A>>(a));
    } else if constexpr (is_vector<V> && is_vector<A>) {
        static_assert(size<V> == size<A>, "conversion between vectors of different lengths");
        return __builtin_convertvector(a, V);
    } else if constexpr (is_vector<V>) {
        return V(element<V>(a));
    } else {
        return static_cast<V>(a);
    }
}

}  // namespace metalsim

template <class T>
METAL_FUNC constexpr T metalsim_make() {
    return T();
}
template <class T, class A>
METAL_FUNC constexpr T metalsim_make(A a) {
    if constexpr (metalsim::is_vector<T>)
        return metalsim::convert<T>(a);
    else
        return T(a);
}
// Packed vectors come by reference: by value they would be loaded in pieces.
#ifndef METALSIM_SPACES
template <class T, class E, int N>
METAL_FUNC T metalsim_make(const packed_vec<E, N>& a) {
    return metalsim_make<T>(vec<E, N>(a));
}
#endif
template <class T, class A, class B, class... More>
METAL_FUNC constexpr T metalsim_make(A a, B b, More... more) {
    if constexpr (metalsim::is_vector<T>) {
        static_assert(metalsim::size<A> + metalsim::size<B> + (0 + ... + metalsim::size<More>) == metalsim::size<T>,
                      "vector constructor: the number of components does not match");
        vec<metalsim::element<T>, metalsim::size<T>> out;
        int at = 0;
        metalsim::append(out, at, a);
        metalsim::append(out, at, b);
        (metalsim::append(out, at, more), ...);
        return out;
    } else {
        return T(a, b, more...);
    }
}

template <class T, class A>
METAL_FUNC constexpr T metalsim_cast(A a) {
    if constexpr (metalsim::is_vector<T>)
        return metalsim::convert<T>(a);
    else
        return static_cast<T>(a);
}

#ifndef METALSIM_SPACES
template <class T, class E, int N>
METAL_FUNC T metalsim_cast(const packed_vec<E, N>& a) {
    return metalsim_cast<T>(vec<E, N>(a));
}
#endif

template <class T>
struct metalsim_cast_to {};
template <class T, class A>
METAL_FUNC constexpr T operator->*(metalsim_cast_to<T>, A a) {
    if constexpr (metalsim::is_vector<T>)
        return metalsim::convert<T>(a);
    else
        return (T)a;
}
#ifndef METALSIM_SPACES
template <class T, class E, int N>
METAL_FUNC T operator->*(metalsim_cast_to<T>, const packed_vec<E, N>& a) {
    return metalsim_cast<T>(vec<E, N>(a));
}
#endif

namespace metal {
using ::metalsim_make, ::metalsim_cast_to;

template <class T, class A>
METAL_FUNC constexpr T as_type(A a) {
    static_assert(sizeof(T) == sizeof(A), "as_type between types of different sizes");
    return __builtin_bit_cast(T, a);
}
}  // namespace metal
using metal::as_type;
