// <metal_simdgroup_matrix>: 8x8 matrices spread over the 32 lanes of a simdgroup.
//
// Lane l holds two neighbouring elements of one row (the layout of Apple's GPUs, which thread_elements() exposes):
//
//     column   0 1    2 3    4 5    6 7
//     row 0   l= 0   l= 1   l= 8   l= 9
//     row 1   l= 2   l= 3   l=10   l=11
//     row 2   l= 4   l= 5   l=12   l=13
//     row 3   l= 6   l= 7   l=14   l=15
//     row 4   l=16   l=17   l=24   l=25      ... rows 5-7 continue like rows 1-3
#pragma once
#include "simd.h"

namespace metalsim {

METAL_FUNC constexpr u32 matrix_row(u32 lane) { return (lane / 4 & 4) + lane / 2 % 4; }
METAL_FUNC constexpr u32 matrix_column(u32 lane) { return (lane / 4 & 2) * 2 + lane % 2 * 2; }

struct MatrixOperands {
    float a[2], b[2], c[2];
};

inline void multiply_accumulate(Slot* slots, u32 active) {
    float a[8][8], b[8][8], c[8][8];
    for (u32 lane = 0; lane < kLanes; ++lane) {
        const MatrixOperands& own = slot_value<MatrixOperands>(slots, lane);
        u32 row = matrix_row(lane), column = matrix_column(lane);
        for (u32 i = 0; i < 2; ++i) {
            a[row][column + i] = own.a[i];
            b[row][column + i] = own.b[i];
            c[row][column + i] = own.c[i];
        }
    }
    for (u32 row = 0; row < 8; ++row)
        for (u32 k = 0; k < 8; ++k)
            for (u32 column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
    for (u32 lane = 0; lane < kLanes; ++lane) {
        if (!(active >> lane & 1)) continue;
        float* out = slot_value<MatrixOperands>(slots, lane).c;
        for (u32 i = 0; i < 2; ++i) out[i] = c[matrix_row(lane)][matrix_column(lane) + i];
    }
}

}  // namespace metalsim

extern "C" metalsim::u32 metalsim_lane();

namespace metal {

template <class T, int Rows, int Columns>
struct simdgroup_matrix {
    static_assert(Rows == 8 && Columns == 8, "simdgroup matrices are 8x8");
    static_assert(is_floating_point_v<T>, "simdgroup matrices hold float, half or bfloat");
    using storage_type = vec<T, 2>;

    simdgroup_matrix() = default;
    /// A diagonal matrix.
    explicit simdgroup_matrix(T diagonal) {
        uint row = metalsim::matrix_row(metalsim_lane()), column = metalsim::matrix_column(metalsim_lane());
        elements_[0] = row == column ? diagonal : T(0);
        elements_[1] = row == column + 1 ? diagonal : T(0);
    }
    METAL_FUNC storage_type& thread_elements() { return elements_; }
    METAL_FUNC const storage_type& thread_elements() const { return elements_; }

  private:
    storage_type elements_;
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int Rows, int Columns>
METAL_FUNC simdgroup_matrix<T, Rows, Columns> make_filled_simdgroup_matrix(T value) {
    simdgroup_matrix<T, Rows, Columns> out;
    out.thread_elements() = vec<T, 2>(value);
    return out;
}
template <class T, int Rows, int Columns>
METAL_FUNC simdgroup_matrix<T, Rows, Columns> make_diagonal_simdgroup_matrix(T value) {
    return simdgroup_matrix<T, Rows, Columns>(value);
}

#ifndef METALSIM_SPACES
// Every lane moves its own two elements: one access of two neighbours, or two accesses of a column when transposed.
template <class T>
METAL_FUNC void simdgroup_load(simdgroup_matrix<T, 8, 8>& out, const T* from, ulong elements_per_row = 8,
                               vec<ulong, 2> origin = 0, bool transpose = false) {
    ulong row = metalsim::matrix_row(metalsim_lane()), column = metalsim::matrix_column(metalsim_lane());
    from += origin.y * elements_per_row + origin.x;
    vec<T, 2>& elements = out.thread_elements();
    if (transpose) {
        elements[0] = from[column * elements_per_row + row];
        elements[1] = from[(column + 1) * elements_per_row + row];
    } else {
        elements = *reinterpret_cast<const packed_vec<T, 2>*>(from + row * elements_per_row + column);
    }
    metalsim_meet(nullptr, metalsim::kMatrix, 0);
}
template <class T>
METAL_FUNC void simdgroup_store(simdgroup_matrix<T, 8, 8> matrix, T* to, ulong elements_per_row = 8,
                                vec<ulong, 2> origin = 0, bool transpose = false) {
    ulong row = metalsim::matrix_row(metalsim_lane()), column = metalsim::matrix_column(metalsim_lane());
    to += origin.y * elements_per_row + origin.x;
    vec<T, 2> elements = matrix.thread_elements();
    if (transpose) {
        to[column * elements_per_row + row] = elements[0];
        to[(column + 1) * elements_per_row + row] = elements[1];
    } else {
        *reinterpret_cast<packed_vec<T, 2>*>(to + row * elements_per_row + column) = packed_vec<T, 2>(elements);
    }
    metalsim_meet(nullptr, metalsim::kMatrix, 0);
}
#endif

template <class D, class A, class B, class C>
METAL_FUNC void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                                              simdgroup_matrix<B, 8, 8> b, simdgroup_matrix<C, 8, 8> c) {
    vec<A, 2> ea = a.thread_elements();
    vec<B, 2> eb = b.thread_elements();
    vec<C, 2> ec = c.thread_elements();
    metalsim::Slot* slot = metalsim_slot();
    auto& own = *reinterpret_cast<metalsim::MatrixOperands*>(slot->bytes);
    own = {{float(ea[0]), float(ea[1])}, {float(eb[0]), float(eb[1])}, {float(ec[0]), float(ec[1])}};
    metalsim_meet(metalsim::multiply_accumulate, metalsim::kMatrix, 1);
    d.thread_elements() = vec<D, 2>{D(own.c[0]), D(own.c[1])};
}
template <class D, class A, class B>
METAL_FUNC void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                                   simdgroup_matrix<B, 8, 8> b) {
    simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<float, 8, 8>(0.0f));
}
template <class A, class B>
METAL_FUNC simdgroup_matrix<A, 8, 8> operator*(simdgroup_matrix<A, 8, 8> a, simdgroup_matrix<B, 8, 8> b) {
    simdgroup_matrix<A, 8, 8> d;
    simdgroup_multiply(d, a, b);
    return d;
}

}  // namespace metal
