// <metal_math>, <metal_common>, <metal_integer>, <metal_relational>, <metal_geometric>.
//
// Scalar functions are overloads and not templates, so that mixed arguments convert, or are ambiguous, as in Metal.
#pragma once
#include "convert.h"

namespace metal {

#define METALSIM_IF_FLOAT(T) metal::enable_if_t<metal::is_floating_point_v<metalsim::element<T>>, T>
#define METALSIM_IF_INT(T) metal::enable_if_t<metal::is_integral_v<metalsim::element<T>>, T>
#define METALSIM_IF_VECTOR(T, S)                                                                              \
    metal::enable_if_t<metalsim::is_vector<T> && metal::is_same_v<metalsim::element<T>, S>, T>

#define METALSIM_IF_FLOAT_VECTOR(T)                                                                           \
    metal::enable_if_t<metalsim::is_vector<T> && metal::is_floating_point_v<metalsim::element<T>>, T>

#define METALSIM_UNARY(name, builtin)                                                                         \
    METAL_FUNC float name(float x) { return builtin(x); }                                                     \
    METAL_FUNC half name(half x) { return builtin(x); }                                                       \
    METAL_FUNC bfloat name(bfloat x) { return builtin(x); }                                                   \
    template <class T>                                                                                        \
    METAL_FUNC METALSIM_IF_FLOAT_VECTOR(T) name(T x) { return builtin(x); }
#define METALSIM_EACH_UNARY(X)                                                                                \
    X(ceil, __builtin_elementwise_ceil) X(cos, __builtin_elementwise_cos)                                     \
    X(exp, __builtin_elementwise_exp) X(exp2, __builtin_elementwise_exp2)                                     \
    X(exp10, __builtin_elementwise_exp10) X(floor, __builtin_elementwise_floor)                               \
    X(log, __builtin_elementwise_log) X(log2, __builtin_elementwise_log2)                                     \
    X(log10, __builtin_elementwise_log10) X(rint, __builtin_elementwise_rint)                                 \
    X(round, __builtin_elementwise_round) X(sin, __builtin_elementwise_sin)                                   \
    X(sqrt, __builtin_elementwise_sqrt) X(tan, __builtin_elementwise_tan)                                     \
    X(tanh, __builtin_elementwise_tanh) X(trunc, __builtin_elementwise_trunc)                                 \
    X(acos, __builtin_elementwise_acos) X(asin, __builtin_elementwise_asin)                                   \
    X(atan, __builtin_elementwise_atan) X(cosh, __builtin_elementwise_cosh)                                   \
    X(sinh, __builtin_elementwise_sinh)                                                                       \
    X(fabs, __builtin_elementwise_abs)
METALSIM_EACH_UNARY(METALSIM_UNARY)

template <class T>
METAL_FUNC METALSIM_IF_FLOAT(T) rsqrt(T x) {
    return T(1) / sqrt(x);
}
template <class T>
METAL_FUNC METALSIM_IF_FLOAT(T) fract(T x) {
    return x - floor(x);
}
template <class T>
METAL_FUNC METALSIM_IF_FLOAT(T) cospi(T x) {
    return cos(x * T(M_PI_F));
}
template <class T>
METAL_FUNC METALSIM_IF_FLOAT(T) sinpi(T x) {
    return sin(x * T(M_PI_F));
}

#define METALSIM_BINARY(name, builtin)                                                                        \
    METAL_FUNC float name(float x, float y) { return builtin(x, y); }                                         \
    METAL_FUNC half name(half x, half y) { return builtin(x, y); }                                            \
    METAL_FUNC bfloat name(bfloat x, bfloat y) { return builtin(x, y); }                                      \
    template <class T>                                                                                        \
    METAL_FUNC METALSIM_IF_FLOAT_VECTOR(T) name(T x, T y) { return builtin(x, y); }                           \
    template <class T, class S>                                                                               \
    METAL_FUNC METALSIM_IF_VECTOR(T, S) name(T x, S y) { return name(x, T(y)); }
#define METALSIM_EACH_BINARY(X)                                                                               \
    X(fmin, __builtin_elementwise_minnum) X(fmax, __builtin_elementwise_maxnum)                               \
    X(pow, __builtin_elementwise_pow) X(powr, __builtin_elementwise_pow)                                      \
    X(fmod, __builtin_elementwise_fmod) X(copysign, __builtin_elementwise_copysign)                           \
    X(atan2, __builtin_elementwise_atan2)
METALSIM_EACH_BINARY(METALSIM_BINARY)

#define METALSIM_EACH_INTEGER(X) X(char) X(uchar) X(short) X(ushort) X(int) X(uint) X(long) X(ulong)
#define METALSIM_EACH_FLOAT(X) X(float) X(half) X(bfloat)

#define METALSIM_INTEGER_MINMAX(T)                                                                            \
    METAL_FUNC constexpr T min(T x, T y) { return y < x ? y : x; }                                            \
    METAL_FUNC constexpr T max(T x, T y) { return x < y ? y : x; }                                            \
    METAL_FUNC constexpr T clamp(T x, T lo, T hi) { return min(max(x, lo), hi); }
METALSIM_EACH_INTEGER(METALSIM_INTEGER_MINMAX)
// Of a number and a NaN both return the number.
#define METALSIM_FLOAT_MINMAX(T)                                                                              \
    METAL_FUNC constexpr T min(T x, T y) { return x != x ? y : y < x ? y : x; }                               \
    METAL_FUNC constexpr T max(T x, T y) { return x != x ? y : x < y ? y : x; }                               \
    METAL_FUNC constexpr T clamp(T x, T lo, T hi) { return min(max(x, lo), hi); }                             \
    METAL_FUNC T fma(T a, T b, T c) { return __builtin_elementwise_fma(a, b, c); }
METALSIM_EACH_FLOAT(METALSIM_FLOAT_MINMAX)

#define METALSIM_VECTOR_MINMAX(name)                                                                          \
    template <class T, int N>                                                                                 \
    METAL_FUNC vec<T, N> name(vec<T, N> x, vec<T, N> y) {                                                     \
        if constexpr (is_floating_point_v<T>)                                                                 \
            return __builtin_elementwise_##name##num(x, y);                                                   \
        else                                                                                                  \
            return __builtin_elementwise_##name(x, y);                                                        \
    }                                                                                                         \
    template <class T, int N>                                                                                 \
    METAL_FUNC vec<T, N> name(vec<T, N> x, T y) { return name(x, vec<T, N>(y)); }                             \
    template <class T>                                                                                        \
    METAL_FUNC constexpr T name##3(T x, T y, T z) { return name(name(x, y), z); }
METALSIM_VECTOR_MINMAX(min)
METALSIM_VECTOR_MINMAX(max)

template <class T, int N>
METAL_FUNC vec<T, N> clamp(vec<T, N> x, vec<T, N> lo, vec<T, N> hi) {
    return min(max(x, lo), hi);
}
template <class T, int N>
METAL_FUNC vec<T, N> clamp(vec<T, N> x, T lo, T hi) {
    return min(max(x, lo), hi);
}
template <class T, int N>
METAL_FUNC vec<T, N> fma(vec<T, N> a, vec<T, N> b, vec<T, N> c) {
    return __builtin_elementwise_fma(a, b, c);
}
template <class T>
METAL_FUNC METALSIM_IF_FLOAT(T) saturate(T x) {
    return clamp(x, T(0), T(1));
}
template <class T>
METAL_FUNC METALSIM_IF_FLOAT(T) mix(T a, T b, T t) {
    return a + (b - a) * t;
}
template <class T, class S>
METAL_FUNC METALSIM_IF_VECTOR(T, S) mix(T a, T b, S t) {
    return a + (b - a) * t;
}
template <class T>
METAL_FUNC METALSIM_IF_FLOAT(T) divide(T a, T b) {
    return a / b;
}
template <class T>
METAL_FUNC METALSIM_IF_FLOAT(T) fdim(T a, T b) {
    return max(a - b, T(0));
}
template <class T>
METAL_FUNC METALSIM_IF_FLOAT(T) sincos(T x, T& c) {
    c = cos(x);
    return sin(x);
}
METAL_FUNC float ldexp(float x, int e) { return __builtin_ldexpf(x, e); }
METAL_FUNC float frexp(float x, int& e) { return __builtin_frexpf(x, &e); }
METAL_FUNC float modf(float x, float& whole) { return __builtin_modff(x, &whole); }

template <class T>
METAL_FUNC constexpr T abs(T x) {
    if constexpr (is_unsigned_v<metalsim::element<T>>)
        return x;
    else
        return __builtin_elementwise_abs(x);
}

#define METALSIM_PREDICATE(name, expression)                                                                  \
    template <class T>                                                                                        \
    METAL_FUNC auto name(T x) {                                                                               \
        if constexpr (metalsim::is_vector<T>) {                                                               \
            vec<bool, metalsim::size<T>> out;                                                                 \
            for (int i = 0; i < metalsim::size<T>; ++i) out[i] = name(x[i]);                                  \
            return out;                                                                                       \
        } else {                                                                                              \
            static_assert(is_floating_point_v<T>, #name " takes a floating point value");                     \
            float f = float(x);                                                                               \
            return bool(expression);                                                                          \
        }                                                                                                     \
    }
METALSIM_PREDICATE(isnan, __builtin_isnan(f))
METALSIM_PREDICATE(isinf, __builtin_isinf(f))
METALSIM_PREDICATE(isfinite, __builtin_isfinite(f))
METALSIM_PREDICATE(isnormal, __builtin_isnormal(f))
METALSIM_PREDICATE(signbit, __builtin_signbit(f))
#undef METALSIM_PREDICATE

template <class T>
METAL_FUNC auto isunordered(T x, T y) {
    return isnan(x) | isnan(y);
}

template <class T>
METAL_FUNC METALSIM_IF_FLOAT(T) sign(T x) {
    if constexpr (metalsim::is_vector<T>) {
        T out;
        for (int i = 0; i < metalsim::size<T>; ++i) out[i] = sign(x[i]);
        return out;
    } else {
        return x > T(0) ? T(1) : x < T(0) ? T(-1) : T(0);
    }
}
template <class T>
METAL_FUNC METALSIM_IF_FLOAT(T) step(T edge, T x) {
    if constexpr (metalsim::is_vector<T>) {
        T out;
        for (int i = 0; i < metalsim::size<T>; ++i) out[i] = step(edge[i], x[i]);
        return out;
    } else {
        return x < edge ? T(0) : T(1);
    }
}
template <class T>
METAL_FUNC METALSIM_IF_FLOAT(T) smoothstep(T lo, T hi, T x) {
    T t = saturate((x - lo) / (hi - lo));
    return t * t * (T(3) - T(2) * t);
}

template <class T, class C>
METAL_FUNC T select(T if_false, T if_true, C condition) {
    if constexpr (metalsim::is_vector<C>) {
        static_assert(metalsim::size<T> == metalsim::size<C>, "select: condition of another length");
        T out;
        for (int i = 0; i < metalsim::size<T>; ++i) out[i] = condition[i] ? if_true[i] : if_false[i];
        return out;
    } else {
        return condition ? if_true : if_false;
    }
}
template <class C>
METAL_FUNC bool any(C c) {
    if constexpr (metalsim::is_vector<C>) {
        bool out = false;
        for (int i = 0; i < metalsim::size<C>; ++i) out |= c[i] != 0;
        return out;
    } else {
        return c;
    }
}
template <class C>
METAL_FUNC bool all(C c) {
    if constexpr (metalsim::is_vector<C>) {
        bool out = true;
        for (int i = 0; i < metalsim::size<C>; ++i) out &= c[i] != 0;
        return out;
    } else {
        return c;
    }
}

template <class T>
METAL_FUNC metalsim::element<T> dot(T a, T b) {
    metalsim::element<T> sum = a[0] * b[0];
    for (int i = 1; i < metalsim::size<T>; ++i) sum += a[i] * b[i];
    return sum;
}
template <class T>
METAL_FUNC metalsim::element<T> length_squared(T a) {
    return dot(a, a);
}
template <class T>
METAL_FUNC metalsim::element<T> length(T a) {
    return sqrt(dot(a, a));
}
template <class T>
METAL_FUNC metalsim::element<T> distance(T a, T b) {
    return length(a - b);
}
template <class T>
METAL_FUNC T normalize(T a) {
    return a * rsqrt(dot(a, a));
}
template <class T>
METAL_FUNC T cross(T a, T b) {
    return a.yzx * b.zxy - a.zxy * b.yzx;
}

template <class T>
METAL_FUNC METALSIM_IF_INT(T) popcount(T x) {
    return __builtin_elementwise_popcount(x);
}
template <class T>
METAL_FUNC METALSIM_IF_INT(T) reverse_bits(T x) {
    return __builtin_elementwise_bitreverse(x);
}
template <class T>
METAL_FUNC METALSIM_IF_INT(T) clz(T x) {
    constexpr int bits = sizeof(T) * 8;
    return x == 0 ? bits : __builtin_clzl(ulong(make_unsigned_t<T>(x))) - (64 - bits);
}
template <class T>
METAL_FUNC METALSIM_IF_INT(T) ctz(T x) {
    return x == 0 ? int(sizeof(T) * 8) : __builtin_ctzl(ulong(x));
}
template <class T>
METAL_FUNC METALSIM_IF_INT(T) mulhi(T a, T b) {
    static_assert(sizeof(T) <= 4, "mulhi of 64-bit integers is not implemented");
    using wide = conditional_t<is_signed_v<T>, long, ulong>;
    return T((wide(a) * wide(b)) >> (sizeof(T) * 8));
}
template <class T>
METAL_FUNC METALSIM_IF_INT(T) addsat(T a, T b) {
    return __builtin_elementwise_add_sat(a, b);
}
template <class T>
METAL_FUNC METALSIM_IF_INT(T) subsat(T a, T b) {
    return __builtin_elementwise_sub_sat(a, b);
}
template <class T>
METAL_FUNC METALSIM_IF_INT(T) absdiff(T a, T b) {
    return a > b ? a - b : b - a;
}
template <class T>
METAL_FUNC METALSIM_IF_INT(T) rotate(T x, T by) {
    constexpr uint bits = sizeof(T) * 8;
    using unsigned_type = make_unsigned_t<T>;
    uint n = uint(by) % bits;
    return n == 0 ? x : T((unsigned_type(x) << n) | (unsigned_type(x) >> (bits - n)));
}
template <class T>
METAL_FUNC METALSIM_IF_INT(T) extract_bits(T x, uint offset, uint bits) {
    constexpr uint width = sizeof(T) * 8;
    return bits == 0 ? T(0) : T(T(x << (width - offset - bits)) >> (width - bits));
}
template <class T>
METAL_FUNC METALSIM_IF_INT(T) insert_bits(T base, T insert, uint offset, uint bits) {
    constexpr uint width = sizeof(T) * 8;
    using unsigned_type = make_unsigned_t<T>;
    unsigned_type mask = bits == width ? ~unsigned_type(0) : unsigned_type(((unsigned_type(1) << bits) - 1) << offset);
    return T((unsigned_type(base) & ~mask) | ((unsigned_type(insert) << offset) & mask));
}
METAL_FUNC int mul24(int a, int b) { return ((a << 8) >> 8) * ((b << 8) >> 8); }
METAL_FUNC uint mul24(uint a, uint b) { return (a & 0xffffffu) * (b & 0xffffffu); }
METAL_FUNC int mad24(int a, int b, int c) { return mul24(a, b) + c; }
METAL_FUNC uint mad24(uint a, uint b, uint c) { return mul24(a, b) + c; }

// The simulator computes both with the host's correctly rounded or nearly so functions: it says nothing of the
// error of Apple's fast:: variants.
#define METALSIM_REEXPORT(name, builtin) using metal::name;
namespace fast {
METALSIM_EACH_UNARY(METALSIM_REEXPORT)
METALSIM_EACH_BINARY(METALSIM_REEXPORT)
using metal::min, metal::max, metal::clamp, metal::rsqrt, metal::divide, metal::fma, metal::fract, metal::sincos;
using metal::abs, metal::saturate, metal::mix, metal::normalize, metal::length, metal::distance;
}  // namespace fast
namespace precise {
METALSIM_EACH_UNARY(METALSIM_REEXPORT)
METALSIM_EACH_BINARY(METALSIM_REEXPORT)
using metal::min, metal::max, metal::clamp, metal::rsqrt, metal::divide, metal::fma, metal::fract, metal::sincos;
using metal::abs, metal::saturate, metal::mix, metal::normalize, metal::length, metal::distance;
}  // namespace precise
#undef METALSIM_REEXPORT
#undef METALSIM_UNARY
#undef METALSIM_BINARY

}  // namespace metal
