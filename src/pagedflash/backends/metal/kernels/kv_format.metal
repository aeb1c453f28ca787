// How elements of the cache are loaded and stored. All kernels go through here; q, k_new and v_new have the same type.
//
// Defined by the launcher: T, T_BYTES, T_IS_BFLOAT, CHUNK (elements a load), ALIGNED (whether every row starts at a multiple
// of CHUNK elements).

#define WORDS (CHUNK * T_BYTES / 4)  // of 32 bits a load: 1, 2 or 4

#if WORDS == 4
typedef uint4 Packed;
#elif WORDS == 2
typedef uint2 Packed;
#else
typedef uint Packed;
#endif

typedef vec<T, 2> Pair;

inline float2 widened(Pair pair) {
    return float2(float(pair.x), float(pair.y));
}

inline uint word_of(uint4 packed, int i) { return packed[i]; }
inline uint word_of(uint2 packed, int i) { return packed[i]; }
inline uint word_of(uint packed, int i) { return packed; }

#if !ALIGNED
inline uint assembled_word(device const T* row, int i) {
#if T_BYTES == 4
    return as_type<uint>(row[i]);
#else
    return uint(as_type<ushort>(row[2 * i])) | (uint(as_type<ushort>(row[2 * i + 1])) << 16);
#endif
}
#endif

// CHUNK elements as they lie in memory.
inline Packed load_chunk(device const T* row) {
#if ALIGNED
    return *reinterpret_cast<device const Packed*>(row);
#elif WORDS == 4
    return uint4(assembled_word(row, 0), assembled_word(row, 1), assembled_word(row, 2), assembled_word(row, 3));
#elif WORDS == 2
    return uint2(assembled_word(row, 0), assembled_word(row, 1));
#else
    return assembled_word(row, 0);
#endif
}

// The same elements as floats.
inline void unpack(Packed packed, thread float* x) {
    UNROLL
    for (int i = 0; i < WORDS; i++) {
        const uint word = word_of(packed, i);
#if T_BYTES == 4
        x[i] = as_type<float>(word);
#elif T_IS_BFLOAT
        x[2 * i] = as_type<float>(word << 16);
        x[2 * i + 1] = as_type<float>(word & 0xffff0000u);
#else
        const half2 pair = as_type<half2>(word);
        x[2 * i] = float(pair.x);
        x[2 * i + 1] = float(pair.y);
#endif
    }
}

// Element d of a slot of the cache.
inline void store_element(device T* slot, int d, T x) {
    slot[d] = x;
}
