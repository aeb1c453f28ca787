// decode for many rows: 8x8 matrices whose elements come straight from the pages: no threadgroup memory, no shuffles.
//
// Since a sum over dims may be taken in any order, the 8 dims of one matrix need not be neighbours. They are as far apart as one
// load is wide, so that each load of 16 bytes fills WIDTH matrices, and the lanes of one key read whole lines (here WIDTH = 8,
// D = 128: 16 matrices for 8 keys):
//
//   matrix 0:     dims  0,  8, 16, ... 56        lanes of dim slot 0 load dims 0 .. 7 of two keys, slot 1 dims 8 .. 15, ...
//   matrix 1:     dims  1,  9, 17, ... 57
//     ...
//   matrix 8:     dims 64, 72, 80, ... 120
//
//   S   (rows x keys)  =  Q (rows x dims)    K^T (dims x keys)      lane (slot, column) holds keys column, column + 1
//   O^T (dims x rows) +=  V^T (dims x keys)  P^T (keys x rows)      the same lanes load V as they load K
//
// Defined by the launcher, besides decode.metal's: ROW_BLOCKS, KEY_BLOCKS (matrices of 8 rows, of 8 keys); CHUNK (elements of a
// load), K_TAIL, V_TAIL (of the loads behind the last whole 8 * CHUNK dims, 0 = none), LOAD_CHUNKS (loads of a key in flight
// together); PAGE_RUN (keys in one page).

#if MATRICES

#define ROWS (ROW_BLOCKS * 8)
#define TILE_KEYS (KEY_BLOCKS * 8)
#define LANE_KEYS (KEY_BLOCKS * 2)                              // keys of a tile that a lane loads
#define LOOKUP_TILES (32 / TILE_KEYS)
#define K_CHUNKS (HEAD_DIM / (8 * CHUNK))                     // whole loads of a key by one lane
#define V_CHUNKS (V_HEAD_DIM / (8 * CHUNK))
#define K_REST (K_CHUNKS % LOAD_CHUNKS)                          // of those, the ones behind the last LOAD_CHUNKS
#define V_REST (V_CHUNKS % LOAD_CHUNKS)
#define K_MATRICES (K_CHUNKS * CHUNK + K_TAIL)                // along the dims
#define V_MATRICES (V_CHUNKS * CHUNK + V_TAIL)
#define V_FIRST (V_CHUNKS < LOAD_CHUNKS ? V_CHUNKS : LOAD_CHUNKS)  // what is loaded first
#define V_FIRST_TAIL (V_CHUNKS < LOAD_CHUNKS ? V_TAIL : 0)
#define QUERY_DIMS (K_MATRICES * 8)  // of a query in threadgroup memory, padded to whole matrices

typedef T QueryElement;
typedef DimOrder<CHUNK, K_CHUNKS, K_TAIL> KeyDims;

// Each element where its lane finds it.
inline int query_index(int row, int d) {
    const int matrix = row / 8 * K_MATRICES + KeyDims::matrix_of(d), slot = KeyDims::slot_of(d);
    return (matrix * 32 + lane_at(row % 8, slot & ~1)) * 2 + (slot & 1);
}

// The rows of a simdgroup. This lane's is row matrix_row(lane) of each block for scores, rows matrix_column(lane) and + 1 for
// the output.
struct Accumulator {
    float maximum[ROW_BLOCKS];  // over all keys so far
    float sum[ROW_BLOCKS];      // over the keys of this lane
    float2 output[ROW_BLOCKS * V_MATRICES];
};

inline void clear(thread Accumulator& rows) {
    UNROLL
    for (int r = 0; r < ROW_BLOCKS; r++) {
        rows.maximum[r] = LOWEST;
        rows.sum[r] = 0.0f;
    }
    UNROLL
    for (int i = 0; i < ROW_BLOCKS * V_MATRICES; i++) rows.output[i] = float2(0.0f);
}

// A tile of keys, as one lane sees it.
struct Tile {
    int first_key;
    int page[LANE_KEYS];  // of each of its keys
    KVRange range;        // keys that may be read
    bool inside;          // whether all of the tile may be
};

inline int key_offset(int i, int lane) { return i / 2 * 8 + matrix_column(lane) + i % 2; }

// Tiles have 2^tile_bits keys, always as many.
inline int tile_bits_of(constant Params& params) { return KEY_BLOCKS == 4 ? 5 : KEY_BLOCKS == 2 ? 4 : 3; }

// The pages of this simdgroup's next LOOKUP_TILES tiles from `tile` on: one key a lane, and of those that lie in one page for
// sure the first.
inline int looked_up_page(
    device const int* pages, int num_pages, int tile, int simdgroups, KVRange range, int tile_bits, int lane
) {
    const int key = (tile + lane / TILE_KEYS * simdgroups) * TILE_KEYS + lane % TILE_KEYS;
    return lane % PAGE_RUN == 0 ? page_of(pages, clamp(key, range.begin, range.end - 1), num_pages) : 0;
}

// What a lane loads of its keys together: CHUNKS whole loads of each, and one of TAIL elements behind them.
template <typename E, int CHUNKS, int TAIL>
struct Loaded {
    PackedOf<E, CHUNK> chunks[MAX_OF(CHUNKS, 1) * LANE_KEYS];
    PackedOf<E, MAX_OF(TAIL, 1)> tail[LANE_KEYS];
};

template <bool CHECKED, int DIMS, typename E, int CHUNKS, int TAIL>
inline void load_rows_of(
    thread Loaded<E, CHUNKS, TAIL>& loaded, device const E* pages, int first_dim, thread const Tile& tile, long page_stride,
    int token_stride, int lane
) {
    const int slot = matrix_row(lane);
    UNROLL
    for (int i = 0; i < LANE_KEYS; i++) {
        const int key = tile.first_key + key_offset(i, lane);
        device const E* row = token_at(pages, tile.page[i], key, page_stride, token_stride);
        const bool present = !CHECKED || contains(tile.range, key);
        UNROLL
        for (int c = 0; c < CHUNKS; c++) {
            const int d = first_dim + (c * 8 + slot) * CHUNK;
            loaded.chunks[c * LANE_KEYS + i] = present ? load<CHUNK, DIMS>(row, d) : PackedOf<E, CHUNK>(0);
        }
        if (TAIL > 0) {
            const int d = first_dim + CHUNKS * 8 * CHUNK + slot * TAIL;
            loaded.tail[i] = present ? load<MAX_OF(TAIL, 1), DIMS>(row, d) : PackedOf<E, MAX_OF(TAIL, 1)>(0);
        }
    }
}

// Dims from `first_dim` on of each key of this lane. Most tiles lie inside the range, and then nothing stands between loads.
template <int DIMS, typename E, int CHUNKS, int TAIL>
inline void load_rows(
    thread Loaded<E, CHUNKS, TAIL>& loaded, device const E* pages, int first_dim, thread const Tile& tile, long page_stride,
    int token_stride, int lane
) {
    if (tile.inside) {
        load_rows_of<false, DIMS>(loaded, pages, first_dim, tile, page_stride, token_stride, lane);
    } else {
        load_rows_of<true, DIMS>(loaded, pages, first_dim, tile, page_stride, token_stride, lane);
    }
}

// The scales of this lane's keys of a tile, 0 for those outside the range: loaded by the lanes of slot 0, before they are needed,
inline void load_scales(thread float2* scales, thread const Scales& of_head, thread const Tile& tile, int lane) {
    UNROLL
    for (int i = 0; i < LANE_KEYS; i++) {
        const int key = tile.first_key + key_offset(i, lane);
        const bool loads = matrix_row(lane) == 0 && (tile.inside || contains(tile.range, key));
        scales[i / 2][i % 2] = loads ? *of_head.at(tile.page[i], key) : 0.0f;
    }
}

// and passed to the others.
inline void share_scales(thread float2* scales, int lane) {
    UNROLL
    for (int i = 0; i < LANE_KEYS; i++) scales[i / 2][i % 2] = simd_shuffle(scales[i / 2][i % 2], lane_at(0, matrix_column(lane)));
}

// S += Q K^T for the dims that are loaded. `queries` are this lane's elements of Q, one matrix 32 behind the other.
template <int CHUNKS, int TAIL>
inline void multiply_keys(
    thread float2* scores, threadgroup const Pair* queries, thread const Loaded<K_T, CHUNKS, TAIL>& keys
) {
    UNROLL
    for (int m = 0; m < CHUNKS * CHUNK + TAIL; m++) {
        const int c = m / CHUNK * LANE_KEYS;
        UNROLL
        for (int r = 0; r < ROW_BLOCKS; r++) {
            const Pair query = queries[(r * K_MATRICES + m) * 32];
            UNROLL
            for (int i = 0; i < KEY_BLOCKS; i++) {
                const Pair pair = m < CHUNKS * CHUNK
                    ? Elements<K_T>::pair_of(keys.chunks[c + 2 * i], keys.chunks[c + 2 * i + 1], m % CHUNK)
                    : Elements<K_T>::pair_of(keys.tail[2 * i], keys.tail[2 * i + 1], m - CHUNKS * CHUNK);
                multiply_add(scores[r * KEY_BLOCKS + i], query, pair);
            }
        }
    }
}

// O^T += V^T P^T for the dims that are loaded. Values are scaled before they meet their weights, which times a scale could be
// too small for half.
template <int CHUNKS, int TAIL>
inline void multiply_values(
    thread float2* output, thread const Pair* weights, thread const Loaded<V_T, CHUNKS, TAIL>& values,
    thread const float2* scales
) {
    UNROLL
    for (int m = 0; m < CHUNKS * CHUNK + TAIL; m++) {
        const int c = m / CHUNK * LANE_KEYS;
        UNROLL
        for (int i = 0; i < KEY_BLOCKS; i++) {
            Pair pair = m < CHUNKS * CHUNK
                ? Elements<V_T>::pair_of(values.chunks[c + 2 * i], values.chunks[c + 2 * i + 1], m % CHUNK)
                : Elements<V_T>::pair_of(values.tail[2 * i], values.tail[2 * i + 1], m - CHUNKS * CHUNK);
#if V_QUANTIZED
            pair = Pair(T(float(pair.x) * scales[i].x), T(float(pair.y) * scales[i].y));
#endif
            UNROLL
            for (int r = 0; r < ROW_BLOCKS; r++) multiply_add(output[r * V_MATRICES + m], pair, weights[r * KEY_BLOCKS + i]);
        }
    }
}

// The first tiles of a simdgroup: their pages.
struct Start {
    int looked_up;
};

inline void load_first(
    thread Start& start, thread const HeadCache& cache, int t, int tiles_end, KVRange range, int looked_up, int tile_bits, int lane
) {
    start.looked_up = looked_up;
}

// The tiles of a simdgroup: `t`, t + simdgroups, ... before `tiles_end`. `range` are the keys that any row sees.
inline void attend(
    thread Accumulator& rows, threadgroup const QueryElement* queries, threadgroup const ScoreRow* score_rows,
    thread const HeadCache& cache, thread Start& start, int t, int tiles_end, int simdgroups, KVRange range, int tile_bits,
    constant ScoreParams& score_params, thread const Dropout& dropout, int lane
) {
    threadgroup const Pair* my_queries = reinterpret_cast<threadgroup const Pair*>(queries) + lane;
    int looked_up = start.looked_up, page = 0, lookups = 0;  // tiles whose pages are looked up
    for (; t < tiles_end; t += simdgroups) {
        if (lookups == 0) {
            page = looked_up;
            lookups = LOOKUP_TILES;
            const int next = t + LOOKUP_TILES * simdgroups;  // looked up while these tiles are worked on
            if (next < tiles_end) {
                looked_up = looked_up_page(cache.pages, cache.num_pages, next, simdgroups, range, tile_bits, lane);
            }
        }
        const int first_lane = (LOOKUP_TILES - lookups--) * TILE_KEYS;
        Tile tile;
        tile.first_key = t * TILE_KEYS;
        tile.range = range;
        tile.inside = tile.first_key >= range.begin && tile.first_key + TILE_KEYS <= range.end;
        UNROLL
        for (int i = 0; i < LANE_KEYS; i++) {
            const int owner = first_lane + (key_offset(i, lane) & ~(PAGE_RUN - 1));
            tile.page[i] = i % 2 == 0 || PAGE_RUN == 1 ? simd_shuffle(page, ushort(owner)) : tile.page[i - 1];
        }

        float2 scales_of_keys[KEY_BLOCKS], scales_of_values[KEY_BLOCKS];
#if K_QUANTIZED
        load_scales(scales_of_keys, cache.k_scales, tile, lane);
#endif
#if V_QUANTIZED
        load_scales(scales_of_values, cache.v_scales, tile, lane);
#endif

        // S = Q K^T
        float2 scores[ROW_BLOCKS * KEY_BLOCKS];
        UNROLL
        for (int i = 0; i < ROW_BLOCKS * KEY_BLOCKS; i++) scores[i] = float2(0.0f);
        simdgroup_barrier(mem_flags::mem_threadgroup);  // queries are read anew, not kept in registers
        UNROLL
        for (int c = 0; c + LOAD_CHUNKS <= K_CHUNKS; c += LOAD_CHUNKS) {
            Loaded<K_T, LOAD_CHUNKS, 0> loaded;
            load_rows<HEAD_DIM>(loaded, cache.k, c * 8 * CHUNK, tile, cache.k_page_stride, cache.k_token_stride, lane);
            multiply_keys(scores, my_queries + c * CHUNK * 32, loaded);
        }
        if (K_REST + K_TAIL > 0) {
            const int c = K_CHUNKS - K_REST;
            Loaded<K_T, K_REST, K_TAIL> loaded;
            load_rows<HEAD_DIM>(loaded, cache.k, c * 8 * CHUNK, tile, cache.k_page_stride, cache.k_token_stride, lane);
            multiply_keys(scores, my_queries + c * CHUNK * 32, loaded);
        }

#if K_QUANTIZED  // q . k of elements is exact, that of scaled ones would be rounded
        share_scales(scales_of_keys, lane);
        UNROLL
        for (int i = 0; i < ROW_BLOCKS * KEY_BLOCKS; i++) scores[i] *= scales_of_keys[i % KEY_BLOCKS];
#endif

        // The first values are loaded while the softmax is computed.
#if V_QUANTIZED
        share_scales(scales_of_values, lane);
#endif
        Loaded<V_T, V_FIRST, V_FIRST_TAIL> first_values;
        load_rows<V_HEAD_DIM>(first_values, cache.v, 0, tile, cache.v_page_stride, cache.v_token_stride, lane);

        // Online softmax: scores to weights, and those to P^T.
        Pair weights[ROW_BLOCKS * KEY_BLOCKS];
        UNROLL
        for (int r = 0; r < ROW_BLOCKS; r++) {
            const ScoreRow score_row = score_rows[r * 8 + matrix_row(lane)];  // read anew, as the queries
            float new_maximum = rows.maximum[r];
            UNROLL
            for (int i = 0; i < LANE_KEYS; i++) {
                thread float2& pair = scores[r * KEY_BLOCKS + i / 2];
                pair[i % 2] = masked_score(pair[i % 2], tile.first_key + key_offset(i, lane), score_row, score_params);
                new_maximum = max(new_maximum, pair[i % 2]);
            }
            new_maximum = row_max(new_maximum);
            const float alpha = fast::exp2(rows.maximum[r] - new_maximum);
            rows.maximum[r] = new_maximum;
            rows.sum[r] *= alpha;
            const uint kept = kept_of_row<KEY_BLOCKS>(dropout, r * 8 + matrix_row(lane), tile.first_key, score_params, lane);
            UNROLL
            for (int i = 0; i < KEY_BLOCKS; i++) {
                const float2 score = scores[r * KEY_BLOCKS + i];
                const float2 weight = float2(weight_of(score.x, new_maximum), weight_of(score.y, new_maximum));
                rows.sum[r] += weight.x + weight.y;
                weights[r * KEY_BLOCKS + i] = transposed(kept_weights(weight, kept, i), lane);
            }
            const float2 alphas = of_columns(alpha, lane);
            UNROLL
            for (int i = 0; i < V_MATRICES; i++) rows.output[r * V_MATRICES + i] *= alphas;
        }

        // O^T = O^T alpha + V^T P^T
        multiply_values(rows.output, weights, first_values, scales_of_values);
        UNROLL
        for (int c = LOAD_CHUNKS; c + LOAD_CHUNKS <= V_CHUNKS; c += LOAD_CHUNKS) {
            Loaded<V_T, LOAD_CHUNKS, 0> values;
            load_rows<V_HEAD_DIM>(values, cache.v, c * 8 * CHUNK, tile, cache.v_page_stride, cache.v_token_stride, lane);
            multiply_values(rows.output + c * CHUNK, weights, values, scales_of_values);
        }
        if (V_CHUNKS >= LOAD_CHUNKS && V_REST + V_TAIL > 0) {
            const int c = V_CHUNKS - V_REST;
            Loaded<V_T, V_REST, V_TAIL> values;
            load_rows<V_HEAD_DIM>(values, cache.v, c * 8 * CHUNK, tile, cache.v_page_stride, cache.v_token_stride, lane);
            multiply_values(rows.output + c * CHUNK, weights, values, scales_of_values);
        }
    }
}

// This simdgroup's maximum and sum of each row, to threadgroup memory.
inline void share_sums(thread Accumulator& rows, threadgroup float* row_maximum, threadgroup float* row_total, int lane) {
    UNROLL
    for (int r = 0; r < ROW_BLOCKS; r++) {
        const float total = row_sum(rows.sum[r]);
        if (matrix_column(lane) == 0) {
            row_maximum[r * 8 + matrix_row(lane)] = rows.maximum[r];
            row_total[r * 8 + matrix_row(lane)] = total;
        }
    }
}

// This simdgroup's output and sums of `count` rows from `block` on, as if its maxima were the largest of all, to threadgroup memory.
inline void share_output(
    thread const Accumulator& rows, threadgroup float* shared, int block, int count, threadgroup const float* row_maximum,
    threadgroup float* row_total, threadgroup float* row_top, int simdgroup, int simdgroups, int lane
) {
    UNROLL
    for (int r = 0; r < ROW_BLOCKS; r++) {
        UNROLL
        for (int e = 0; e < 2; e++) {
            const int row = r * 8 + matrix_column(lane) + e;
            if (row < block || row >= block + count) continue;
            const float top = largest_of(row_maximum + row, ROWS, simdgroups);
            const float factor = exp2(row_maximum[simdgroup * ROWS + row] - top);
            if (matrix_row(lane) == 0) {
                row_total[simdgroup * ROWS + row] *= factor;
                if (simdgroup == 0) row_top[row] = top;
            }
            UNROLL
            for (int i = 0; i < V_MATRICES; i++) {
                const int d = DimOrder<CHUNK, V_CHUNKS, V_TAIL>::dim_at(i, matrix_row(lane));
                if (d < V_HEAD_DIM) shared[(row - block) * V_HEAD_DIM + d] = rows.output[r * V_MATRICES + i][e] * factor;
            }
        }
    }
}

#endif
