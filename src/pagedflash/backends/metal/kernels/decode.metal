// decode: few queries a sequence against many keys. Split-KV online softmax over pages, with packed GQA: all queries and
// all query heads that share a KV head are rows of one threadgroup, so every element of the cache is loaded once.
//
// A threadgroup has one sequence, one KV head, one split of the keys. Its simdgroups take tiles of TILE_KEYS keys in turn and
// multiply them with all ROWS rows, as 8x8 matrices whose elements come straight from the pages: no threadgroup memory, no
// shuffles. Since a sum over dims may be taken in any order, the 8 dims of one matrix need not be neighbours. They are as far
// apart as one load is wide, so that each load of 16 bytes fills WIDTH matrices, and the lanes of one key read whole lines
// (here WIDTH = 8, D = 128: 16 matrices for 8 keys):
//
//   matrix 0:     dims  0,  8, 16, ... 56        lanes of dim slot 0 load dims 0 .. 7 of two keys, slot 1 dims 8 .. 15, ...
//   matrix 1:     dims  1,  9, 17, ... 57
//     ...
//   matrix 8:     dims 64, 72, 80, ... 120
//
//   S   (rows x keys)  =  Q (rows x dims)    K^T (dims x keys)      lane (slot, column) holds keys column, column + 1
//   O^T (dims x rows) +=  V^T (dims x keys)  P^T (keys x rows)      the same lanes load V as they load K
//
// Defined by the launcher: HEAD_DIM, V_HEAD_DIM, GROUP (query heads a KV head), PAGED, PAGE_SIZE, SIMDGROUPS; ROW_BLOCKS,
// KEY_BLOCKS (matrices of 8 rows, of 8 keys); CHUNK (elements of a load), K_TAIL, V_TAIL (of the loads behind the last whole
// 8 * CHUNK dims, 0 = none), LOAD_CHUNKS (loads of a key in flight together); REDUCE_ROWS (rows that the simdgroups reduce at once); PAGE_RUN (keys in one page).

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
#define QUERY_BYTES (ROWS * K_MATRICES * 8 * T_BYTES)
#define REDUCE_BYTES (SIMDGROUPS * REDUCE_ROWS * V_HEAD_DIM * 4)

// A tile of keys, as one lane sees it.
struct Tile {
    int first_key;
    int page[LANE_KEYS];  // of each of its keys
    KVRange range;        // keys that may be read
    bool inside;          // whether all of the tile may be
};

inline int key_offset(int i, int lane) { return i / 2 * 8 + matrix_column(lane) + i % 2; }

// The pages of this simdgroup's next LOOKUP_TILES tiles from `tile` on: one key a lane, and of those that lie in one page for
// sure the first.
inline int looked_up_page(device const int* pages_of_sequence, int tile, int lane, int begin, int end) {
    const int key = (tile + lane / TILE_KEYS * SIMDGROUPS) * TILE_KEYS + lane % TILE_KEYS;
    return lane % PAGE_RUN == 0 ? page_of(pages_of_sequence, clamp(key, begin, end - 1)) : 0;
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

// The scales of this lane's keys of a tile, 0 for those outside the range.
inline void load_scales(thread float2* scales, thread const Scales& of_head, thread const Tile& tile, int lane) {
    UNROLL
    for (int i = 0; i < LANE_KEYS; i++) {
        const int key = tile.first_key + key_offset(i, lane);
        scales[i / 2][i % 2] = tile.inside || contains(tile.range, key) ? *of_head.at(tile.page[i], key) : 0.0f;
    }
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

[[max_total_threads_per_threadgroup(THREADS)]]
kernel void decode(
    device const T* q [[buffer(0)]],
    device K_T* k [[buffer(1)]],
    device V_T* v [[buffer(2)]],
    device T* out [[buffer(3)]],
    device float* lse [[buffer(4)]],
    device const T* k_new [[buffer(5)]],
    device const T* v_new [[buffer(6)]],
    device const int* cu_seqlens_q [[buffer(7)]],
    device const int* cu_seqlens_k [[buffer(8)]],
    device const int* seqused_q [[buffer(9)]],
    device const int* seqused_k [[buffer(10)]],
    device const int* cache_batch_idx [[buffer(11)]],
    device const int* cache_leftpad [[buffer(12)]],
    device const int* block_table [[buffer(13)]],
    device const T* rotary_cos [[buffer(14)]],
    device const T* rotary_sin [[buffer(15)]],
    device const float* alibi_slopes [[buffer(16)]],
    device const float* sinks [[buffer(17)]],
    device float* out_partial [[buffer(18)]],
    device float* softmax_partial [[buffer(19)]],
    constant Params& params [[buffer(20)]],
    constant ScoreParams& score_params [[buffer(21)]],
    device float* k_descale [[buffer(22)]],
    device float* v_descale [[buffer(23)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint simdgroup_index [[simdgroup_index_in_threadgroup]],
    uint lane_index [[thread_index_in_simdgroup]]
) {
    threadgroup float4 shared_quads[(MAX_OF(QUERY_BYTES, REDUCE_BYTES) + 15) / 16];
    threadgroup float row_maximum[SIMDGROUPS * ROWS];
    threadgroup float row_total[SIMDGROUPS * ROWS];
    threadgroup T* query_elements = reinterpret_cast<threadgroup T*>(shared_quads);
    threadgroup float* scratch = reinterpret_cast<threadgroup float*>(shared_quads);

    const int lane = int(lane_index);
    const int simdgroup = simd_shuffle(int(simdgroup_index), ushort(0));  // so that compilers see it is one for all lanes
    const int thread_index = simdgroup * 32 + lane;
    const int slot = matrix_row(lane), column = matrix_column(lane);
    const int num_splits = int(params.num_splits);
    const int kv_head = int(group.x);
    const int split = int(group.y) % num_splits;
    const int first_row = int(group.y) / num_splits * ROWS;  // row r is query r / GROUP, head r % GROUP of this KV head
    const int b = int(group.z);
    const int first_head = kv_head * GROUP;

    // ---- Padding rows of packed q, behind all sequences: the last threadgroups clear them
    if (b == int(params.batch_size)) {
        if (first_row > 0) return;
        for (int row = cu_seqlens_q[b]; row < int(params.num_tokens_q); row++) {
            for (int head = first_head; head < first_head + GROUP; head++) {
                if (num_splits == 1) {
                    write_empty_row(out, lse, params, row, head, thread_index);
                } else if (thread_index < 2) {  // combine clears the row
                    const long partial = (long(row) * params.num_heads + head) * num_splits + split;
                    softmax_partial[partial * 2 + thread_index] = thread_index == 0 ? LOWEST : 0.0f;
                }
            }
        }
        return;
    }
    const Sequence s = sequence_at(
        b, params, score_params, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, cache_batch_idx, cache_leftpad
    );
    const int rows = min(ROWS, s.rows * GROUP - first_row);
    if (rows <= 0 || !is_decoded(s.rows, params)) return;

    // ---- Which keys: those any row sees, plus the new ones, which must be written; of them the tiles of this split
    const KVRange range = kv_range(s, first_row / GROUP, (first_row + ROWS - 1) / GROUP);
    const int append_begin = params.appends ? s.append_begin : s.seqlen_k;
    const int begin = min(range.begin, append_begin);
    const int end = append_begin < s.seqlen_k ? s.seqlen_k : range.end;
    const int first_tile = begin / TILE_KEYS;
    const int tiles = end > begin ? (end + TILE_KEYS - 1) / TILE_KEYS - first_tile : 0;
    const int tiles_per_split = (tiles + num_splits - 1) / num_splits;
    const int tiles_begin = first_tile + split * tiles_per_split;
    const int tiles_end = min(tiles_begin + tiles_per_split, first_tile + tiles);

    device K_T* k_pages = k + s.cache_row * params.k_batch_stride + kv_head * params.k_head_stride;
    const Scales k_scales = k_scales_of(k_descale, params, b, s.cache_row, kv_head);
    const Scales v_scales = v_scales_of(v_descale, params, b, s.cache_row, kv_head);
    device V_T* v_pages = v + s.cache_row * params.v_batch_stride + kv_head * params.v_head_stride;
    device const int* pages_of_sequence = block_table + long(b) * params.max_pages;
    const long k_page_stride = params.k_page_stride, v_page_stride = params.v_page_stride;
    const int k_token_stride = int(params.k_token_stride), v_token_stride = int(params.v_token_stride);

    // ---- New keys go to the cache first, by the simdgroup that will read them; then they are keys like all others
    if (append_begin < s.seqlen_k) {
        for (int key = max(append_begin, tiles_begin * TILE_KEYS); key < min(s.seqlen_k, tiles_end * TILE_KEYS); key++) {
            if ((key / TILE_KEYS - tiles_begin) % SIMDGROUPS != simdgroup) continue;
            const int token = key - append_begin;
            const int page = page_of(pages_of_sequence, key);
            append_token(
                slot_at(k_pages, page, key, k_page_stride, k_token_stride),
                slot_at(v_pages, page, key, v_page_stride, v_token_stride),
                k_scales.at(page, key),
                v_scales.at(page, key),
                k_new + b * params.k_new_batch_stride + token * params.k_new_token_stride + kv_head * params.k_new_head_stride,
                v_new + b * params.v_new_batch_stride + token * params.v_new_token_stride + kv_head * params.v_new_head_stride,
                key, rotary_cos, rotary_sin, params, lane
            );
        }
        simdgroup_barrier(mem_flags::mem_device);
    }

    const int my_first_tile = tiles_begin + simdgroup;  // its pages are looked up while the queries are loaded
    int next_page = 0;
    if (my_first_tile < tiles_end) next_page = looked_up_page(pages_of_sequence, my_first_tile, lane, begin, end);

    // ---- The queries, rotated, into threadgroup memory, each element where its lane finds it
    typedef DimOrder<CHUNK, K_CHUNKS, K_TAIL> KeyDims;
    device const T* q_rows = q + first_head * params.q_head_stride
        + (params.has_cu_seqlens_q ? s.first_row * params.q_token_stride : b * params.q_batch_stride);
    for (int i = thread_index; i < ROWS * K_MATRICES * 8; i += THREADS) {
        const int r = i / (K_MATRICES * 8), d = i % (K_MATRICES * 8);
        const int query = (first_row + r) / GROUP, head = (first_row + r) % GROUP;
        T x = T(0.0f);
        if (query < s.seqlen_q && d < HEAD_DIM) {
            device const T* row = q_rows + query * params.q_token_stride + head * params.q_head_stride;
            x = params.rotary_half
                ? rotated(row, d, rotary_position(s, params, query), rotary_cos, rotary_sin, params)
                : row[d];
        }
        const int matrix = r / 8 * K_MATRICES + KeyDims::matrix_of(d), dim_slot = KeyDims::slot_of(d);
        query_elements[(matrix * 32 + lane_at(r % 8, dim_slot & ~1)) * 2 + (dim_slot & 1)] = x;
    }
    threadgroup const Pair* queries = reinterpret_cast<threadgroup const Pair*>(query_elements) + lane;
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // ---- The state of the rows: this lane's is row `slot` of each block for scores, columns `column` and + 1 for the output
    ScoreRow score_rows[ROW_BLOCKS];
    float maximum[ROW_BLOCKS], sum[ROW_BLOCKS];  // over all keys so far; over the keys of this lane
    float2 output[ROW_BLOCKS * V_MATRICES];
    UNROLL
    for (int r = 0; r < ROW_BLOCKS; r++) {
        const int row = first_row + r * 8 + slot;
        score_rows[r] = score_row(s, row / GROUP, alibi_slope(alibi_slopes, params, b, first_head + row % GROUP));
        maximum[r] = LOWEST;
        sum[r] = 0.0f;
    }
    UNROLL
    for (int i = 0; i < ROW_BLOCKS * V_MATRICES; i++) output[i] = float2(0.0f);

    // ---- The tiles
    int page = 0, looked_up = 0;  // tiles whose pages are looked up
    for (int t = my_first_tile; t < tiles_end; t += SIMDGROUPS) {
        if (looked_up == 0) {
            page = next_page;
            looked_up = LOOKUP_TILES;
            const int next = t + LOOKUP_TILES * SIMDGROUPS;  // looked up while these tiles are worked on
            if (next < tiles_end) next_page = looked_up_page(pages_of_sequence, next, lane, begin, end);
        }
        const int first_lane = (LOOKUP_TILES - looked_up--) * TILE_KEYS;
        Tile tile;
        tile.first_key = t * TILE_KEYS;
        tile.range = range;
        tile.inside = tile.first_key >= range.begin && tile.first_key + TILE_KEYS <= range.end;
        UNROLL
        for (int i = 0; i < LANE_KEYS; i++) {
            const int owner = first_lane + (key_offset(i, lane) & ~(PAGE_RUN - 1));
            tile.page[i] = i % 2 == 0 || PAGE_RUN == 1 ? simd_shuffle(page, ushort(owner)) : tile.page[i - 1];
        }

        // S = Q K^T
        float2 scores[ROW_BLOCKS * KEY_BLOCKS];
        UNROLL
        for (int i = 0; i < ROW_BLOCKS * KEY_BLOCKS; i++) scores[i] = float2(0.0f);
        simdgroup_barrier(mem_flags::mem_threadgroup);  // queries are read anew, not kept in registers
        UNROLL
        for (int c = 0; c + LOAD_CHUNKS <= K_CHUNKS; c += LOAD_CHUNKS) {
            Loaded<K_T, LOAD_CHUNKS, 0> keys;
            load_rows<HEAD_DIM>(keys, k_pages, c * 8 * CHUNK, tile, k_page_stride, k_token_stride, lane);
            multiply_keys(scores, queries + c * CHUNK * 32, keys);
        }
        if (K_REST + K_TAIL > 0) {
            const int c = K_CHUNKS - K_REST;
            Loaded<K_T, K_REST, K_TAIL> keys;
            load_rows<HEAD_DIM>(keys, k_pages, c * 8 * CHUNK, tile, k_page_stride, k_token_stride, lane);
            multiply_keys(scores, queries + c * CHUNK * 32, keys);
        }

#if K_QUANTIZED  // q . k of elements is exact, that of scaled ones would be rounded
        float2 scales_of_keys[KEY_BLOCKS];
        load_scales(scales_of_keys, k_scales, tile, lane);
        UNROLL
        for (int i = 0; i < ROW_BLOCKS * KEY_BLOCKS; i++) scores[i] *= scales_of_keys[i % KEY_BLOCKS];
#endif

        // The first values are loaded while the softmax is computed.
        float2 scales_of_values[KEY_BLOCKS];
#if V_QUANTIZED
        load_scales(scales_of_values, v_scales, tile, lane);
#endif
        Loaded<V_T, V_FIRST, V_FIRST_TAIL> first_values;
        load_rows<V_HEAD_DIM>(first_values, v_pages, 0, tile, v_page_stride, v_token_stride, lane);

        // Online softmax: scores to weights, and those to P^T.
        Pair weights[ROW_BLOCKS * KEY_BLOCKS];
        UNROLL
        for (int r = 0; r < ROW_BLOCKS; r++) {
            float new_maximum = maximum[r];
            UNROLL
            for (int i = 0; i < LANE_KEYS; i++) {
                thread float2& pair = scores[r * KEY_BLOCKS + i / 2];
                pair[i % 2] = masked_score(pair[i % 2], tile.first_key + key_offset(i, lane), score_rows[r], score_params);
                new_maximum = max(new_maximum, pair[i % 2]);
            }
            new_maximum = row_max(new_maximum);
            const float alpha = fast::exp2(maximum[r] - new_maximum);
            maximum[r] = new_maximum;
            sum[r] *= alpha;
            UNROLL
            for (int i = 0; i < KEY_BLOCKS; i++) {
                const float2 score = scores[r * KEY_BLOCKS + i];
                const float2 weight = float2(weight_of(score.x, new_maximum), weight_of(score.y, new_maximum));
                sum[r] += weight.x + weight.y;
                weights[r * KEY_BLOCKS + i] = transposed(weight, lane);
            }
            const float2 alphas = of_columns(alpha, lane);
            UNROLL
            for (int i = 0; i < V_MATRICES; i++) output[r * V_MATRICES + i] *= alphas;
        }

        // O^T = O^T alpha + V^T P^T
        multiply_values(output, weights, first_values, scales_of_values);
        UNROLL
        for (int c = LOAD_CHUNKS; c + LOAD_CHUNKS <= V_CHUNKS; c += LOAD_CHUNKS) {
            Loaded<V_T, LOAD_CHUNKS, 0> values;
            load_rows<V_HEAD_DIM>(values, v_pages, c * 8 * CHUNK, tile, v_page_stride, v_token_stride, lane);
            multiply_values(output + c * CHUNK, weights, values, scales_of_values);
        }
        if (V_CHUNKS >= LOAD_CHUNKS && V_REST + V_TAIL > 0) {
            const int c = V_CHUNKS - V_REST;
            Loaded<V_T, V_REST, V_TAIL> values;
            load_rows<V_HEAD_DIM>(values, v_pages, c * 8 * CHUNK, tile, v_page_stride, v_token_stride, lane);
            multiply_values(output + c * CHUNK, weights, values, scales_of_values);
        }
    }

    // ---- Reduce the simdgroups, some rows at a time
    UNROLL
    for (int r = 0; r < ROW_BLOCKS; r++) {
        const float total = row_sum(sum[r]);
        if (column == 0) {
            row_maximum[simdgroup * ROWS + r * 8 + slot] = maximum[r];
            row_total[simdgroup * ROWS + r * 8 + slot] = total;
        }
    }
    for (int block = 0; block < rows; block += REDUCE_ROWS) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
        UNROLL
        for (int r = 0; r < ROW_BLOCKS; r++) {
            UNROLL
            for (int e = 0; e < 2; e++) {
                const int row = r * 8 + column + e;
                if (row < block || row >= block + REDUCE_ROWS) continue;
                float top = LOWEST;
                for (int other = 0; other < SIMDGROUPS; other++) top = max(top, row_maximum[other * ROWS + row]);
                const float alpha = exp2(row_maximum[simdgroup * ROWS + row] - top);
                UNROLL
                for (int i = 0; i < V_MATRICES; i++) {
                    const int d = DimOrder<CHUNK, V_CHUNKS, V_TAIL>::dim_at(i, slot);
                    if (d >= V_HEAD_DIM) continue;
                    scratch[(simdgroup * REDUCE_ROWS + row - block) * V_HEAD_DIM + d] = output[r * V_MATRICES + i][e] * alpha;
                }
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);

        // ---- Write: the output, or the partial output of this split
        for (int i = thread_index; i < min(REDUCE_ROWS, rows - block) * V_HEAD_DIM; i += THREADS) {
            const int r = block + i / V_HEAD_DIM, d = i % V_HEAD_DIM;
            const int query = (first_row + r) / GROUP, head = first_head + (first_row + r) % GROUP;

            float top = LOWEST, total = 0.0f, x = 0.0f;
            for (int other = 0; other < SIMDGROUPS; other++) top = max(top, row_maximum[other * ROWS + r]);
            for (int other = 0; other < SIMDGROUPS; other++) {
                total += row_total[other * ROWS + r] * exp2(row_maximum[other * ROWS + r] - top);
                x += scratch[other * REDUCE_ROWS * V_HEAD_DIM + i];
            }
            const int row = s.first_row + query;
            const long out_row = long(row) * params.num_heads + head;
            if (num_splits > 1) {
                const long partial = (partial_row(params, b, query, row) * params.num_heads + head) * num_splits + split;
                if (d == 0) {
                    softmax_partial[partial * 2] = top;
                    softmax_partial[partial * 2 + 1] = total;
                }
                if (total > 0.0f) out_partial[partial * V_HEAD_DIM + d] = x;
            } else {
                const Normaliser n = normaliser_of(top, total, params.has_sinks, params.has_sinks ? sinks[head] : 0.0f);
                out[out_row * V_HEAD_DIM + d] = T(x * n.factor);
                if (d == 0) lse[lse_index(params, row, head)] = n.lse;
            }
        }
    }
}
