// How elements of the cache are loaded and stored. All kernels go through here. q, k_new, v_new and out are of T; keys are of
// K_T and values of V_T: T itself, half or bfloat under float, or char, whose elements are multiplied by scales.
//
// Defined by the launcher: T, T_BYTES, K_T, V_T, K_QUANTIZED, V_QUANTIZED, ALIGNED (whether every row of K and V starts at a
// multiple of its widest load).

typedef vec<T, 2> Pair;

// WIDTH neighbouring elements as they lie in memory: 1 to 16 bytes.
template <int BYTES> struct Word;
template <> struct Word<16> { typedef uint4 type; };
template <> struct Word<8> { typedef uint2 type; };
template <> struct Word<4> { typedef uint type; };
template <> struct Word<2> { typedef ushort type; };
template <> struct Word<1> { typedef uchar type; };
template <typename E, int WIDTH> using PackedOf = typename Word<WIDTH * sizeof(E)>::type;
template <int WIDTH> using Packed = PackedOf<T, WIDTH>;

inline uint word_of(uint4 packed, int i) { return packed[i]; }
inline uint word_of(uint2 packed, int i) { return packed[i]; }
inline uint word_of(uint packed, int i) { return packed; }
inline uint word_of(ushort packed, int i) { return packed; }
inline uint word_of(uchar packed, int i) { return packed; }

inline void set_word(thread uint4& packed, int i, uint word) { packed[i] = word; }
inline void set_word(thread uint2& packed, int i, uint word) { packed[i] = word; }
inline void set_word(thread uint& packed, int i, uint word) { packed = word; }
inline void set_word(thread ushort& packed, int i, uint word) { packed = ushort(word); }
inline void set_word(thread uchar& packed, int i, uint word) { packed = uchar(word); }

// Bits of an element, as the lowest of a word, and back.
template <typename E> inline uint bits_of(E x) { return as_type<typename Word<sizeof(E)>::type>(x); }
template <typename E> inline E of_bits(uint bits) { return as_type<E>(typename Word<sizeof(E)>::type(bits)); }

// Elements d to d + WIDTH of a row of DIMS elements; 0 behind its end. In one load where that can be.
template <int WIDTH, int DIMS, typename E>
inline PackedOf<E, WIDTH> load(device const E* row, int d) {
    typedef PackedOf<E, WIDTH> Loaded;
#if ALIGNED
    if (DIMS % WIDTH == 0) return d < DIMS ? *reinterpret_cast<device const Loaded*>(row + d) : Loaded(0);
#endif
    Loaded packed = Loaded(0);
    const int of_word = 4 / sizeof(E);
    UNROLL
    for (int i = 0; i < WIDTH; i += of_word) {
        uint word = 0;
        UNROLL
        for (int e = 0; e < of_word && i + e < WIDTH; e++) {
            if (d + i + e < DIMS) word |= bits_of(row[d + i + e]) << (e * 8 * sizeof(E));
        }
        set_word(packed, i / of_word, word);
    }
    return packed;
}

// Bits of element i of what was loaded, as the lowest of a word.
template <typename E, typename PackedRow>
inline uint element_bits(PackedRow row, int i) {
    const int of_word = 4 / sizeof(E);
    return word_of(row, i / of_word) >> (i % of_word * 8 * sizeof(E));
}

template <typename E> inline float widened(uint bits) { return float(of_bits<E>(bits)); }
template <> inline float widened<bfloat>(uint bits) { return as_type<float>(bits << 16); }
// Conversions of integers are slow on most GPUs: x + 128, as the lowest bits of a float whose lowest bit counts 1, less all of that.
template <> inline float widened<char>(uint bits) { return as_type<float>(0x4b000000u | ((bits & 0xffu) ^ 0x80u)) - 8388736.0f; }

// All WIDTH elements of what was loaded, as floats.
template <typename E, int WIDTH>
inline void unpack(PackedOf<E, WIDTH> row, thread float* x) {
    UNROLL
    for (int i = 0; i < WIDTH; i++) x[i] = widened<E>(element_bits<E>(row, i));
}

// x and y as T.
template <typename E> inline Pair pair_of_bits(uint x, uint y) { return Pair(T(widened<E>(x)), T(widened<E>(y))); }
#if T_BYTES == 2 && !T_IS_BFLOAT
template <> inline Pair pair_of_bits<char>(uint x, uint y) {  // both at once, as in widened
    return as_type<Pair>(((x & 0xffu) | (y & 0xffu) << 16) ^ 0x64806480u) - Pair(T(1152.0f));
}
#endif

// Elements of E as T.
template <typename E>
struct Elements {
    // Element i of two rows.
    template <typename PackedRow>
    static Pair pair_of(PackedRow first, PackedRow second, int i) {
        return pair_of_bits<E>(element_bits<E>(first, i), element_bits<E>(second, i));
    }
    // WIDTH elements times a scale.
    template <int WIDTH>
    static Packed<WIDTH> scaled(PackedOf<E, WIDTH> row, float scale) {
        Packed<WIDTH> result = Packed<WIDTH>(0);
        const int of_word = 4 / T_BYTES;
        UNROLL
        for (int i = 0; i < WIDTH; i += of_word) {
            uint word = 0;
            UNROLL
            for (int e = 0; e < of_word && i + e < WIDTH; e++) {
                word |= bits_of(T(widened<E>(element_bits<E>(row, i + e)) * scale)) << (e * 8 * T_BYTES);
            }
            set_word(result, i / of_word, word);
        }
        return result;
    }
};
template <>
struct Elements<T> {
    template <typename PackedRow>
    static Pair pair_of(PackedRow first, PackedRow second, int i) {
#if T_BYTES == 4
        return Pair(as_type<float>(word_of(first, i)), as_type<float>(word_of(second, i)));
#else
        const uint x = word_of(first, i / 2), y = word_of(second, i / 2);
        return as_type<Pair>(i % 2 == 0 ? (x & 0xffffu) | (y << 16) : (x >> 16) | (y & 0xffff0000u));
#endif
    }
    template <int WIDTH>
    static Packed<WIDTH> scaled(Packed<WIDTH> row, float scale) { return row; }
};

// Elements 2 * i and 2 * i + 1 of one row of T.
template <typename PackedRow>
inline Pair neighbours_of(PackedRow row, int i) {
#if T_BYTES == 4
    return Pair(as_type<float>(word_of(row, 2 * i)), as_type<float>(word_of(row, 2 * i + 1)));
#else
    return as_type<Pair>(word_of(row, i));
#endif
}

#define LARGEST 127.0f              // value of a char
#define SMALLEST_SCALE 1.1754944e-38f  // one below it counts as 0: what is quantized with it is 0

// The scale of a token and head, whose largest magnitude becomes LARGEST: from each lane's largest.
inline float scale_of(float largest) {
    for (ushort distance = 1; distance < 32; distance *= 2) largest = max(largest, simd_shuffle_xor(largest, distance));
    const float scale = precise::divide(largest, LARGEST);
    return scale < SMALLEST_SCALE ? 0.0f : scale;
}

inline float reciprocal_of(float scale) { return fabs(scale) < SMALLEST_SCALE ? 0.0f : precise::divide(1.0f, scale); }

// A new element, as the cache holds it, rounded to nearest even; char saturates.
template <typename E> inline E stored(T x, float reciprocal) { return E(float(x)); }
template <> inline char stored<char>(T x, float reciprocal) {
    return char(rint(clamp(float(x) * reciprocal, -LARGEST, LARGEST)));
}
template <> inline T stored<T>(T x, float reciprocal) { return x; }
