// prefill: many queries. Tiles of QUERY_TILE rows against tiles of KEY_TILE keys, on 8x8 matrices, with an online softmax.
//
// As in decode, GQA is packed: the rows of a KV head are its queries times the query heads that share it, row r is query
// r / GROUP, head r % GROUP. A simdgroup has 8 rows and keeps their Q and output in registers. Keys and values pass through
// threadgroup memory, read straight from their pages, 16 bytes a lane:
//
//                    K tile: KEY_TILE x HEAD_DIM            V tile: KEY_TILE x V_HEAD_DIM
//   simdgroup 0      S(8 x KEY_TILE) = Q K^T  -> softmax -> O(8 x V_HEAD_DIM) += P V         rows  0 ..  7
//   simdgroup 1      ...                                                                     rows  8 .. 15
//   simdgroup 2, 3   ...                                                                     rows 16 .. 31
//
// Where Q and the output are too wide for the registers, DIM_SPLIT simdgroups share 8 rows. Each has its part of the dims of Q
// and of the output; they add up their scores through threadgroup memory. Where K and V together are too wide for that memory,
// they take turns in it (SHARES_TILE).
//
// Tiles of keys that no row of the threadgroup sees are never visited.
//
// A mixed batch has many sequences that are decode's. The row tiles of the others are then numbered, one sequence after another.
//
// Defined by the launcher: HEAD_DIM, V_HEAD_DIM, GROUP, PAGE_SIZE, PAGED, KEY_TILE, SIMDGROUPS, DIM_SPLIT, SHARES_TILE; CHUNK (elements
// of 16 bytes), K_CHUNKS (reads of a key by one lane), K_TAIL (as in decode), V_MATRICES (along the dims of one part).

#define QUERY_TILE (SIMDGROUPS / DIM_SPLIT * 8)
#define K_MATRICES (K_CHUNKS * CHUNK + K_TAIL)             // along the dims of one part
#define V_CHUNKS (V_MATRICES / (CHUNK / 2))                // reads of a value by one lane: 2 dims of each of CHUNK / 2 matrices
#define K_DIMS (DIM_SPLIT * K_MATRICES * 8)
#define V_DIMS (DIM_SPLIT * V_MATRICES * 8)
#define K_ROW (K_DIMS / CHUNK + 1)                         // loads a row in threadgroup memory: 16 bytes more keep banks apart
#define V_ROW (V_DIMS / CHUNK + 1)

typedef DimOrder<CHUNK, K_CHUNKS, K_TAIL> KeyDims;

// Rows of K or V for one tile of keys, from their pages into threadgroup memory; 0 for keys outside the range.
// Lane l of each simdgroup knows the page of key l of the tile.
template <int ROW, int DIMS, typename E>
inline void load_tile(
    threadgroup Packed<CHUNK>* tile, device const E* pages, thread const Scales& scales, bool scaled, int page, int first_key, KVRange range,
    long page_stride, int token_stride, int thread_index
) {
    const int loads = ROW - 1;
    for (int i = thread_index; i < (KEY_TILE * loads + THREADS - 1) / THREADS * THREADS; i += THREADS) {
        const int row = i / loads, chunk = i % loads;
        const int key = first_key + row;
        const int row_page = simd_shuffle(page, ushort(min(row, KEY_TILE - 1)));
        if (row < KEY_TILE) {
            Packed<CHUNK> loaded = Packed<CHUNK>(0);
            if (contains(range, key)) {
                const float scale = scaled ? *scales.at(row_page, key) : 1.0f;
                device const E* token = token_at(pages, row_page, key, page_stride, token_stride);
                loaded = Elements<E>::template scaled<CHUNK>(load<CHUNK, DIMS>(token, chunk * CHUNK), scale);
            }
            tile[row * ROW + chunk] = loaded;
        }
    }
}

// The sequence of a row tile of a mixed batch, none (from batch_size on) behind the last; `tile` becomes its own tile. Each lane counts
// the tiles of one of 32 sequences.
inline int sequence_of(thread int& tile, device const int* cu_seqlens_q, constant Params& params, int lane) {
    for (int first = 0; first < int(params.batch_size); first += 32) {
        const int b = first + lane;
        const int rows = b < int(params.batch_size) ? rows_of(b, params, cu_seqlens_q).count : 0;
        const int tiles = is_decoded(rows, params) ? 0 : (rows * GROUP + QUERY_TILE - 1) / QUERY_TILE;
        const int end = simd_prefix_inclusive_sum(tiles);
        const int passed = simd_sum(end <= tile ? 1 : 0);
        tile -= passed > 0 ? simd_shuffle(end, ushort(passed - 1)) : 0;
        if (passed < 32) return first + passed;
    }
    return int(params.batch_size);
}

[[max_total_threads_per_threadgroup(THREADS)]]
kernel void prefill(
    device const T* q [[buffer(0)]],
    device const K_T* k [[buffer(1)]],
    device const V_T* v [[buffer(2)]],
    device T* out [[buffer(3)]],
    device float* lse [[buffer(4)]],
    device const int* cu_seqlens_q [[buffer(5)]],
    device const int* cu_seqlens_k [[buffer(6)]],
    device const int* seqused_q [[buffer(7)]],
    device const int* seqused_k [[buffer(8)]],
    device const int* cache_batch_idx [[buffer(9)]],
    device const int* cache_leftpad [[buffer(10)]],
    device const int* block_table [[buffer(11)]],
    device const T* rotary_cos [[buffer(12)]],
    device const T* rotary_sin [[buffer(13)]],
    device const float* alibi_slopes [[buffer(14)]],
    device const float* sinks [[buffer(15)]],
    constant Params& params [[buffer(16)]],
    constant ScoreParams& score_params [[buffer(17)]],
    device float* k_descale [[buffer(18)]],
    device float* v_descale [[buffer(19)]],
    device const uint2* dropout_seed [[buffer(20)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint simdgroup_index [[simdgroup_index_in_threadgroup]],
    uint lane_index [[thread_index_in_simdgroup]]
) {
#if SHARES_TILE
    threadgroup Packed<CHUNK> k_tile[KEY_TILE * MAX_OF(K_ROW, V_ROW)];
    threadgroup Packed<CHUNK>* v_tile = k_tile;
#else
    threadgroup Packed<CHUNK> k_tile[KEY_TILE * K_ROW];
    threadgroup Packed<CHUNK> v_tile[KEY_TILE * V_ROW];
#endif
#if DIM_SPLIT > 1
    threadgroup float2 score_parts[SIMDGROUPS * KEY_TILE / 8 * 32];
#endif
    threadgroup T* k_rows = reinterpret_cast<threadgroup T*>(k_tile);
    threadgroup const T* v_rows = reinterpret_cast<threadgroup const T*>(v_tile);

    const int lane = int(lane_index);
    const int simdgroup = int(simdgroup_index);
    const int thread_index = simdgroup * 32 + lane;
    int row_tile = int(group.x), b = int(group.z);
    if (params.decode_limit) {
        const bool behind = b > 0;
        b = behind ? int(params.batch_size) : sequence_of(row_tile, cu_seqlens_q, params, lane);
        if (b >= int(params.batch_size) && !behind) return;
    }
    const int first_row = row_tile * QUERY_TILE;
    const int kv_head = int(group.y);
    const int first_head = kv_head * GROUP;

    // ---- Padding rows of packed q, behind all sequences: the last threadgroups clear them
    if (b == int(params.batch_size)) {
        if (first_row > 0) return;
        for (int row = max(cu_seqlens_q[b], 0); row < int(params.num_tokens_q); row++) {
            for (int g = 0; g < GROUP; g++) write_empty_row(out, lse, params, row, first_head + g, thread_index, THREADS);
        }
        return;
    }
    Sequence s = sequence_at(b, params, cu_seqlens_q, seqused_q);
    find_keys(
        s, b, params, score_params, cu_seqlens_k, load_length(b, params, seqused_k, lane), cache_batch_idx, cache_leftpad
    );
    if (first_row >= s.rows * GROUP) return;

    // ---- Q, a few rows at a time through the tile of K, and of it this lane's two elements of each 8x8 matrix
    const int slot = matrix_row(lane), column = matrix_column(lane);
    const int part = simdgroup % DIM_SPLIT, row_group = simdgroup / DIM_SPLIT;
    const int r = first_row + row_group * 8 + slot;
    const int query = r / GROUP, head = first_head + r % GROUP;

    device const T* q_rows = q + first_head * params.q_head_stride
        + (params.has_cu_seqlens_q ? s.first_row * params.q_token_stride : b * params.q_batch_stride);
    Pair queries[K_MATRICES];
    for (int first = 0; first < QUERY_TILE; first += KEY_TILE) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
        const int step = params.rotary_half ? 1 : CHUNK;  // dims at a time: rotated ones one by one
        for (int i = thread_index * step; i < KEY_TILE * K_DIMS; i += THREADS * step) {
            const int row = i / K_DIMS, d = i % K_DIMS;
            const int row_query = (first_row + first + row) / GROUP, row_head = (first_row + first + row) % GROUP;
            device const T* q_row = q_rows + row_query * params.q_token_stride + row_head * params.q_head_stride;
            const bool in_use = row_query < s.seqlen_q;
            if (params.rotary_half) {
                const int position = rotary_position(s, params, row_query);
                k_rows[row * K_ROW * CHUNK + d] = in_use && d < HEAD_DIM
                    ? rotated(q_row, d, position, rotary_cos, rotary_sin, params)
                    : T(0.0f);
            } else {
                k_tile[row * K_ROW + d / CHUNK] = in_use ? load<CHUNK, HEAD_DIM>(q_row, d) : Packed<CHUNK>(0);
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (row_group * 8 / KEY_TILE * KEY_TILE == first) {
            threadgroup const T* q_row = k_rows + (row_group * 8 - first + slot) * K_ROW * CHUNK + part * K_MATRICES * 8;
            UNROLL
            for (int i = 0; i < K_MATRICES; i++) {
                queries[i] = Pair(q_row[KeyDims::dim_at(i, column)], q_row[KeyDims::dim_at(i, column + 1)]);
            }
        }
    }

    // ---- Which keys: those any row of the tile sees
    const ScoreRow score_row_of_lane = score_row(s, query, alibi_slope(alibi_slopes, params, b, head));
    const KVRange range = kv_range(s, first_row / GROUP, (first_row + QUERY_TILE - 1) / GROUP);
    const int tiles_end = range.begin < range.end ? range.end : 0;

    device const K_T* k_pages = k + s.cache_row * params.k_batch_stride + kv_head * params.k_head_stride;
    const Scales k_scales = k_scales_of(k_descale, params, b, s.cache_row, kv_head);
    const Scales v_scales = v_scales_of(v_descale, params, b, s.cache_row, kv_head);
    device const V_T* v_pages = v + s.cache_row * params.v_batch_stride + kv_head * params.v_head_stride;
    device const int* pages_of_sequence = block_table + long(b) * params.max_pages;
    const long k_page_stride = params.k_page_stride, v_page_stride = params.v_page_stride;
    const int k_token_stride = int(params.k_token_stride), v_token_stride = int(params.v_token_stride);

    const Dropout dropout = {load_seed(dropout_seed), b, first_row, first_head, GROUP};
    float maximum = LOWEST, sum = 0.0f;  // of this lane's row; the sum over this lane's columns only
    float2 output[V_MATRICES];
    UNROLL
    for (int i = 0; i < V_MATRICES; i++) output[i] = float2(0.0f);

    // ---- The tiles of keys
    for (int first_key = range.begin / KEY_TILE * KEY_TILE; first_key < tiles_end; first_key += KEY_TILE) {
        const int page = page_of(
            pages_of_sequence, clamp(first_key + min(lane, KEY_TILE - 1), range.begin, range.end - 1), int(params.num_pages)
        );
        threadgroup_barrier(mem_flags::mem_threadgroup);
        load_tile<K_ROW, HEAD_DIM>(
            k_tile, k_pages, k_scales, false, page, first_key, range, k_page_stride, k_token_stride, thread_index
        );
#if !SHARES_TILE
        load_tile<V_ROW, V_HEAD_DIM>(
            v_tile, v_pages, v_scales, V_QUANTIZED, page, first_key, range, v_page_stride, v_token_stride, thread_index
        );
#endif
        threadgroup_barrier(mem_flags::mem_threadgroup);

        // S = Q K^T
        float2 scores[KEY_TILE / 8];
        multiply_rows<KEY_TILE / 8, CHUNK, K_CHUNKS, K_TAIL>(
            scores, queries, k_rows + part * K_MATRICES * 8, K_ROW * CHUNK, lane
        );
#if DIM_SPLIT > 1
        UNROLL
        for (int j = 0; j < KEY_TILE / 8; j++) score_parts[(simdgroup * (KEY_TILE / 8) + j) * 32 + lane] = scores[j];
        threadgroup_barrier(mem_flags::mem_threadgroup);
        UNROLL
        for (int j = 0; j < KEY_TILE / 8; j++) {
            scores[j] = float2(0.0f);
            UNROLL
            for (int p = 0; p < DIM_SPLIT; p++) {
                scores[j] += score_parts[((row_group * DIM_SPLIT + p) * (KEY_TILE / 8) + j) * 32 + lane];
            }
        }
#endif

#if K_QUANTIZED  // q . k of elements is exact, that of scaled ones would be rounded
        UNROLL
        for (int j = 0; j < KEY_TILE / 8; j++) {
            UNROLL
            for (int e = 0; e < 2; e++) {
                const int row = j * 8 + column + e;
                const int row_page = simd_shuffle(page, ushort(row));
                if (contains(range, first_key + row)) scores[j][e] *= *k_scales.at(row_page, first_key + row);
            }
        }
#endif

        // Online softmax of each row.
        float tile_maximum = LOWEST;
        UNROLL
        for (int j = 0; j < KEY_TILE / 8; j++) {
            UNROLL
            for (int e = 0; e < 2; e++) {
                const int key = first_key + j * 8 + column + e;
                scores[j][e] = masked_score(scores[j][e], key, score_row_of_lane, score_params);
                tile_maximum = max(tile_maximum, scores[j][e]);
            }
        }
        const float new_maximum = max(maximum, row_max(tile_maximum));
        const float alpha = fast::exp2(maximum - new_maximum);
        maximum = new_maximum;
        sum *= alpha;
        Pair weights[KEY_TILE / 8];
        const uint kept = kept_of_row<KEY_TILE / 8>(dropout, row_group * 8 + slot, first_key, score_params, lane);
        UNROLL
        for (int j = 0; j < KEY_TILE / 8; j++) {
            float2 weight = float2(weight_of(scores[j].x, maximum), weight_of(scores[j].y, maximum));
            sum += weight.x + weight.y;
            weight = kept_weights(weight, kept, j);
            weights[j] = Pair(T(weight.x), T(weight.y));
        }

#if SHARES_TILE
        threadgroup_barrier(mem_flags::mem_threadgroup);
        load_tile<V_ROW, V_HEAD_DIM>(
            v_tile, v_pages, v_scales, V_QUANTIZED, page, first_key, range, v_page_stride, v_token_stride, thread_index
        );
        threadgroup_barrier(mem_flags::mem_threadgroup);
#endif

        // O = O alpha + P V
        UNROLL
        for (int i = 0; i < V_MATRICES; i++) output[i] *= alpha;
        threadgroup const T* values = v_rows + slot * V_ROW * CHUNK + part * V_MATRICES * 8;
        UNROLL
        for (int j = 0; j < KEY_TILE / 8; j++) {
            simdgroup_barrier(mem_flags::mem_none);
            UNROLL
            for (int c = 0; c < V_CHUNKS; c++) {
                threadgroup const T* read = values + j * 8 * V_ROW * CHUNK + c * 4 * CHUNK + column / 2 * CHUNK;
                const Packed<CHUNK> value = *reinterpret_cast<threadgroup const Packed<CHUNK>*>(read);
                UNROLL
                for (int i = 0; i < CHUNK / 2; i++) {
                    multiply_add(output[c * (CHUNK / 2) + i], weights[j], neighbours_of(value, i));
                }
            }
            UNROLL
            for (int i = V_CHUNKS * (CHUNK / 2); i < V_MATRICES; i++) {
                threadgroup const T* read = values + j * 8 * V_ROW * CHUNK + i * 8 + column;
                multiply_add(output[i], weights[j], *reinterpret_cast<threadgroup const Pair*>(read));
            }
        }
    }

    // ---- Write
    const float total = row_sum(sum);
    if (query >= s.rows) return;
    const Normaliser n = normaliser_of(maximum, total, params.has_sinks, params.has_sinks ? sinks[head] : 0.0f);
    const float factor = DROPOUT ? n.factor * score_params.dropout_scale : n.factor;
    const int row = s.first_row + query;
    device T* out_row = out + (long(row) * params.num_heads + head) * V_HEAD_DIM;
    UNROLL
    for (int i = 0; i < V_MATRICES; i++) {
        const int chunk = i / (CHUNK / 2);
        const int d = part * V_MATRICES * 8
            + (chunk < V_CHUNKS ? chunk * 4 * CHUNK + column / 2 * CHUNK + i % (CHUNK / 2) * 2 : i * 8 + column);
        if (d < V_HEAD_DIM) out_row[d] = T(output[i].x * factor);
        if (d + 1 < V_HEAD_DIM) out_row[d + 1] = T(output[i].y * factor);
    }
    if (column == 0 && part == 0) write_lse(lse, params, row, head, n.lse);
}
