// From q . k to a masked score in base 2: scale, softcap, ALiBi, window. The softmax uses exp2.
//
// ScoreParams is the struct of pagedflash.problem.ScoreParams.

// What the scores of one query depend on besides q . k.
struct ScoreRow {
    KVRange range;  // the keys it sees
    int position;   // its own
    float slope;    // of ALiBi, in base 2
};

inline ScoreRow score_row(Sequence s, int query, float slope) {
    ScoreRow row;
    row.range = kv_range(s, query);
    if (query >= s.seqlen_q) row.range.end = row.range.begin;
    row.position = position_of(s, query);
    row.slope = slope;
    return row;
}

inline float alibi_slope(device const float* alibi_slopes, constant Params& params, int b, int head) {
    return params.has_alibi_slopes ? alibi_slopes[b * params.alibi_batch_stride + head] * LOG2_E : 0.0f;
}

inline float capped_score(float qk, constant ScoreParams& params) {
    const float score = qk * params.scale;
    return params.softcap > 0.0f ? params.softcap * precise::tanh(clamp(score, -15.0f, 15.0f)) : score;
}

// The derivative of a capped score by what it is capped from.
inline float cap_slope(float capped, constant ScoreParams& params) {
    const float tanh_of_score = params.softcap > 0.0f ? capped / params.softcap : 0.0f;
    return 1.0f - tanh_of_score * tanh_of_score;
}

inline float distant_score(float capped, int key, ScoreRow row) {
    return capped - row.slope * float(abs(row.position - key));
}

inline float masked_score(float qk, int key, ScoreRow row, constant ScoreParams& params) {
    const float score = distant_score(capped_score(qk, params), key, row);
    return contains(row.range, key) ? score : MASKED;
}

// What q . k was scaled by before log2(e) and the softcap were folded in.
inline float natural_scale(constant ScoreParams& params) {
    return params.scale * LN_2 * (params.softcap > 0.0f ? params.softcap : 1.0f);
}
