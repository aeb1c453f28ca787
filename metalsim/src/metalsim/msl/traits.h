// <metal_type_traits>, <metal_limits> and <metal_array>: what kernels use of them.
#pragma once
#include "types.h"

namespace metal {

template <class T, T V>
struct integral_constant {
    static constexpr T value = V;
    using value_type = T;
    using type = integral_constant;
    constexpr operator T() const { return V; }
    constexpr T operator()() const { return V; }
};
template <bool V>
using bool_constant = integral_constant<bool, V>;
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;

template <bool C, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
    using type = T;
};
template <bool C, class T = void>
using enable_if_t = typename enable_if<C, T>::type;

template <bool C, class A, class B>
struct conditional {
    using type = A;
};
template <class A, class B>
struct conditional<false, A, B> {
    using type = B;
};
template <bool C, class A, class B>
using conditional_t = typename conditional<C, A, B>::type;

template <class T>
struct remove_const {
    using type = __remove_const(T);
};
template <class T>
struct remove_cv {
    using type = __remove_cv(T);
};
template <class T>
struct remove_reference {
    using type = __remove_reference_t(T);
};
template <class T>
struct remove_pointer {
    using type = __remove_pointer(T);
};
template <class T>
using remove_const_t = typename remove_const<T>::type;
template <class T>
using remove_cv_t = typename remove_cv<T>::type;
template <class T>
using remove_reference_t = typename remove_reference<T>::type;
template <class T>
using remove_pointer_t = typename remove_pointer<T>::type;
template <class T>
using decay_t = __decay(T);
template <class...>
using void_t = void;

template <class A, class B>
struct is_same : bool_constant<__is_same(A, B)> {};
template <class A, class B>
constexpr bool is_same_v = __is_same(A, B);
template <class A, class B>
struct is_convertible : bool_constant<__is_convertible(A, B)> {};
template <class A, class B>
constexpr bool is_convertible_v = __is_convertible(A, B);

template <class T>
constexpr bool is_floating_point_v = is_same_v<remove_cv_t<T>, float> || is_same_v<remove_cv_t<T>, half> ||
                                     is_same_v<remove_cv_t<T>, bfloat>;
template <class T>
struct is_floating_point : bool_constant<is_floating_point_v<T>> {};
template <class T>
constexpr bool is_integral_v = __is_integral(T);
template <class T>
struct is_integral : bool_constant<is_integral_v<T>> {};
template <class T>
constexpr bool is_arithmetic_v = is_integral_v<T> || is_floating_point_v<T>;
template <class T>
struct is_arithmetic : bool_constant<is_arithmetic_v<T>> {};
template <class T>
constexpr bool is_scalar_v = is_arithmetic_v<T> || __is_pointer(T) || __is_enum(T);
template <class T>
struct is_scalar : bool_constant<is_scalar_v<T>> {};
template <class T>
constexpr bool is_signed_v = is_floating_point_v<T> || __is_signed(T);
template <class T>
struct is_signed : bool_constant<is_signed_v<T>> {};
template <class T>
constexpr bool is_unsigned_v = __is_unsigned(T);
template <class T>
struct is_unsigned : bool_constant<is_unsigned_v<T>> {};
template <class T>
constexpr bool is_pointer_v = __is_pointer(T);
template <class T>
struct is_pointer : bool_constant<is_pointer_v<T>> {};
template <class T>
constexpr bool is_enum_v = __is_enum(T);
template <class T>
using make_unsigned_t = __make_unsigned(T);
template <class T>
using make_signed_t = __make_signed(T);

template <class T>
T&& declval();
template <class T>
constexpr remove_reference_t<T>&& move(T&& x) {
    return static_cast<remove_reference_t<T>&&>(x);
}

template <class T>
struct numeric_limits;
#define METALSIM_INTEGER_LIMITS(T, LO, HI)                                                                    \
    template <>                                                                                               \
    struct numeric_limits<T> {                                                                                \
        static constexpr bool is_integer = true, is_signed = T(-1) < T(1);                                    \
        static constexpr T min() { return LO; }                                                               \
        static constexpr T lowest() { return LO; }                                                            \
        static constexpr T max() { return HI; }                                                               \
    };
METALSIM_INTEGER_LIMITS(bool, false, true)
METALSIM_INTEGER_LIMITS(char, -128, 127)
METALSIM_INTEGER_LIMITS(int8_t, -128, 127)
METALSIM_INTEGER_LIMITS(uchar, 0, 255)
METALSIM_INTEGER_LIMITS(short, -32768, 32767)
METALSIM_INTEGER_LIMITS(ushort, 0, 65535)
METALSIM_INTEGER_LIMITS(int, INT_MIN, INT_MAX)
METALSIM_INTEGER_LIMITS(uint, 0, UINT_MAX)
METALSIM_INTEGER_LIMITS(long, -LONG_MAX - 1, LONG_MAX)
METALSIM_INTEGER_LIMITS(ulong, 0, ULONG_MAX)
#undef METALSIM_INTEGER_LIMITS
#define METALSIM_FLOAT_LIMITS(T, MIN, MAX, EPS)                                                               \
    template <>                                                                                               \
    struct numeric_limits<T> {                                                                                \
        static constexpr bool is_integer = false, is_signed = true;                                           \
        static constexpr T min() { return T(MIN); }                                                           \
        static constexpr T lowest() { return T(-MAX); }                                                       \
        static constexpr T max() { return T(MAX); }                                                           \
        static constexpr T epsilon() { return T(EPS); }                                                       \
        static constexpr T infinity() { return T(__builtin_inff()); }                                         \
        static constexpr T quiet_NaN() { return T(__builtin_nanf("")); }                                      \
    };
METALSIM_FLOAT_LIMITS(float, __FLT_MIN__, __FLT_MAX__, __FLT_EPSILON__)
METALSIM_FLOAT_LIMITS(half, 6.103515625e-05f, 65504.0f, 9.765625e-04f)
METALSIM_FLOAT_LIMITS(bfloat, 1.1754943508222875e-38f, 3.3895313892515355e38f, 0.0078125f)
#undef METALSIM_FLOAT_LIMITS

template <class T, size_t N>
struct array {
    T elements[N];
    constexpr T& operator[](size_t i) { return elements[i]; }
    constexpr const T& operator[](size_t i) const { return elements[i]; }
    constexpr size_t size() const { return N; }
};

}  // namespace metal

namespace metalsim {
template <class T>
struct vector_traits {
    static constexpr bool is_vector = false;
    static constexpr int size = 1;
    using element = T;
};
template <class T, int N>
struct vector_traits<vec<T, N>> {
    static constexpr bool is_vector = true;
    static constexpr int size = N;
    using element = T;
};
#ifndef METALSIM_SPACES
template <class T, int N>
struct vector_traits<packed_vec<T, N>> : vector_traits<vec<T, N>> {};
#endif
template <class T>
constexpr bool is_vector = vector_traits<T>::is_vector;
template <class T>
using element = typename vector_traits<T>::element;
template <class T>
constexpr int size = vector_traits<T>::size;
template <class T>
constexpr bool is_packed = false;
#ifndef METALSIM_SPACES
template <class T, int N>
constexpr bool is_packed<packed_vec<T, N>> = true;
#endif
}  // namespace metalsim
