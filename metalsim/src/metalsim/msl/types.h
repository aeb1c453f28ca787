// Scalar, vector and packed types of the Metal Shading Language, as clang's extended vectors.
#pragma once

typedef _Float16 half;
typedef __bf16 bfloat;
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;

typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef uchar uint8_t;
typedef ushort uint16_t;
typedef uint uint32_t;
typedef ulong uint64_t;
typedef __SIZE_TYPE__ size_t;
typedef __PTRDIFF_TYPE__ ptrdiff_t;
typedef __INTPTR_TYPE__ intptr_t;
typedef __UINTPTR_TYPE__ uintptr_t;

template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));

#ifdef METALSIM_SPACES
// A parse that only asks for address spaces can do with the plain vector.
template <class T, int N>
using packed_vec = vec<T, N>;
#else
/// A vector with the alignment of its elements. It moves through memory as one access of N elements.
template <class T, int N>
struct packed_vec {
    T elements[N];
    packed_vec() = default;
    packed_vec(vec<T, N> v) { __builtin_memcpy(elements, &v, sizeof elements); }
    packed_vec(T splat) : packed_vec(vec<T, N>(splat)) {}
    operator vec<T, N>() const {
        vec<T, N> v;
        __builtin_memcpy(&v, elements, sizeof elements);
        return v;
    }
    T& operator[](int i) { return elements[i]; }
    T operator[](int i) const { return elements[i]; }
};

#define METALSIM_PACKED_OPERATOR(op)                                                                          \
    template <class T, int N>                                                                                 \
    vec<T, N> operator op(const packed_vec<T, N>& a, const packed_vec<T, N>& b) {                             \
        return vec<T, N>(a) op vec<T, N>(b);                                                                  \
    }                                                                                                         \
    template <class T, int N>                                                                                 \
    vec<T, N> operator op(const packed_vec<T, N>& a, vec<T, N> b) { return vec<T, N>(a) op b; }               \
    template <class T, int N>                                                                                 \
    vec<T, N> operator op(vec<T, N> a, const packed_vec<T, N>& b) { return a op vec<T, N>(b); }               \
    template <class T, int N>                                                                                 \
    vec<T, N> operator op(const packed_vec<T, N>& a, T b) { return vec<T, N>(a) op b; }                       \
    template <class T, int N>                                                                                 \
    vec<T, N> operator op(T a, const packed_vec<T, N>& b) { return a op vec<T, N>(b); }
METALSIM_PACKED_OPERATOR(+)
METALSIM_PACKED_OPERATOR(-)
METALSIM_PACKED_OPERATOR(*)
METALSIM_PACKED_OPERATOR(/)
#undef METALSIM_PACKED_OPERATOR
#endif

#define METALSIM_VECTORS(T)                                                                                   \
    typedef vec<T, 2> T##2;                                                                                   \
    typedef vec<T, 3> T##3;                                                                                   \
    typedef vec<T, 4> T##4;                                                                                   \
    typedef packed_vec<T, 2> packed_##T##2;                                                                   \
    typedef packed_vec<T, 3> packed_##T##3;                                                                   \
    typedef packed_vec<T, 4> packed_##T##4;
#define METALSIM_EACH_SCALAR(X)                                                                               \
    X(bool) X(char) X(uchar) X(short) X(ushort) X(int) X(uint) X(long) X(ulong) X(half) X(float) X(bfloat)
METALSIM_EACH_SCALAR(METALSIM_VECTORS)

namespace metal {
using ::half, ::bfloat, ::uchar, ::ushort, ::uint, ::ulong, ::vec;
using ::int8_t, ::int16_t, ::int32_t, ::int64_t, ::uint8_t, ::uint16_t, ::uint32_t, ::uint64_t;
using ::size_t, ::ptrdiff_t, ::intptr_t, ::uintptr_t;
#define METALSIM_EXPORT(T)                                                                                    \
    using ::T##2, ::T##3, ::T##4, ::packed_##T##2, ::packed_##T##3, ::packed_##T##4;
METALSIM_EACH_SCALAR(METALSIM_EXPORT)
#undef METALSIM_EXPORT
}  // namespace metal

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define HUGE_VALF __builtin_inff()
#define MAXFLOAT __FLT_MAX__
#define FLT_MAX __FLT_MAX__
#define FLT_MIN __FLT_MIN__
#define FLT_EPSILON __FLT_EPSILON__
#define FLT_DIG 6
#define FLT_MANT_DIG 24
#define MAXHALF half(65504)
#define HALF_MAX half(65504)
#define HALF_MIN half(6.103515625e-05f)
#define HALF_EPSILON half(9.765625e-04f)
#define INT_MAX 2147483647
#define INT_MIN (-INT_MAX - 1)
#define UINT_MAX 4294967295u
#define SHRT_MAX 32767
#define USHRT_MAX 65535
#define LONG_MAX 9223372036854775807l
#define ULONG_MAX 18446744073709551615ul
#define M_E_F 2.71828182845904523536f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LOG10E_F 0.43429448190325182765f
#define M_LN2_F 0.69314718055994530942f
#define M_LN10_F 2.30258509299404568402f
#define M_PI_F 3.14159265358979323846f
#define M_PI_2_F 1.57079632679489661923f
#define M_PI_4_F 0.78539816339744830962f
#define M_1_PI_F 0.31830988618379067154f
#define M_2_PI_F 0.63661977236758134308f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.70710678118654752440f
#define METAL_FUNC inline __attribute__((always_inline))
#define METAL_CONST
#define METAL_INTERNAL inline
