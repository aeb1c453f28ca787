#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;

#define INFINITE as_type<float>(0x7f800000u)  // fast math leaves INFINITY undefined
#define MAX_OF(a, b) ((a) > (b) ? (a) : (b))
#define MIN_OF(a, b) ((a) < (b) ? (a) : (b))
#define UNROLL _Pragma("clang loop unroll(full)")
#define ROLLED _Pragma("clang loop unroll(disable)")

constant constexpr float LOG2_E = 1.44269504088896340736f;
constant constexpr float LN_2 = 0.69314718055994530942f;
