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

inline float masked_score(float qk, int key, ScoreRow row, constant ScoreParams& params) {
    float score = qk * params.scale;
    if (params.softcap > 0.0f) score = params.softcap * precise::tanh(clamp(score, -15.0f, 15.0f));
    score -= row.slope * float(abs(row.position - key));
    return contains(row.range, key) ? score : MASKED;
}
