// 8x8 matrices spread over a simdgroup: each lane holds two neighbouring elements of one row, at
//
//   row  = (lane / 16) * 4 + (lane / 2) % 4        column, column + 1  with  column = (lane / 8) % 2 * 4 + lane % 2 * 2
//
// The lanes that share a row differ in bits 0 and 3 of their number.

inline int fragment_row(int lane) { return (lane / 16) * 4 + (lane / 2) % 4; }
inline int fragment_column(int lane) { return (lane / 8) % 2 * 4 + lane % 2 * 2; }

// c += a b
inline void multiply_add(thread float2& c, float2 a, float2 b) {
    simdgroup_matrix<float, 8, 8> ma, mb, mc;
    reinterpret_cast<thread float2&>(ma.thread_elements()) = a;
    reinterpret_cast<thread float2&>(mb.thread_elements()) = b;
    reinterpret_cast<thread float2&>(mc.thread_elements()) = c;
    simdgroup_multiply_accumulate(mc, ma, mb, mc);
    c = reinterpret_cast<thread float2&>(mc.thread_elements());
}

inline float row_max(float x) {
    x = max(x, simd_shuffle_xor(x, ushort(1)));
    return max(x, simd_shuffle_xor(x, ushort(8)));
}

inline float row_sum(float x) {
    x += simd_shuffle_xor(x, ushort(1));
    return x + simd_shuffle_xor(x, ushort(8));
}
