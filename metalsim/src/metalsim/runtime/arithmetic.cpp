// Conversions that clang leaves to its support library, for processors without the instructions.
typedef __UINT32_TYPE__ u32;

// bfloat is returned in a vector register, like any __bf16.
extern "C" __bf16 __truncsfbf2(float x) {
    u32 bits = __builtin_bit_cast(u32, x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return __builtin_bit_cast(__bf16, (unsigned short)(bits >> 16 | 0x40));
    bits += 0x7fff + (bits >> 16 & 1);  // to nearest, ties to even
    return __builtin_bit_cast(__bf16, (unsigned short)(bits >> 16));
}
extern "C" __bf16 __truncdfbf2(double x) { return __truncsfbf2((float)x); }
