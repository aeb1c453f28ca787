// combine: the partial outputs that decode's splits left, reduced by their log-sum-exp. One threadgroup reduces one row;
// its simdgroups take the splits in turn, with the lanes across the columns.
//
// Defined by the launcher: V_HEAD_DIM, SIMDGROUPS.

#define COLUMNS ((V_HEAD_DIM + 31) / 32)  // columns a lane accumulates
#define LOADS (COLUMNS > 8 ? 2 : COLUMNS > 4 ? 4 : 8)  // splits whose loads a simdgroup issues together
#define BLOCK (SIMDGROUPS * LOADS)                     // splits of all simdgroups, one a lane

[[max_total_threads_per_threadgroup(THREADS)]]
kernel void combine(
    device const float* out_partial [[buffer(0)]],
    device const float2* softmax_partial [[buffer(1)]],
    device const float* sinks [[buffer(2)]],
    device const int* cu_seqlens_q [[buffer(3)]],
    device T* out [[buffer(4)]],
    device float* lse [[buffer(5)]],
    constant Params& params [[buffer(6)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint simdgroup_index [[simdgroup_index_in_threadgroup]],
    uint lane_index [[thread_index_in_simdgroup]]
) {
    threadgroup float scratch[SIMDGROUPS * V_HEAD_DIM];
    threadgroup float2 of_splits[32];  // maximum and sum: loaded by one simdgroup

    const int lane = int(lane_index);
    const int simdgroup = int(simdgroup_index);
    const int num_splits = int(params.num_splits);
    const int head = int(group.x);
    int row = int(group.y);
    const long partial = (long(row) * params.num_heads + head) * num_splits;
    device const float2* max_and_sum = softmax_partial + partial;  // of each split
    device const float* partials = out_partial + partial * V_HEAD_DIM;
    if (params.decode_limit) {  // partial_row of a query that may be there
        const int b = row / int(params.decode_limit), query = row % int(params.decode_limit);
        const Rows rows = rows_of(b, params, cu_seqlens_q);
        if (query >= rows.count || !is_decoded(rows.count, params)) return;
        row = rows.first + query;
    }
    const long out_row = long(row) * params.num_heads + head;

    // ---- Accumulate: BLOCK splits at a time. Loads do not wait for weights; a split that saw no key wrote no output, and what is
    // there counts for nothing
    float maximum = LOWEST, sum = 0.0f;
    float output[COLUMNS];
    UNROLL
    for (int c = 0; c < COLUMNS; c++) output[c] = 0.0f;
    for (int first = 0; first < num_splits; first += BLOCK) {
        const int count = min(BLOCK, num_splits - first);
        float2 of_split = float2(LOWEST, 0.0f);
        if (simdgroup == 0 && lane < count) of_split = max_and_sum[first + lane];
        float columns[LOADS][COLUMNS];
        UNROLL
        for (int j = 0; j < LOADS; j++) {
            const int split = simdgroup + j * SIMDGROUPS;
            UNROLL
            for (int c = 0; c < COLUMNS; c++) {
                const int d = c * 32 + lane;
                columns[j][c] = split < count && d < V_HEAD_DIM ? partials[(first + split) * V_HEAD_DIM + d] : 0.0f;
            }
        }
        if (first > 0) threadgroup_barrier(mem_flags::mem_threadgroup);
        if (simdgroup == 0) of_splits[lane] = of_split;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        of_split = of_splits[lane];
        const float new_maximum = max(maximum, simd_max(of_split.x));
        const float alpha = exp2(maximum - new_maximum);
        const float weight = of_split.y > 0.0f ? exp2(of_split.x - new_maximum) : 0.0f;
        sum = sum * alpha + of_split.y * weight;
        maximum = new_maximum;
        UNROLL
        for (int c = 0; c < COLUMNS; c++) output[c] *= alpha;
        UNROLL
        for (int j = 0; j < LOADS; j++) {
            const float w = simd_shuffle(weight, ushort(simdgroup + j * SIMDGROUPS));
            UNROLL
            for (int c = 0; c < COLUMNS; c++) output[c] += w > 0.0f ? w * columns[j][c] : 0.0f;
        }
    }
    sum = simd_sum(sum);
    UNROLL
    for (int c = 0; c < COLUMNS; c++) {
        if (c * 32 + lane < V_HEAD_DIM) scratch[simdgroup * V_HEAD_DIM + c * 32 + lane] = output[c];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // ---- Write
    const Normaliser n = normaliser_of(maximum, sum, params.has_sinks, params.has_sinks ? sinks[head] : 0.0f);
    for (int d = simdgroup * 32 + lane; d < V_HEAD_DIM; d += THREADS) {
        float x = 0.0f;
        for (int other = 0; other < SIMDGROUPS; other++) x += scratch[other * V_HEAD_DIM + d];
        out[out_row * V_HEAD_DIM + d] = T(x * n.factor);
        if (d == 0) write_lse(lse, params, row, head, n.lse);
    }
}
