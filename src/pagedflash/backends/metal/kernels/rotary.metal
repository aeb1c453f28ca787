// Rotary position embedding (Su et al., 2021) of the first 2 * rotary_half elements of a row.

// Element d of `row` (in device or threadgroup memory) rotated to `position`, rounded to T. Pair i is elements
// (2i, 2i + 1) if interleaved (GPT-J), else (i, i + rotary_half) (GPT-NeoX).
template <typename Row>
inline T rotated(
    Row row, int d, int position, device const T* rotary_cos, device const T* rotary_sin, constant Params& params
) {
    const int half_dim = int(params.rotary_half);
    if (d >= 2 * half_dim) return row[d];
    const bool first_of_pair = params.rotary_interleaved ? (d & 1) == 0 : d < half_dim;
    const int pair = params.rotary_interleaved ? d / 2 : first_of_pair ? d : d - half_dim;
    const int distance = params.rotary_interleaved ? 1 : half_dim;
    const float other = float(row[first_of_pair ? d + distance : d - distance]);
    const int angle = clamp(position, 0, int(params.rotary_positions) - 1) * half_dim + pair;
    const float rotated_in = other * float(rotary_sin[angle]);
    return T(float(row[d]) * float(rotary_cos[angle]) + (first_of_pair ? -rotated_in : rotated_in));
}

// Position that query i is rotated to: behind the keys that were there, unless all queries take the same.
inline int rotary_position(Sequence s, constant Params& params, int query) {
    if (!params.rotary_by_position) return s.append_begin;
    return s.append_begin + query;
}

// The scale of a new token and head: written for its largest magnitude, or the static one.
inline float written_scale(device float* scale, float largest, bool writes, int lane) {
    if (!writes) return *scale;
    const float of_token = scale_of(largest);
    if (lane == 0) *scale = of_token;
    return of_token;
}

// One new token of one head, written to its slot by the 32 lanes of a simdgroup.
inline void append_token(
    device K_T* k_slot,
    device V_T* v_slot,
    device float* k_scale,
    device float* v_scale,
    device const T* k_new,
    device const T* v_new,
    int position,
    device const T* rotary_cos,
    device const T* rotary_sin,
    constant Params& params,
    int lane
) {
    float largest = 0.0f, reciprocal = 1.0f;
#if K_QUANTIZED
    for (int d = lane; d < HEAD_DIM; d += 32) {
        const T x = params.rotary_half ? rotated(k_new, d, position, rotary_cos, rotary_sin, params) : k_new[d];
        largest = max(largest, fabs(float(x)));
    }
    reciprocal = reciprocal_of(written_scale(k_scale, largest, params.writes_k_descale, lane));
#endif
    for (int d = lane; d < HEAD_DIM; d += 32) {
        const T x = params.rotary_half ? rotated(k_new, d, position, rotary_cos, rotary_sin, params) : k_new[d];
        k_slot[d] = stored<K_T>(x, reciprocal);
    }
    if (!params.writes_values) return;
#if V_QUANTIZED
    largest = 0.0f;
    for (int d = lane; d < V_HEAD_DIM; d += 32) largest = max(largest, fabs(float(v_new[d])));
    reciprocal = reciprocal_of(written_scale(v_scale, largest, params.writes_v_descale, lane));
#endif
    for (int d = lane; d < V_HEAD_DIM; d += 32) v_slot[d] = stored<V_T>(v_new[d], reciprocal);
}
