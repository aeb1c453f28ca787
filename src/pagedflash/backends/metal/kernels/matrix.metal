// 8x8 matrices spread over a simdgroup: each lane holds two neighbouring elements of one row, at
//
//   row  = (lane / 16) * 4 + (lane / 2) % 4        column, column + 1  with  column = (lane / 8) % 2 * 4 + lane % 2 * 2
//
// The lanes that share a row differ in bits 0 and 3 of their number.

inline int matrix_row(int lane) { return (lane / 16) * 4 + (lane / 2) % 4; }
inline int matrix_column(int lane) { return (lane / 8) % 2 * 4 + lane % 2 * 2; }

// The lane that holds elements (row, column) and (row, column + 1), for an even column.
inline ushort lane_at(int row, int column) { return ushort(row / 4 * 16 + row % 4 * 2 + column / 4 * 8 + column % 4 / 2); }

// Sums over dims may be taken in any order, so the 8 dims of one matrix need not be neighbours. They are as far apart as one
// load is wide: a lane that has loaded WIDTH neighbouring dims then has one element of each of WIDTH matrices. Behind the last
// whole 8 * WIDTH dims the loads are TAIL wide (0 = there is none behind).
//
//   WIDTH = 8:   matrix 0 has dims 0, 8, 16, ... 56,   matrix 1 dims 1, 9, 17, ... 57,   ...   matrix 8 dims 64, 72, ... 120
//
template <int WIDTH, int CHUNKS, int TAIL>
struct DimOrder {
    static int matrix_of(int d) {
        return d < CHUNKS * 8 * WIDTH ? d / (8 * WIDTH) * WIDTH + d % WIDTH : CHUNKS * WIDTH + d % MAX_OF(TAIL, 1);
    }
    static int slot_of(int d) {
        return d < CHUNKS * 8 * WIDTH ? d % (8 * WIDTH) / WIDTH : (d - CHUNKS * 8 * WIDTH) / MAX_OF(TAIL, 1);
    }
    static int dim_at(int matrix, int slot) {
        return matrix < CHUNKS * WIDTH ? matrix / WIDTH * 8 * WIDTH + slot * WIDTH + matrix % WIDTH
                                       : CHUNKS * 8 * WIDTH + slot * TAIL + (matrix - CHUNKS * WIDTH);
    }
};

// c += a b
inline void multiply_add(thread float2& c, Pair a, Pair b) {
    simdgroup_matrix<T, 8, 8> ma, mb;
    simdgroup_matrix<float, 8, 8> mc;
    reinterpret_cast<thread Pair&>(ma.thread_elements()) = a;
    reinterpret_cast<thread Pair&>(mb.thread_elements()) = b;
    reinterpret_cast<thread float2&>(mc.thread_elements()) = c;
    simdgroup_multiply_accumulate(mc, ma, mb, mc);
    c = reinterpret_cast<thread float2&>(mc.thread_elements());
}

// products += A B^T over READ dims: A is fragments, B the rows that lie `stride` apart, READ elements of each behind the pointer.
template <int READ, int BLOCKS>
inline void multiply_read(thread float2* products, thread const Pair* fragments, threadgroup const T* rows, int stride) {
    UNROLL
    for (int j = 0; j < BLOCKS; j++) {
        threadgroup const T* first = rows + j * 8 * stride;
        const Packed<READ> x = *reinterpret_cast<threadgroup const Packed<READ>*>(first);
        const Packed<READ> y = *reinterpret_cast<threadgroup const Packed<READ>*>(first + stride);
        UNROLL
        for (int i = 0; i < READ; i++) multiply_add(products[j], fragments[i], Elements<T>::pair_of(x, y, i));
    }
}

// products = A B^T for 8 * BLOCKS rows of B in threadgroup memory, of which this lane reads two of each 8. The dims are in the
// order of DimOrder<WIDTH, CHUNKS, TAIL>.
template <int BLOCKS, int WIDTH, int CHUNKS, int TAIL>
inline void multiply_rows(
    thread float2* products, thread const Pair* fragments, threadgroup const T* rows, int stride, int lane
) {
    const int slot = matrix_row(lane);
    threadgroup const T* row = rows + matrix_column(lane) * stride;
    UNROLL
    for (int j = 0; j < BLOCKS; j++) products[j] = float2(0.0f);
    UNROLL
    for (int c = 0; c < CHUNKS; c++) {
        simdgroup_barrier(mem_flags::mem_none);  // so that compilers do not read all rows first, into registers
        multiply_read<WIDTH, BLOCKS>(products, fragments + c * WIDTH, row + (c * 8 + slot) * WIDTH, stride);
    }
    if (TAIL > 0) {
        const int read = MAX_OF(TAIL, 1);
        multiply_read<read, BLOCKS>(products, fragments + CHUNKS * WIDTH, row + CHUNKS * 8 * WIDTH + slot * read, stride);
    }
}

inline float row_max(float x) {
    x = max(x, simd_shuffle_xor(x, ushort(1)));
    return max(x, simd_shuffle_xor(x, ushort(8)));
}

inline float row_sum(float x) {
    x += simd_shuffle_xor(x, ushort(1));
    return x + simd_shuffle_xor(x, ushort(8));
}

// Elements (column, row) and (column + 1, row) of the matrix of which this lane holds x, in T.
inline Pair transposed(float2 x, int lane) {
    const int row = matrix_row(lane), column = matrix_column(lane);
    const ushort first = lane_at(column, row & ~1), second = lane_at(column + 1, row & ~1);
    const bool odd = (row & 1) != 0;
#if T_BYTES == 4
    const float even_of_first = simd_shuffle(x.x, first), odd_of_first = simd_shuffle(x.y, first);
    const float even_of_second = simd_shuffle(x.x, second), odd_of_second = simd_shuffle(x.y, second);
    return Pair(odd ? odd_of_first : even_of_first, odd ? odd_of_second : even_of_second);
#else
    const uint both = as_type<uint>(Pair(T(x.x), T(x.y)));
    const uint a = simd_shuffle(both, first), b = simd_shuffle(both, second);
    return as_type<Pair>(odd ? (a >> 16) | (b & 0xffff0000u) : (a & 0xffffu) | (b << 16));
#endif
}

// One value for each row, held by the lanes of that row: those of the rows that are this lane's columns.
inline float2 of_columns(float of_row, int lane) {
    const int column = matrix_column(lane);
    return float2(simd_shuffle(of_row, lane_at(column, 0)), simd_shuffle(of_row, lane_at(column + 1, 0)));
}
