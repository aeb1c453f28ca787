// decode: few queries a sequence against many keys. Split-KV online softmax over pages, with packed GQA: all queries and
// all query heads that share a KV head are the ROWS of one threadgroup, so every element of the cache is loaded once.
//
// A threadgroup has one sequence, one KV head, one split of the keys. Its simdgroups take tiles of 32 keys in turn.
// Within a tile lane l owns key l: it looks up its page and ends up with its score and weight. The elements of K are
// spread differently, so that each load reads whole lines: K_LANES lanes side by side hold one key, CHUNK elements each,
// and step s of K_LANES steps covers one key in each group of K_LANES lanes (here K_LANES = 16, as for D = 128, CHUNK = 8):
//
//              lanes 0 .. 15                            lanes 16 .. 31
//   step  0    key  0: [0..7] [8..15] ... [120..127]    key 16: [0..7] [8..15] ... [120..127]
//   step  1    key  1: [0..7] [8..15] ... [120..127]    key 17: ...
//     ...
//   step 15    key 15: ...                              key 31: ...
//
// Each lane multiplies its part of a key with its part of the query; a transposed sum over the K_LANES lanes then leaves
// in lane l the score of key l (K_LANES - 1 shuffles for 32 scores). V is read in the same shape with V_LANES; there a
// key's weight comes from the lane that owns it (one shuffle a step), and each lane accumulates CHUNK columns of the output.
//
// Defined by the launcher: HEAD_DIM, V_HEAD_DIM, GROUP (query heads a KV head), ROWS, SIMDGROUPS, PAGE_SIZE, PAGED;
// K_LANES and K_CHUNKS (chunks a lane holds of one key), V_LANES and V_CHUNKS; K_STEPS, V_STEPS (steps loaded at once),
// KEY_BLOCK (steps multiplied at once), REDUCE_ROWS (rows reduced at once); K_RUN, V_RUN (steps in one page for sure).

#define K_DIMS (K_CHUNKS * CHUNK)                  // elements of a key that a lane holds
#define V_DIMS (V_CHUNKS * CHUNK)
#define QUERY_FLOATS (K_LANES * K_DIMS)            // a query, padded to what the lanes hold
#define REDUCE_FLOATS (SIMDGROUPS * REDUCE_ROWS * V_HEAD_DIM)
#define QUADS_OF(floats) (((floats) + 3) / 4)
#define MAX_OF(a, b) ((a) > (b) ? (a) : (b))
#define SLICE (CHUNK < 4 ? CHUNK : 4)              // elements of a query that a lane reads at once

// Sums of N values over N lanes, lanes that differ in bits of (N - 1) * SPACING: lane l gets the sum of value
// (l / SPACING) % N. Half of the values are exchanged, then half of those that are left, ...: N - 1 shuffles.
template <int N, int SPACING>
struct TransposedSum {
    static float of(thread const float* values, uint lane) {
        const bool upper = (lane & (N / 2 * SPACING)) != 0;
        float half_of_them[N / 2];
        UNROLL
        for (int i = 0; i < N / 2; i++) {
            const float first = values[i], second = values[i + N / 2];  // loaded before the choice: arrays stay registers
            const float kept = upper ? second : first, sent = upper ? first : second;
            half_of_them[i] = kept + simd_shuffle_xor(sent, ushort(N / 2 * SPACING));
        }
        return TransposedSum<N / 2, SPACING>::of(half_of_them, lane);
    }
};

template <int SPACING>
struct TransposedSum<1, SPACING> {
    static float of(thread const float* values, uint lane) { return values[0]; }
};

// One tile of 32 keys, and which keys may be read.
struct Tile {
    int first_key;
    int page;  // of the key this lane owns
    KVRange range;
};

// Steps `first_step` to `first_step + STEPS` of a tile of K or V, as this lane holds them. With CHECKED, 0 for keys
// outside the range.
template <bool CHECKED, int STEPS, int LANES, int CHUNKS, int RUN, int DIMS>
inline void load_steps_of(
    thread Packed* chunks, int first_step, device const T* pages, Tile tile, long page_stride, int token_stride, int lane
) {
    const int group_lane = lane & ~(LANES - 1);  // the first lane of this lane's group, which owns the key of step 0
    const int column = (lane - group_lane) * CHUNK;
    device const T* row = pages;
    UNROLL
    for (int i = 0; i < STEPS; i++) {
        const int step = first_step + i;
        const int key = tile.first_key + group_lane + step;
        if (step % RUN == 0 || i == 0) {
            const int page = RUN == LANES ? tile.page : simd_shuffle(tile.page, ushort(group_lane + step));
            row = token_at(pages, page, key, page_stride, token_stride) + column;
        } else {
            row += token_stride;
        }
        UNROLL
        for (int c = 0; c < CHUNKS; c++) {
            const int offset = c * LANES * CHUNK;
            const bool inside = offset + LANES * CHUNK <= DIMS || column + offset < DIMS;
            chunks[i * CHUNKS + c] = inside && (!CHECKED || contains(tile.range, key)) ? load_chunk(row + offset) : Packed(0);
        }
    }
}

// The same. Most tiles lie inside the range, and then nothing stands between their loads.
template <int STEPS, int LANES, int CHUNKS, int RUN, int DIMS>
inline void load_steps(
    thread Packed* chunks, int step, device const T* pages, Tile tile, long page_stride, int token_stride, int lane
) {
    if (tile.first_key >= tile.range.begin && tile.first_key + 32 <= tile.range.end) {
        load_steps_of<false, STEPS, LANES, CHUNKS, RUN, DIMS>(chunks, step, pages, tile, page_stride, token_stride, lane);
    } else {
        load_steps_of<true, STEPS, LANES, CHUNKS, RUN, DIMS>(chunks, step, pages, tile, page_stride, token_stride, lane);
    }
}

// One lane of each PAGE_RUN keys of a tile looks up their page; the others take it from that lane.
#define PAGE_RUN MAX_OF(K_RUN, V_RUN)

inline int looked_up_page(device const int* pages_of_sequence, int tile_index, int lane, int begin, int end) {
    return lane % PAGE_RUN == 0 ? page_of(pages_of_sequence, clamp(tile_index * 32 + lane, begin, end - 1)) : 0;
}

inline int shared_page(int page, int lane) {
    return PAGE_RUN == 1 ? page : simd_shuffle(page, ushort(lane & ~(PAGE_RUN - 1)));
}

// Where the slice of a query that begins at element d lies: slices that neighbouring lanes read lie side by side.
inline int slice_index(int d) {
    const int chunk = d / CHUNK;
    const int slice = (chunk / K_LANES) * (CHUNK / SLICE) + d % CHUNK / SLICE;
    return (slice * K_LANES + chunk % K_LANES) * SLICE;
}

[[max_total_threads_per_threadgroup(THREADS)]]
kernel void decode(
    device const T* q [[buffer(0)]],
    device T* k [[buffer(1)]],
    device T* v [[buffer(2)]],
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
    uint3 group [[threadgroup_position_in_grid]],
    uint simdgroup_index [[simdgroup_index_in_threadgroup]],
    uint lane_index [[thread_index_in_simdgroup]]
) {
    threadgroup float4 scratch_quads[QUADS_OF(MAX_OF(ROWS * QUERY_FLOATS, REDUCE_FLOATS))];
    threadgroup float row_slope[ROWS];
    threadgroup float row_maximum[SIMDGROUPS * ROWS];
    threadgroup float row_sum[SIMDGROUPS * ROWS];
    threadgroup float* scratch = reinterpret_cast<threadgroup float*>(scratch_quads);

    const int lane = int(lane_index);
    const int simdgroup = simd_shuffle(int(simdgroup_index), ushort(0));  // so that compilers see it is one for all lanes
    const int thread_index = simdgroup * 32 + lane;
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
    if (first_row >= s.rows * GROUP) return;

    // ---- Which keys: those any row sees, plus the new ones, which must be written; of them the tiles of this split
    const KVRange range = kv_range(s, first_row / GROUP, (first_row + ROWS - 1) / GROUP);
    const int append_begin = params.appends ? s.append_begin : s.seqlen_k;
    const int begin = min(range.begin, append_begin);
    const int end = append_begin < s.seqlen_k ? s.seqlen_k : range.end;
    const int first_tile = begin / 32;
    const int tiles = end > begin ? (end + 31) / 32 - first_tile : 0;
    const int tiles_per_split = (tiles + num_splits - 1) / num_splits;
    const int tiles_begin = first_tile + split * tiles_per_split;
    const int tiles_end = min(tiles_begin + tiles_per_split, first_tile + tiles);

    device T* k_pages = k + s.cache_row * params.k_batch_stride + kv_head * params.k_head_stride;
    device T* v_pages = v + s.cache_row * params.v_batch_stride + kv_head * params.v_head_stride;
    device const int* pages_of_sequence = block_table + long(b) * params.max_pages;
    const long k_page_stride = params.k_page_stride, v_page_stride = params.v_page_stride;
    const int k_token_stride = int(params.k_token_stride), v_token_stride = int(params.v_token_stride);

    const int my_first_tile = tiles_begin + simdgroup;  // its pages are looked up while the queries are loaded
    int page = my_first_tile < tiles_end ? looked_up_page(pages_of_sequence, my_first_tile, lane, begin, end) : 0;

    // ---- The queries, rotated, into threadgroup memory
    device const T* queries = q + first_head * params.q_head_stride
        + (params.has_cu_seqlens_q ? s.first_row * params.q_token_stride : b * params.q_batch_stride);
    for (int i = thread_index; i < ROWS * QUERY_FLOATS; i += THREADS) {
        const int r = i / QUERY_FLOATS, d = i % QUERY_FLOATS;
        const int query = (first_row + r) / GROUP, head = (first_row + r) % GROUP;
        float x = 0.0f;
        if (query < s.seqlen_q && d < HEAD_DIM) {
            device const T* row = queries + query * params.q_token_stride + head * params.q_head_stride;
            x = float(
                params.rotary_half
                    ? rotated(row, d, rotary_position(s, params, query), rotary_cos, rotary_sin, params)
                    : row[d]
            );
        }
        scratch[r * QUERY_FLOATS + slice_index(d) + d % SLICE] = x;
    }
    for (int r = thread_index; r < ROWS; r += THREADS) {
        row_slope[r] = alibi_slope(alibi_slopes, params, b, first_head + (first_row + r) % GROUP);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    float maximum[ROWS], sum[ROWS];  // of each row: over all keys so far; over the keys this lane owned
    float output[ROWS][V_DIMS];
    UNROLL
    for (int r = 0; r < ROWS; r++) {
        maximum[r] = LOWEST;
        sum[r] = 0.0f;
        UNROLL
        for (int d = 0; d < V_DIMS; d++) output[r][d] = 0.0f;
    }

    // ---- The tiles
    for (int t = my_first_tile; t < tiles_end; t += SIMDGROUPS) {
        Tile tile;
        tile.first_key = t * 32;
        tile.page = shared_page(page, lane);
        tile.range = range;
        const int key = tile.first_key + lane;
        if (t + SIMDGROUPS < tiles_end) {  // looked up while this tile is worked on
            page = looked_up_page(pages_of_sequence, t + SIMDGROUPS, lane, begin, end);
        }

        // New keys of this tile go to the cache first; then they are keys like all others.
        if (tile.first_key + 32 > append_begin && append_begin < s.seqlen_k) {
            for (int slot = max(append_begin, tile.first_key); slot < min(s.seqlen_k, tile.first_key + 32); slot++) {
                const int token = slot - s.append_begin;
                const int slot_page = simd_shuffle(tile.page, ushort(slot - tile.first_key));
                append_token(
                    slot_at(k_pages, slot_page, slot, params.k_page_stride, params.k_token_stride),
                    slot_at(v_pages, slot_page, slot, params.v_page_stride, params.v_token_stride),
                    k_new + b * params.k_new_batch_stride + token * params.k_new_token_stride
                        + kv_head * params.k_new_head_stride,
                    v_new + b * params.v_new_batch_stride + token * params.v_new_token_stride
                        + kv_head * params.v_new_head_stride,
                    slot, rotary_cos, rotary_sin, params, lane
                );
            }
            simdgroup_barrier(mem_flags::mem_device);
        }

        // Q K^T: products of a few keys at a time with all rows, summed over lanes.
        float partial[ROWS][K_LANES / KEY_BLOCK];
        UNROLL
        for (int step = 0; step < K_LANES; step += K_STEPS) {
            Packed chunks[K_STEPS * K_CHUNKS];
            load_steps<K_STEPS, K_LANES, K_CHUNKS, K_RUN, HEAD_DIM>(
                chunks, step, k_pages, tile, k_page_stride, k_token_stride, lane
            );
            UNROLL
            for (int block = 0; block < K_STEPS; block += KEY_BLOCK) {
                float keys[KEY_BLOCK][K_DIMS];
                UNROLL
                for (int i = 0; i < KEY_BLOCK * K_CHUNKS; i++) {
                    unpack(chunks[block * K_CHUNKS + i], &keys[i / K_CHUNKS][i % K_CHUNKS * CHUNK]);
                }
                simdgroup_barrier(mem_flags::mem_threadgroup);  // queries are read anew, not kept in registers
                UNROLL
                for (int r = 0; r < ROWS; r++) {
                    float dots[KEY_BLOCK];
                    UNROLL
                    for (int i = 0; i < KEY_BLOCK; i++) dots[i] = 0.0f;
                    UNROLL
                    for (int d = 0; d < K_DIMS; d += SLICE) {
                        const int slice = (d / SLICE * K_LANES + (lane & (K_LANES - 1))) * SLICE;
                        const vec<float, SLICE> query =
                            *reinterpret_cast<threadgroup const vec<float, SLICE>*>(scratch + r * QUERY_FLOATS + slice);
                        UNROLL
                        for (int i = 0; i < KEY_BLOCK; i++) {
                            UNROLL
                            for (int e = 0; e < SLICE; e++) dots[i] += query[e] * keys[i][d + e];
                        }
                    }
                    partial[r][(step + block) / KEY_BLOCK] = TransposedSum<KEY_BLOCK, 1>::of(dots, lane_index);
                }
            }
        }

        // The first values are loaded while the softmax is computed.
        Packed values[V_STEPS * V_CHUNKS];
        load_steps<V_STEPS, V_LANES, V_CHUNKS, V_RUN, V_HEAD_DIM>(
            values, 0, v_pages, tile, v_page_stride, v_token_stride, lane
        );

        // Online softmax: once a tile, one key a lane.
        float weight[ROWS];
        UNROLL
        for (int r = 0; r < ROWS; r++) {
            const float qk = TransposedSum<K_LANES / KEY_BLOCK, KEY_BLOCK>::of(partial[r], lane_index);
            const ScoreRow row = score_row(s, (first_row + r) / GROUP, row_slope[r]);
            const float score = masked_score(qk, key, row, score_params);
            const float new_maximum = max(maximum[r], simd_max(score));
            const float alpha = fast::exp2(maximum[r] - new_maximum);
            weight[r] = weight_of(score, new_maximum);
            maximum[r] = new_maximum;
            sum[r] = sum[r] * alpha + weight[r];
            UNROLL
            for (int d = 0; d < V_DIMS; d++) output[r][d] *= alpha;
        }

        // P V: weights times values.
        UNROLL
        for (int step = 0; step < V_LANES; step += V_STEPS) {
            if (tile.first_key + step >= range.end) break;
            if (step > 0) {
                load_steps<V_STEPS, V_LANES, V_CHUNKS, V_RUN, V_HEAD_DIM>(
                    values, step, v_pages, tile, v_page_stride, v_token_stride, lane
                );
            }
            UNROLL
            for (int i = 0; i < V_STEPS; i++) {
                float value[V_DIMS];
                UNROLL
                for (int c = 0; c < V_CHUNKS; c++) unpack(values[i * V_CHUNKS + c], &value[c * CHUNK]);
                const ushort owner = ushort((lane & ~(V_LANES - 1)) + step + i);
                UNROLL
                for (int r = 0; r < ROWS; r++) {
                    const float w = simd_shuffle(weight[r], owner);
                    UNROLL
                    for (int d = 0; d < V_DIMS; d++) output[r][d] += w * value[d];
                }
            }
        }
    }

    // ---- Reduce: the lane groups of a simdgroup, then the simdgroups
    UNROLL
    for (int r = 0; r < ROWS; r++) {
        UNROLL
        for (int other = V_LANES; other < 32; other *= 2) {
            UNROLL
            for (int d = 0; d < V_DIMS; d++) output[r][d] += simd_shuffle_xor(output[r][d], ushort(other));
        }
        sum[r] = simd_sum(sum[r]);
        if (lane == 0) {
            row_maximum[simdgroup * ROWS + r] = maximum[r];
            row_sum[simdgroup * ROWS + r] = sum[r];
        }
    }

    UNROLL
    for (int block = 0; block < ROWS; block += REDUCE_ROWS) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
        UNROLL
        for (int i = 0; i < REDUCE_ROWS; i++) {
            const int r = block + i;
            if (r < ROWS && lane < V_LANES) {
                float top = LOWEST;
                for (int other = 0; other < SIMDGROUPS; other++) top = max(top, row_maximum[other * ROWS + r]);
                const float alpha = exp2(maximum[r] - top);
                UNROLL
                for (int c = 0; c < V_CHUNKS; c++) {
                    const int column = (c * V_LANES + lane) * CHUNK;
                    if (column < V_HEAD_DIM) {
                        UNROLL
                        for (int e = 0; e < CHUNK; e++) {
                            scratch[(simdgroup * REDUCE_ROWS + i) * V_HEAD_DIM + column + e] = output[r][c * CHUNK + e] * alpha;
                        }
                    }
                }
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);

        // ---- Write: the output, or the partial output of this split
        for (int i = thread_index; i < REDUCE_ROWS * V_HEAD_DIM; i += THREADS) {
            const int r = block + i / V_HEAD_DIM, d = i % V_HEAD_DIM;
            const int query = (first_row + r) / GROUP, head = first_head + (first_row + r) % GROUP;
            if (r >= ROWS || query >= s.rows) break;

            float top = LOWEST, total = 0.0f, x = 0.0f;
            for (int other = 0; other < SIMDGROUPS; other++) top = max(top, row_maximum[other * ROWS + r]);
            for (int other = 0; other < SIMDGROUPS; other++) {
                total += row_sum[other * ROWS + r] * exp2(row_maximum[other * ROWS + r] - top);
                x += scratch[other * REDUCE_ROWS * V_HEAD_DIM + i];
            }
            const int row = s.first_row + query;
            const long out_row = long(row) * params.num_heads + head;
            if (num_splits > 1) {
                const long partial = out_row * num_splits + split;
                if (d < 2) softmax_partial[partial * 2 + d] = d == 0 ? top : total;
                if (total > 0.0f) out_partial[partial * V_HEAD_DIM + d] = x;
            } else {
                const Normaliser n = normaliser_of(top, total, params.has_sinks, params.has_sinks ? sinks[head] : 0.0f);
                out[out_row * V_HEAD_DIM + d] = T(x * n.factor);
                if (d == 0) lse[lse_index(params, row, head)] = n.lse;
            }
        }
    }
}
