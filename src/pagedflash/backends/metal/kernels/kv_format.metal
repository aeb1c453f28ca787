// How elements of the cache are loaded and stored. All kernels go through here; q, k_new and v_new have the same type.
//
// Defined by the launcher: T, T_BYTES, ALIGNED (whether every row of K and V starts at a multiple of its widest load).

typedef vec<T, 2> Pair;

// WIDTH neighbouring elements as they lie in memory: 2 to 16 bytes.
template <int BYTES> struct Word;
template <> struct Word<16> { typedef uint4 type; };
template <> struct Word<8> { typedef uint2 type; };
template <> struct Word<4> { typedef uint type; };
template <> struct Word<2> { typedef ushort type; };
template <int WIDTH> using Packed = typename Word<WIDTH * T_BYTES>::type;

inline uint word_of(uint4 packed, int i) { return packed[i]; }
inline uint word_of(uint2 packed, int i) { return packed[i]; }
inline uint word_of(uint packed, int i) { return packed; }
inline uint word_of(ushort packed, int i) { return packed; }

inline void set_word(thread uint4& packed, int i, uint word) { packed[i] = word; }
inline void set_word(thread uint2& packed, int i, uint word) { packed[i] = word; }
inline void set_word(thread uint& packed, int i, uint word) { packed = word; }
inline void set_word(thread ushort& packed, int i, uint word) { packed = ushort(word); }

// The bits of element d of a row of DIMS elements, 0 behind its end.
template <int DIMS>
inline uint bits_at(device const T* row, int d) {
    if (d >= DIMS) return 0;
#if T_BYTES == 4
    return as_type<uint>(row[d]);
#else
    return as_type<ushort>(row[d]);
#endif
}

// Elements d to d + WIDTH of a row of DIMS elements; 0 behind its end. In one load where that can be.
template <int WIDTH, int DIMS>
inline Packed<WIDTH> load(device const T* row, int d) {
#if ALIGNED
    if (DIMS % WIDTH == 0) {
        return d < DIMS ? *reinterpret_cast<device const Packed<WIDTH>*>(row + d) : Packed<WIDTH>(0);
    }
#endif
    Packed<WIDTH> packed = Packed<WIDTH>(0);
    UNROLL
    for (int i = 0; i < (WIDTH * T_BYTES + 3) / 4; i++) {
#if T_BYTES == 4
        set_word(packed, i, bits_at<DIMS>(row, d + i));
#else
        const uint second = WIDTH > 1 ? bits_at<DIMS>(row, d + 2 * i + 1) : 0;
        set_word(packed, i, bits_at<DIMS>(row, d + 2 * i) | (second << 16));
#endif
    }
    return packed;
}

// Element i of two rows.
template <typename PackedRow>
inline Pair pair_of(PackedRow first, PackedRow second, int i) {
#if T_BYTES == 4
    return Pair(as_type<float>(word_of(first, i)), as_type<float>(word_of(second, i)));
#else
    const uint x = word_of(first, i / 2), y = word_of(second, i / 2);
    return as_type<Pair>(i % 2 == 0 ? (x & 0xffffu) | (y << 16) : (x >> 16) | (y & 0xffff0000u));
#endif
}

// Elements 2 * i and 2 * i + 1 of one row.
template <typename PackedRow>
inline Pair neighbours_of(PackedRow row, int i) {
#if T_BYTES == 4
    return Pair(as_type<float>(word_of(row, 2 * i)), as_type<float>(word_of(row, 2 * i + 1)));
#else
    return as_type<Pair>(word_of(row, i));
#endif
}

// Element d of a slot of the cache.
inline void store_element(device T* slot, int d, T x) {
    slot[d] = x;
}
