// The online softmax: from scores to weights, and from their maximum and sum to the output and its LSE.
//
// Defined by the launcher: V_HEAD_DIM, SIMDGROUPS (of a threadgroup, at most).

#define THREADS (SIMDGROUPS * 32)

constant constexpr float LOWEST = -1e30f;         // below every score; finite, since fast math knows no infinity
constant constexpr float MASKED = 2.0f * LOWEST;  // the score of a key that its query does not see

inline float weight_of(float score, float maximum) {
    return score > LOWEST ? fast::exp2(score - maximum) : 0.0f;
}

// The largest maximum of a row: that of each simdgroup, `stride` apart.
inline float largest_of(threadgroup const float* maxima, int stride, int simdgroups) {
    float largest = LOWEST;
    UNROLL
    for (int i = 0; i < SIMDGROUPS; i++) largest = i < simdgroups ? max(largest, maxima[i * stride]) : largest;
    return largest;
}

// What a row's accumulator is multiplied by, and its LSE, from the maximum and sum over all its keys.
struct Normaliser {
    float factor;
    float lse;
};

inline Normaliser normaliser_of(float maximum, float sum, bool has_sink, float sink) {
    Normaliser n;
    if (sum == 0.0f) {  // saw no key
        n.factor = 0.0f;
        n.lse = INFINITE;
        return n;
    }
    float top = maximum;
    if (has_sink) {
        top = max(maximum, sink * LOG2_E);
        sum = sum * exp2(maximum - top) + exp2(sink * LOG2_E - top);
    }
    n.factor = has_sink ? exp2(maximum - top) / sum : 1.0f / sum;
    n.lse = (top + log2(sum)) * LN_2;
    return n;
}

// Index of a row's LSE: (B, Hq, Sq), or (Hq, total_q) where queries are packed and num_tokens_q is total_q.
inline long lse_index(constant Params& params, int row, int head) {
    const int b = row / int(params.num_tokens_q);
    return (long(b) * params.num_heads + head) * params.num_tokens_q + (row - b * int(params.num_tokens_q));
}

inline void write_lse(device float* lse, constant Params& params, int row, int head, float value) {
    if (params.writes_lse) lse[lse_index(params, row, head)] = value;
}

// The output of a row that is no query, written by all `threads` of a threadgroup.
inline void write_empty_row(
    device T* out, device float* lse, constant Params& params, int row, int head, int thread_index, int threads
) {
    const long out_row = long(row) * params.num_heads + head;
    for (int d = thread_index; d < V_HEAD_DIM; d += threads) out[out_row * V_HEAD_DIM + d] = T(0.0f);
    if (thread_index == 0) write_lse(lse, params, row, head, INFINITE);
}
