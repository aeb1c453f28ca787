// Rotary position embedding (Su et al., 2021) of the first 2 * rotary_half elements of a row.

// Element d of `row` (in device or threadgroup memory) turned by the angles of `position`, rounded to T. Pair i is
// elements (2i, 2i + 1) if interleaved (GPT-J), else (i, i + rotary_half) (GPT-NeoX).
template <typename Row>
inline T rotated(
    Row row, int d, int position, device const T* cosines, device const T* sines, constant Sizes& sizes
) {
    const int half_dim = int(sizes.rotary_half);
    if (d >= 2 * half_dim) return row[d];
    const bool first_of_pair = sizes.rotary_interleaved ? (d & 1) == 0 : d < half_dim;
    const int pair = sizes.rotary_interleaved ? d / 2 : first_of_pair ? d : d - half_dim;
    const int distance = sizes.rotary_interleaved ? 1 : half_dim;
    const float other = float(row[first_of_pair ? d + distance : d - distance]);
    const int angle = position * half_dim + pair;
    const float turned_in = other * float(sines[angle]);
    return T(float(row[d]) * float(cosines[angle]) + (first_of_pair ? -turned_in : turned_in));
}

// Position whose angles turn query i: new queries follow the keys that were there, unless order does not matter.
inline int rotary_position(Sequence s, constant Sizes& sizes, int query) {
    if (!sizes.rotary_by_query) return s.append_begin;
    return min(s.append_begin + query, int(sizes.rotary_positions) - 1);
}

// One new token of one head, written to its slot by the 32 lanes of a simdgroup.
inline void append_token(
    device T* k_slot,
    device T* v_slot,
    device const T* k_new,
    device const T* v_new,
    int position,
    device const T* cosines,
    device const T* sines,
    constant Sizes& sizes,
    int lane
) {
    for (int d = lane; d < HEAD_DIM; d += 32) {
        k_slot[d] = sizes.rotary_half ? rotated(k_new, d, position, cosines, sines, sizes) : k_new[d];
    }
    for (int d = lane; d < V_HEAD_DIM; d += 32) {
        v_slot[d] = v_new[d];
    }
}
