// backward: the gradients of queries, keys and values. Tiles of KEY_TILE keys against tiles of QUERY_TILE rows, on 8x8 matrices.
//
// Probabilities are computed again from q, k and the LSE, so nothing of size Sq x Sk is ever held; five products in all:
//
//   P = 2^(scale Q K^T - LSE)     dP = dO V^T     dS = P (dP - delta)     dV += P^T dO     dK += dS^T Q     dQ += dS K
//
// With dropout the P of dV and dP are dropped.
//
// A threadgroup takes every num_splits-th tile of keys, and to each the rows that see it: the queries times HEADS heads that share
// the KV head. A simdgroup has 8 keys, whose K, V, dK and dV stay in registers. It computes S and dP transposed, keys x rows: in
// the registers they come in they are the first factor of dV and dK. Only dS goes through threadgroup memory, to
// dQ, which is added to in device memory:
//
//                    Q, dO tile: QUERY_TILE x dims, in threadgroup memory
//   simdgroup 0      P^T, dS^T (8 x QUERY_TILE)    dV, dK (8 x dims) +=      keys 0 ..  7
//   simdgroup 1      ...                                                     keys 8 .. 15
//   all              dS (QUERY_TILE x KEY_TILE)    dQ (QUERY_TILE x HEAD_DIM) += dS K
//
// Each split has a dQ of its own, and a thread adds to the same elements of it for every tile of keys: the same bits each time. Where
// the registers do not hold this, DIM_SPLIT simdgroups share 8 keys, each with its part of the dims, as in prefill.
//
// Source: Dao, "FlashAttention-2" (2023), algorithm 2.
//
// Defined by the launcher: HEAD_DIM, V_HEAD_DIM, HEADS, PARTS (of the heads of a KV head), QUERY_TILE, SIMDGROUPS, DIM_SPLIT; CHUNK
// (elements of 16 bytes), K_CHUNKS, V_CHUNKS (reads of a row by one lane), K_TAIL, V_TAIL (as in decode).

#define KEY_TILE (SIMDGROUPS / DIM_SPLIT * 8)
#define QUERY_BLOCKS (QUERY_TILE / 8)
#define K_MATRICES (K_CHUNKS * CHUNK + K_TAIL)  // along the dims of one part
#define V_MATRICES (V_CHUNKS * CHUNK + V_TAIL)
#define K_DIMS (DIM_SPLIT * K_MATRICES * 8)
#define K_ROW (K_DIMS / CHUNK + 1)  // loads a row in threadgroup memory: 16 bytes more keep banks apart
#define V_ROW (DIM_SPLIT * V_MATRICES * 8 / CHUNK + 1)
#define D_Q_ROW ((HEAD_DIM + 15) / 16 * 16)
#define SCORE_ROW (KEY_TILE + CHUNK)

// Rows of a tile: the keys or values of a KV head, or what belongs to HEADS query heads of each query.
template <typename E>
struct TileRows {
    device const E* first;
    long token_stride;
    long head_stride;
    int heads;

    device const E* at(int row) const thread { return first + row / heads * token_stride + row % heads * head_stride; }
};

// Rows `begin` to `begin + count` into threadgroup memory; 0 for those outside of `used`.
template <int ROW, int DIMS, typename E>
inline void load_rows(
    threadgroup Packed<CHUNK>* tile, thread const TileRows<E>& rows, int begin, int count, KVRange used, int thread_index
) {
    const int loads = ROW - 1;
    for (int i = thread_index; i < count * loads; i += THREADS) {
        const int row = begin + i / loads, chunk = i % loads;
        tile[i / loads * ROW + chunk] = contains(used, row)
            ? Elements<E>::template scaled<CHUNK>(load<CHUNK, DIMS>(rows.at(row), chunk * CHUNK), 1.0f)
            : Packed<CHUNK>(0);
    }
}

// Of a row in threadgroup memory, this lane's two elements of each matrix.
template <int MATRICES, int CHUNKS, int TAIL>
inline void take_row(thread Pair* fragments, threadgroup const T* row, int column) {
    typedef DimOrder<CHUNK, CHUNKS, TAIL> Dims;
    UNROLL
    for (int i = 0; i < MATRICES; i++) fragments[i] = Pair(row[Dims::dim_at(i, column)], row[Dims::dim_at(i, column + 1)]);
}

// sums += A B for the rows of B in threadgroup memory, of 8 dims for each sum: A has 8 columns a block.
template <int BLOCKS, int MATRICES>
inline void add_products(
    thread float2* sums, thread const float2* factors, threadgroup const T* rows, int stride, int slot, int column
) {
    UNROLL
    for (int j = 0; j < BLOCKS; j++) {
        const Pair factor = Pair(T(factors[j].x), T(factors[j].y));
        threadgroup const T* row = rows + (j * 8 + slot) * stride + column;
        simdgroup_barrier(mem_flags::mem_none);
        UNROLL
        for (int i = 0; i < MATRICES; i++) {
            multiply_add(sums[i], factor, *reinterpret_cast<threadgroup const Pair*>(row + i * 8));
        }
    }
}

// A row of a gradient, from this lane's two elements of each matrix.
template <int MATRICES, int DIMS, typename E>
inline void store_row(device E* row, thread const float2* sums, float scale, int first_dim) {
    UNROLL
    for (int i = 0; i < MATRICES; i++) {
        const int d = first_dim + i * 8;
        if (d < DIMS) row[d] = E(sums[i].x * scale);
        if (d + 1 < DIMS) row[d + 1] = E(sums[i].y * scale);
    }
}

[[max_total_threads_per_threadgroup(THREADS)]]
kernel void backward(
    device const T* q [[buffer(0)]],
    device const K_T* k [[buffer(1)]],
    device const V_T* v [[buffer(2)]],
    device const T* d_out [[buffer(3)]],
    device const float* lse [[buffer(4)]],
    device const float* delta [[buffer(5)]],
    device float4* d_q [[buffer(6)]],
    device K_T* d_k [[buffer(7)]],
    device V_T* d_v [[buffer(8)]],
    device const int* cu_seqlens_q [[buffer(9)]],
    device const int* cu_seqlens_k [[buffer(10)]],
    device const int* seqused_q [[buffer(11)]],
    device const int* seqused_k [[buffer(12)]],
    device const int* cache_batch_idx [[buffer(13)]],
    device const int* cache_leftpad [[buffer(14)]],
    device const float* alibi_slopes [[buffer(15)]],
    constant Params& params [[buffer(16)]],
    constant ScoreParams& score_params [[buffer(17)]],
    device const uint2* dropout_seed [[buffer(18)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint simdgroup_index [[simdgroup_index_in_threadgroup]],
    uint lane_index [[thread_index_in_simdgroup]]
) {
    threadgroup Packed<CHUNK> q_tile[QUERY_TILE * K_ROW];
    threadgroup Packed<CHUNK> d_out_tile[QUERY_TILE * V_ROW];
    threadgroup Packed<CHUNK> kv_tile[KEY_TILE * MAX_OF(K_ROW, V_ROW)];
    threadgroup Packed<CHUNK> d_score_tile[QUERY_TILE * SCORE_ROW / CHUNK];
    threadgroup ScoreRow score_rows[QUERY_TILE];
    threadgroup float2 lse_and_delta[QUERY_TILE];
#if DIM_SPLIT > 1
    threadgroup float2 score_parts[SIMDGROUPS * QUERY_BLOCKS * 2 * 32];
#endif
    threadgroup const T* q_rows = reinterpret_cast<threadgroup const T*>(q_tile);
    threadgroup const T* d_out_rows = reinterpret_cast<threadgroup const T*>(d_out_tile);
    threadgroup const T* kv_rows = reinterpret_cast<threadgroup const T*>(kv_tile);
    threadgroup T* d_scores = reinterpret_cast<threadgroup T*>(d_score_tile);

    const int lane = int(lane_index), simdgroup = int(simdgroup_index), thread_index = simdgroup * 32 + lane;
    const int slot = matrix_row(lane), column = matrix_column(lane);
    const int part = simdgroup % DIM_SPLIT, key_group = simdgroup / DIM_SPLIT;
    const int split = int(group.x), num_splits = int(params.num_splits), b = int(group.z);
    const int kv_head = int(group.y) / PARTS, first_head = int(group.y) * HEADS, num_heads = int(params.num_heads);
    Sequence s = sequence_at(b, params, cu_seqlens_q, seqused_q);
    find_keys(
        s, b, params, score_params, cu_seqlens_k, load_length(b, params, seqused_k, lane), cache_batch_idx, cache_leftpad
    );

    const uint2 seed = load_seed(dropout_seed);
    const float scale_of_kept = DROPOUT ? score_params.dropout_scale : 1.0f;

    const int shift = position_of(s, 0);
    const KVRange used = {max(0, s.leftpad - s.window_right - shift) * HEADS, s.seqlen_q * HEADS};  // rows that see a key

    // ---- Where everything lies
    TileRows<K_T> keys_at = {
        k + s.cache_row * params.k_batch_stride + kv_head * params.k_head_stride, params.k_token_stride, 0, 1
    };
    TileRows<V_T> values_at = {
        v + s.cache_row * params.v_batch_stride + kv_head * params.v_head_stride, params.v_token_stride, 0, 1
    };
    TileRows<T> queries_at = {
        q + first_head * params.q_head_stride
            + (params.has_cu_seqlens_q ? s.first_row * params.q_token_stride : b * params.q_batch_stride),
        params.q_token_stride, params.q_head_stride, HEADS
    };
    const long first_out_row = long(s.first_row) * num_heads + first_head;
    TileRows<T> d_out_at = {d_out + first_out_row * V_HEAD_DIM, num_heads * V_HEAD_DIM, V_HEAD_DIM, HEADS};
    const long rows_of_split = params.num_tokens_q * (params.has_cu_seqlens_q ? 1 : params.batch_size) * num_heads;
    device float4* split_d_q = d_q + (split * rows_of_split + first_out_row) * (D_Q_ROW / 4);
    const long first_key_row = params.has_cu_seqlens_k ? s.cache_row : s.cache_row * params.capacity;

    for (int first_key = split * KEY_TILE; first_key < s.seqlen_k; first_key += num_splits * KEY_TILE) {
        // ---- This simdgroup's 8 keys and values
        KVRange keys = {max(first_key, s.leftpad), min(first_key + KEY_TILE, s.seqlen_k)};
        if (keys.begin >= keys.end) continue;
        Pair key[K_MATRICES], value[V_MATRICES];
        const int row_of_key = key_group * 8 + slot;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        load_rows<V_ROW, V_HEAD_DIM>(kv_tile, values_at, first_key, KEY_TILE, keys, thread_index);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        take_row<V_MATRICES, V_CHUNKS, V_TAIL>(value, kv_rows + row_of_key * V_ROW * CHUNK + part * V_MATRICES * 8, column);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        load_rows<K_ROW, HEAD_DIM>(kv_tile, keys_at, first_key, KEY_TILE, keys, thread_index);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        take_row<K_MATRICES, K_CHUNKS, K_TAIL>(key, kv_rows + row_of_key * K_ROW * CHUNK + part * K_MATRICES * 8, column);

        float2 d_key[K_MATRICES], d_value[V_MATRICES];
        UNROLL
        for (int i = 0; i < K_MATRICES; i++) d_key[i] = float2(0.0f);
        UNROLL
        for (int i = 0; i < V_MATRICES; i++) d_value[i] = float2(0.0f);

        // ---- The rows that see any of the keys
        const int first_query = max(0, keys.begin - s.window_right - shift);
        const int last_query = min(s.seqlen_q - 1, keys.end - 1 + s.window_left - shift);
        const int rows_end = first_query <= last_query ? (last_query + 1) * HEADS : 0;
        for (int first_row = first_query * HEADS / QUERY_TILE * QUERY_TILE; first_row < rows_end; first_row += QUERY_TILE) {
            threadgroup_barrier(mem_flags::mem_threadgroup);
            if (thread_index < QUERY_TILE) {
                const int row = first_row + thread_index, query = row / HEADS, head = first_head + row % HEADS;
                ScoreRow score = score_row(s, query, alibi_slope(alibi_slopes, params, b, head));
                float2 x = float2(0.0f);
                if (contains(used, row)) {
                    const long at = lse_index(params, s.first_row + query, head);
                    x = float2(lse[at] * LOG2_E, delta[at]);
                }
                score_rows[thread_index] = score;
                lse_and_delta[thread_index] = x;
            }
            load_rows<K_ROW, HEAD_DIM>(q_tile, queries_at, first_row, QUERY_TILE, used, thread_index);
            load_rows<V_ROW, V_HEAD_DIM>(d_out_tile, d_out_at, first_row, QUERY_TILE, used, thread_index);
            threadgroup_barrier(mem_flags::mem_threadgroup);

            // S^T = K Q^T, dP^T = V dO^T
            float2 p[QUERY_BLOCKS], d_p[QUERY_BLOCKS];
            multiply_rows<QUERY_BLOCKS, CHUNK, K_CHUNKS, K_TAIL>(p, key, q_rows + part * K_MATRICES * 8, K_ROW * CHUNK, lane);
            multiply_rows<QUERY_BLOCKS, CHUNK, V_CHUNKS, V_TAIL>(
                d_p, value, d_out_rows + part * V_MATRICES * 8, V_ROW * CHUNK, lane
            );
#if DIM_SPLIT > 1
            UNROLL
            for (int j = 0; j < QUERY_BLOCKS; j++) {
                score_parts[((simdgroup * QUERY_BLOCKS + j) * 2) * 32 + lane] = p[j];
                score_parts[((simdgroup * QUERY_BLOCKS + j) * 2 + 1) * 32 + lane] = d_p[j];
            }
            threadgroup_barrier(mem_flags::mem_threadgroup);
            UNROLL
            for (int j = 0; j < QUERY_BLOCKS; j++) {
                p[j] = d_p[j] = float2(0.0f);
                UNROLL
                for (int other = 0; other < DIM_SPLIT; other++) {
                    const int at = ((key_group * DIM_SPLIT + other) * QUERY_BLOCKS + j) * 2 * 32 + lane;
                    p[j] += score_parts[at];
                    d_p[j] += score_parts[at + 32];
                }
            }
#endif

            // To P and dS.
            const Dropout dropout = {seed, b, first_row, first_head, HEADS};
            const uint kept = kept_of_key<QUERY_BLOCKS>(dropout, first_key + row_of_key, score_params, lane);
            UNROLL
            for (int j = 0; j < QUERY_BLOCKS; j++) {
                UNROLL
                for (int e = 0; e < 2; e++) {
                    const int row = j * 8 + column + e;
                    const ScoreRow score = score_rows[row];
                    const float capped = capped_score(p[j][e], score_params);
                    const float weight = contains(score.range, first_key + row_of_key)
                        ? fast::exp2(distant_score(capped, first_key + row_of_key, score) - lse_and_delta[row].x)
                        : 0.0f;
                    p[j][e] = is_kept(kept, 2 * j + e) ? weight : 0.0f;
                    const float d_weight = is_kept(kept, 2 * j + e) ? d_p[j][e] * scale_of_kept : 0.0f;
                    d_p[j][e] = weight * (d_weight - lse_and_delta[row].y) * cap_slope(capped, score_params);
                    if (part == 0) d_scores[row * SCORE_ROW + row_of_key] = T(d_p[j][e]);
                }
            }

            // dV += P^T dO, dK += dS^T Q
            add_products<QUERY_BLOCKS, V_MATRICES>(
                d_value, p, d_out_rows + part * V_MATRICES * 8, V_ROW * CHUNK, slot, column
            );
            add_products<QUERY_BLOCKS, K_MATRICES>(d_key, d_p, q_rows + part * K_MATRICES * 8, K_ROW * CHUNK, slot, column);
            threadgroup_barrier(mem_flags::mem_threadgroup);

            // dQ += dS K: a simdgroup has 8 rows, and every so many 16 dims: a lane's 4 neighbours are 2 of each of two matrices
            const int row = simdgroup % QUERY_BLOCKS * 8 + slot;
            const int query = (first_row + row) / HEADS, head = (first_row + row) % HEADS;
            device float4* d_q_row = split_d_q + (long(query) * num_heads + head) * (D_Q_ROW / 4);
            for (int first = simdgroup / QUERY_BLOCKS * 16; first < D_Q_ROW; first += SIMDGROUPS / QUERY_BLOCKS * 16) {
                const int d = first + 2 * column;
                const float4 before = query < s.seqlen_q ? d_q_row[d / 4] : float4(0.0f);
                float2 sums[2] = {before.xy, before.zw};
                UNROLL
                for (int j = 0; j < KEY_TILE / 8; j++) {
                    threadgroup const T* d_score = d_scores + row * SCORE_ROW + j * 8 + column;
                    threadgroup const T* of_key = kv_rows + (j * 8 + slot) * K_ROW * CHUNK + d;
                    UNROLL
                    for (int e = 0; e < 2; e++) {
                        multiply_add(
                            sums[e], *reinterpret_cast<threadgroup const Pair*>(d_score),
                            d < K_DIMS ? *reinterpret_cast<threadgroup const Pair*>(of_key + 2 * e) : Pair(0)
                        );
                    }
                }
                if (query < s.seqlen_q) d_q_row[d / 4] = float4(sums[0], sums[1]);
            }
        }

        // ---- Write
        if (contains(keys, first_key + row_of_key)) {
            const long row = (first_key_row + first_key + row_of_key) * (params.num_heads / HEADS) + group.y;
            store_row<K_MATRICES, HEAD_DIM>(
                d_k + row * HEAD_DIM, d_key, natural_scale(score_params), part * K_MATRICES * 8 + column
            );
            store_row<V_MATRICES, V_HEAD_DIM>(d_v + row * V_HEAD_DIM, d_value, scale_of_kept, part * V_MATRICES * 8 + column);
        }
    }
}
