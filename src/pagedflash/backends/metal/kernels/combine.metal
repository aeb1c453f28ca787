// combine: the parts that decode's splits left, merged by their log-sum-exp. One threadgroup merges one row; its
// simdgroups take the parts in turn, with the lanes across the columns.
//
// Defined by the launcher: V_HEAD_DIM, SIMDGROUPS.

#define THREADS (SIMDGROUPS * 32)
#define COLUMNS ((V_HEAD_DIM + 31) / 32)  // columns a lane adds up
#define LOADS 4                           // parts whose loads a simdgroup issues together

[[max_total_threads_per_threadgroup(THREADS)]]
kernel void combine(
    device const float* partial_out [[buffer(0)]],
    device const float2* partial_sums [[buffer(1)]],
    device const float* sinks [[buffer(2)]],
    device T* out [[buffer(3)]],
    device float* lse [[buffer(4)]],
    constant Sizes& sizes [[buffer(5)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint simdgroup_index [[simdgroup_index_in_threadgroup]],
    uint lane_index [[thread_index_in_simdgroup]]
) {
    threadgroup float scratch[SIMDGROUPS * V_HEAD_DIM];

    const int lane = int(lane_index);
    const int simdgroup = int(simdgroup_index);
    const int splits = int(sizes.splits);
    const int head = int(group.x);
    const int row = int(group.y);
    const long out_row = long(row) * sizes.heads + head;
    device const float2* sums = partial_sums + out_row * splits;  // maximum and sum of each part
    device const float* parts = partial_out + out_row * splits * V_HEAD_DIM;

    // ---- Add up the parts: 32 at a time, one a lane; of them every simdgroup adds up its own ----------------------------
    float top = LOWEST, total = 0.0f;
    float output[COLUMNS];
    UNROLL
    for (int c = 0; c < COLUMNS; c++) output[c] = 0.0f;
    for (int first = 0; first < splits; first += 32) {
        const float2 of_part = first + lane < splits ? sums[first + lane] : float2(LOWEST, 0.0f);
        const float new_top = max(top, simd_max(of_part.x));
        const float shrink = exp2(top - new_top);
        const float weight = of_part.y > 0.0f ? exp2(of_part.x - new_top) : 0.0f;
        total = total * shrink + of_part.y * weight;
        top = new_top;
        UNROLL
        for (int c = 0; c < COLUMNS; c++) output[c] *= shrink;

        for (int i = simdgroup; i < min(32, splits - first); i += SIMDGROUPS * LOADS) {
            float weights[LOADS], columns[LOADS][COLUMNS];
            UNROLL
            for (int j = 0; j < LOADS; j++) {
                const int part = i + j * SIMDGROUPS;
                const float w = simd_shuffle(weight, ushort(part & 31));
                weights[j] = part < 32 ? w : 0.0f;
                UNROLL
                for (int c = 0; c < COLUMNS; c++) {
                    const int d = c * 32 + lane;
                    const bool written = weights[j] > 0.0f && d < V_HEAD_DIM;  // a part that saw no key wrote no output
                    columns[j][c] = written ? parts[(first + part) * V_HEAD_DIM + d] : 0.0f;
                }
            }
            UNROLL
            for (int j = 0; j < LOADS; j++) {
                UNROLL
                for (int c = 0; c < COLUMNS; c++) output[c] += weights[j] * columns[j][c];
            }
        }
    }
    total = simd_sum(total);
    UNROLL
    for (int c = 0; c < COLUMNS; c++) {
        if (c * 32 + lane < V_HEAD_DIM) scratch[simdgroup * V_HEAD_DIM + c * 32 + lane] = output[c];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // ---- Write ----------------------------------------------------------------------------------------------------------
    const Normaliser n = normaliser_of(top, total, sizes.has_sinks, sizes.has_sinks ? sinks[head] : 0.0f);
    for (int d = simdgroup * 32 + lane; d < V_HEAD_DIM; d += THREADS) {
        float x = 0.0f;
        for (int other = 0; other < SIMDGROUPS; other++) x += scratch[other * V_HEAD_DIM + d];
        out[out_row * V_HEAD_DIM + d] = T(x * n.factor);
        if (d == 0) lse[lse_index(sizes, row, head)] = n.lse;
    }
}
