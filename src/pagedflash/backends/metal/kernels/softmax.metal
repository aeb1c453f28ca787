// The softmax, in base 2: scores come multiplied by log2(e).

constant constexpr float LOWEST = -1e30f;  // below every score; finite, since fast math knows no infinity

// From q . k, scaled, to a score in base 2: softcap (0 = none), then ALiBi.
inline float score_of(float dot, float softcap, float slope, int distance) {
    const float score = softcap > 0.0f ? softcap * precise::tanh(clamp(dot, -15.0f, 15.0f)) : dot;
    return score - slope * float(abs(distance));
}

// Maximum and sum of a row's weights, all its keys seen, to what its output is divided by and its LSE.
struct Normaliser {
    float factor;
    float lse;
};

inline Normaliser normaliser_of(float maximum, float sum, bool has_sink, float sink) {
    Normaliser n;
    if (sum == 0.0f) {  // saw no key
        n.factor = 0.0f;
        n.lse = INFINITY;
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
