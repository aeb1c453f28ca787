// Which probabilities dropout drops: Philox 4x32-10, as ../../dropout.py says. Four neighbouring keys have one counter, whose words
// the lanes that hold them share.
//
// Functions give bits, 1 = kept. What is kept is scaled at the end, where it is a number for each element of the output.
//
// Defined by the launcher: DROPOUT (whether there is any: without, nothing of this is left).

// Row r of a threadgroup is query (first_row + r) / heads, and head first_head + (first_row + r) % heads.
struct Dropout {
    uint2 seed;
    int b;
    int first_row;
    int first_head;
    int heads;
};

inline uint2 load_seed(device const uint2* seed) { return DROPOUT ? *seed : uint2(0); }

// Bit i: whether key `key / 4 * 4 + i` is kept.
inline uint kept_of_four(thread const Dropout& dropout, int row, int key, constant ScoreParams& params) {
    const uint packed_row = uint(dropout.first_row + row), heads = uint(dropout.heads);
    uint a = uint(key) / 4, b = packed_row / heads, c = uint(dropout.first_head) + packed_row % heads, d = uint(dropout.b);
    uint low_key = dropout.seed.x, high_key = dropout.seed.y;
    UNROLL
    for (int round = 0; round < 10; round++) {
        const uint high_a = mulhi(a, 0xD2511F53u), low_a = a * 0xD2511F53u;
        const uint high_c = mulhi(c, 0xCD9E8D57u), low_c = c * 0xCD9E8D57u;
        a = high_c ^ b ^ low_key;
        b = low_c;
        c = high_a ^ d ^ high_key;
        d = low_a;
        low_key += 0x9E3779B9u;
        high_key += 0xBB67AE85u;
    }
    const uint threshold = uint(params.dropout_threshold);
    return uint(a >> 1 >= threshold) | uint(b >> 1 >= threshold) << 1 | uint(c >> 1 >= threshold) << 2
        | uint(d >> 1 >= threshold) << 3;
}

inline bool is_kept(uint kept, int i) { return (kept >> i & 1) != 0; }

inline bool is_kept(thread const Dropout& dropout, int row, int key, constant ScoreParams& params) {
    return !DROPOUT || is_kept(kept_of_four(dropout, row, key, params), key % 4);
}

// Two weights, of which this lane holds more: 0 for those that are dropped.
inline float2 kept_weights(float2 weights, uint kept, int j) {
    return float2(is_kept(kept, 2 * j) ? weights.x : 0.0f, is_kept(kept, 2 * j + 1) ? weights.y : 0.0f);
}

// Of a row against BLOCKS matrices of keys from `first_key` on: bit 2 j + e for element e of matrix j. Lanes side by side hold four
// keys, and each works out every other matrix.
template <int BLOCKS>
inline uint kept_of_row(thread const Dropout& dropout, int row, int first_key, constant ScoreParams& params, int lane) {
    if (!DROPOUT) return ~0u;
    const int column = matrix_column(lane);
    uint kept = 0;
    UNROLL
    for (int j = 0; j < BLOCKS; j += 2) {
        const int mine = min(j + lane % 2, BLOCKS - 1);
        const uint of_mine = kept_of_four(dropout, row, first_key + mine * 8 + column, params);
        UNROLL
        for (int i = 0; i < min(2, BLOCKS); i++) {
            const uint of_block = simd_shuffle(of_mine, ushort(lane / 2 * 2 + i));
            kept |= (of_block >> column % 4 & 3) << 2 * (j + i);
        }
    }
    return kept;
}

// Of BLOCKS matrices of rows against one key, transposed: bit 2 j + e for element e of matrix j. Four lanes hold four keys of the same
// rows, and each works out every fourth row.
template <int BLOCKS>
inline uint kept_of_key(thread const Dropout& dropout, int key, constant ScoreParams& params, int lane) {
    if (!DROPOUT) return ~0u;
    uint kept = 0;
    UNROLL
    for (int n = 0; n < 2 * BLOCKS; n += 4) {
        const int mine = min(n + lane / 2 % 4, 2 * BLOCKS - 1);
        const uint of_mine = kept_of_four(dropout, mine / 2 * 8 + matrix_column(lane) + mine % 2, key, params);
        UNROLL
        for (int i = 0; i < min(4, 2 * BLOCKS); i++) {
            const uint of_row = simd_shuffle(of_mine, ushort(lane / 8 * 8 + 2 * i + lane % 2));
            kept |= (of_row >> key % 4 & 1) << (n + i);
        }
    }
    return kept;
}
