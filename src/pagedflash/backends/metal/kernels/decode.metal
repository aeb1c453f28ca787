// decode: few queries a sequence against many keys. Split-KV online softmax over pages, with packed GQA: all queries and
// all query heads that share a KV head are rows of one threadgroup, so every element of the cache is loaded once.
//
// A threadgroup has one sequence, one KV head, one split of the keys. Its simdgroups take tiles of keys in turn and
// multiply them with all ROWS rows, in one of two ways that have the same names: decode_lanes.metal, or decode_matrix.metal with
// MATRICES. At the end the simdgroups reduce what they have.
//
// A tile may have fewer keys, 2^tile_bits of them, so that all simdgroups have some; params say how many.
//
// What comes first takes as long as memory does, several times over where each address is the answer of a load before it. So the
// first page is looked up, and the queries are loaded, while the length is on its way; and the first keys while the queries are.
//
// Defined by the launcher: HEAD_DIM, V_HEAD_DIM, GROUP (query heads a KV head), PAGED, PAGE_SIZE, SIMDGROUPS (at most); ROWS;
// REDUCE_ROWS (rows that so many simdgroups reduce at once).

#define QUERY_BYTES (ROWS * QUERY_DIMS * int(sizeof(QueryElement)))
#define REDUCE_BYTES (SIMDGROUPS * REDUCE_ROWS * V_HEAD_DIM * 4)
#define QUERY_WIDTH MIN_OF(CHUNK, 16 / T_BYTES)  // elements of a query in one load

// The rows of a threadgroup from `first_row` on, into threadgroup memory; 0 where there is no query.
template <bool ROTATED>
inline void share_queries(
    threadgroup QueryElement* queries, device const T* q_rows, int first_row, Sequence s, device const T* rotary_cos,
    device const T* rotary_sin, constant Params& params, int thread_index, int threads
) {
    const int width = ROTATED ? 1 : QUERY_WIDTH;
    for (int i = thread_index * width; i < ROWS * QUERY_DIMS; i += threads * width) {
        const int r = i / QUERY_DIMS, d = i % QUERY_DIMS;
        const int query = (first_row + r) / GROUP, head = (first_row + r) % GROUP;
        Packed<width> elements = Packed<width>(0);
        if (query < s.seqlen_q && d < HEAD_DIM) {
            device const T* row = q_rows + query * params.q_token_stride + head * params.q_head_stride;
            if (ROTATED) {
                const T x = rotated(row, d, rotary_position(s, params, query), rotary_cos, rotary_sin, params);
                elements = Packed<width>(bits_of(x));
            } else {
                elements = load<width, HEAD_DIM>(row, d);
            }
        }
        UNROLL
        for (int e = 0; e < width; e++) queries[query_index(r, d + e)] = QueryElement(of_bits<T>(element_bits<T>(elements, e)));
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
    device const uint2* dropout_seed [[buffer(24)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint simdgroup_index [[simdgroup_index_in_threadgroup]],
    uint simdgroup_count [[simdgroups_per_threadgroup]],
    uint lane_index [[thread_index_in_simdgroup]]
) {
    threadgroup float4 shared_quads[(MAX_OF(QUERY_BYTES, REDUCE_BYTES) + 15) / 16];
    threadgroup ScoreRow score_rows[ROWS];
    threadgroup float row_maximum[SIMDGROUPS * ROWS];  // of each simdgroup
    threadgroup float row_total[SIMDGROUPS * ROWS];
    threadgroup float row_top[ROWS];  // the largest of the maxima
    threadgroup QueryElement* queries = reinterpret_cast<threadgroup QueryElement*>(shared_quads);
    threadgroup float* outputs = reinterpret_cast<threadgroup float*>(shared_quads);

    const int lane = int(lane_index);
    const int simdgroup = simd_shuffle(int(simdgroup_index), ushort(0));  // so that compilers see it is one for all lanes
    const int simdgroups = int(simdgroup_count), threads = simdgroups * 32;
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
        for (int row = max(cu_seqlens_q[b], 0); row < int(params.num_tokens_q); row++) {
            for (int head = first_head; head < first_head + GROUP; head++) {
                if (num_splits == 1) {
                    write_empty_row(out, lse, params, row, head, thread_index, threads);
                } else if (thread_index < 2) {  // combine clears the row
                    const long partial = (long(row) * params.num_heads + head) * num_splits + split;
                    softmax_partial[partial * 2 + thread_index] = thread_index == 0 ? LOWEST : 0.0f;
                }
            }
        }
        return;
    }
    Sequence s = sequence_at(b, params, cu_seqlens_q, seqused_q);
    const int rows = min(ROWS, s.rows * GROUP - first_row);
    if (rows <= 0 || !is_decoded(s.rows, params)) return;

    // ---- While the length is loaded: the first page, if keys are not split, and the queries, if they are not rotated
    const int length = load_length(b, params, seqused_k, lane);
    device const int* pages = block_table + long(b) * params.max_pages;
    const int num_pages = int(params.num_pages), tile_bits = tile_bits_of(params);
    int page = 0;
    if (num_splits == 1 && params.capacity > 0) {
        page = looked_up_page(pages, num_pages, simdgroup, simdgroups, {0, int(params.capacity)}, tile_bits, lane);
    }
    device const T* q_rows = q + first_head * params.q_head_stride
        + (params.has_cu_seqlens_q ? s.first_row * params.q_token_stride : b * params.q_batch_stride);
    if (!params.rotary_half) {
        share_queries<false>(queries, q_rows, first_row, s, rotary_cos, rotary_sin, params, thread_index, threads);
    }

    // ---- Which keys: those any row sees, plus the new ones, which must be written; of them the tiles of this split
    find_keys(s, b, params, score_params, cu_seqlens_k, length, cache_batch_idx, cache_leftpad);
    const KVRange range = kv_range(s, first_row / GROUP, (first_row + ROWS - 1) / GROUP);
    const int append_begin = params.appends ? s.append_begin : s.seqlen_k;
    const int begin = min(range.begin, append_begin);
    const int end = append_begin < s.seqlen_k ? s.seqlen_k : range.end;
    const int first_tile = begin >> tile_bits;
    const int tiles = end > begin ? ((end - 1) >> tile_bits) + 1 - first_tile : 0;
    const int tiles_per_split = (tiles + num_splits - 1) / num_splits;
    const int tiles_begin = first_tile + split * tiles_per_split;
    const int tiles_end = min(tiles_begin + tiles_per_split, first_tile + tiles);
    const HeadCache cache = head_cache(k, v, k_descale, v_descale, pages, params, b, s.cache_row, kv_head);

    // ---- New keys go to the cache first, by the simdgroup that will read them; then they are keys like all others
    if (append_begin < s.seqlen_k) {
        for (int key = max(append_begin, tiles_begin << tile_bits); key < min(s.seqlen_k, tiles_end << tile_bits); key++) {
            if (((key >> tile_bits) - tiles_begin) % simdgroups != simdgroup) continue;
            const int token = key - append_begin;
            const int page = table_entry(cache.pages, key);
            if (!is_page(page, cache.num_pages)) continue;
            append_token(
                slot_at(cache.k, page, key, cache.k_page_stride, cache.k_token_stride),
                slot_at(cache.v, page, key, cache.v_page_stride, cache.v_token_stride),
                cache.k_scales.at(page, key),
                cache.v_scales.at(page, key),
                k_new + b * params.k_new_batch_stride + token * params.k_new_token_stride + kv_head * params.k_new_head_stride,
                v_new + b * params.v_new_batch_stride + token * params.v_new_token_stride + kv_head * params.v_new_head_stride,
                key, rotary_cos, rotary_sin, params, lane
            );
        }
        simdgroup_barrier(mem_flags::mem_device);
    }

    const Dropout dropout = {load_seed(dropout_seed), b, first_row, first_head, GROUP};
    const int my_first_tile = tiles_begin + simdgroup, my_tiles_end = range.begin < range.end ? tiles_end : 0;

    // ---- The first keys, and after them what the rows need
    if ((num_splits > 1 || first_tile > 0) && my_first_tile < my_tiles_end) {
        page = looked_up_page(pages, num_pages, my_first_tile, simdgroups, range, tile_bits, lane);
    }
    Start start;
    load_first(start, cache, my_first_tile, my_tiles_end, range, page, tile_bits, lane);
    if (params.rotary_half) {
        share_queries<true>(queries, q_rows, first_row, s, rotary_cos, rotary_sin, params, thread_index, threads);
    }
    for (int r = thread_index; r < ROWS; r += threads) {
        const int query = (first_row + r) / GROUP, head = first_head + (first_row + r) % GROUP;
        score_rows[r] = score_row(s, query, alibi_slope(alibi_slopes, params, b, head));
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // ---- The tiles
    Accumulator accumulator;
    clear(accumulator);
    attend(
        accumulator, queries, score_rows, cache, start, my_first_tile, my_tiles_end, simdgroups, range, tile_bits, score_params,
        dropout, lane
    );

    // ---- Reduce the simdgroups, some rows at a time
    share_sums(accumulator, row_maximum + simdgroup * ROWS, row_total + simdgroup * ROWS, lane);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const int reduce_rows = simdgroups == SIMDGROUPS ? REDUCE_ROWS : SIMDGROUPS / simdgroups * REDUCE_ROWS;
    for (int block = 0; block < rows; block += reduce_rows) {
        if (block > 0) threadgroup_barrier(mem_flags::mem_threadgroup);
        threadgroup float* mine = outputs + simdgroup * reduce_rows * V_HEAD_DIM;
        share_output(accumulator, mine, block, reduce_rows, row_maximum, row_total, row_top, simdgroup, simdgroups, lane);
        threadgroup_barrier(mem_flags::mem_threadgroup);

        // ---- Write: the output, or the partial output of this split
        for (int i = thread_index; i < min(reduce_rows, rows - block) * V_HEAD_DIM; i += threads) {
            const int r = block + i / V_HEAD_DIM, d = i % V_HEAD_DIM;
            const int query = (first_row + r) / GROUP, head = first_head + (first_row + r) % GROUP;
            float x = 0.0f, total = 0.0f;
            UNROLL
            for (int other = 0; other < SIMDGROUPS; other++) {
                if (other >= simdgroups) continue;
                x += outputs[other * reduce_rows * V_HEAD_DIM + i];
                total += row_total[other * ROWS + r];
            }
            if (DROPOUT) x *= score_params.dropout_scale;
            const int row = s.first_row + query;
            const long out_row = long(row) * params.num_heads + head;
            if (num_splits > 1) {
                const long partial = (partial_row(params, b, query, row) * params.num_heads + head) * num_splits + split;
                if (d == 0) {
                    softmax_partial[partial * 2] = row_top[r];
                    softmax_partial[partial * 2 + 1] = total;
                }
                if (total > 0.0f) out_partial[partial * V_HEAD_DIM + d] = x;
            } else {
                const Normaliser n = normaliser_of(row_top[r], total, params.has_sinks, params.has_sinks ? sinks[head] : 0.0f);
                out[out_row * V_HEAD_DIM + d] = T(x * n.factor);
                if (d == 0) write_lse(lse, params, row, head, n.lse);
            }
        }
    }
}
