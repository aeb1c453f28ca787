// combine: the parts that decode's splits left, merged by their log-sum-exp. One threadgroup merges one row; its
// simdgroups take the parts in turn, with the lanes across the columns.
//
// Defined by the launcher: V_HEAD_DIM, SIMDGROUPS.

#define THREADS (SIMDGROUPS * 32)
#define COLUMNS ((V_HEAD_DIM + 31) / 32)  // columns a lane adds up

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

    // ---- Maximum and sum over all parts, in every simdgroup -------------------------------------------------------------
    float top = LOWEST, total = 0.0f;
    for (int part = lane; part < splits; part += 32) top = max(top, sums[part].x);
    top = simd_max(top);

    // ---- Add up the parts -----------------------------------------------------------------------------------------------
    float output[COLUMNS];
    UNROLL
    for (int c = 0; c < COLUMNS; c++) output[c] = 0.0f;
    for (int first = 0; first < splits; first += 32) {
        const float2 of_part = first + lane < splits ? sums[first + lane] : float2(LOWEST, 0.0f);  // one part a lane
        const float weight = of_part.y > 0.0f ? exp2(of_part.x - top) : 0.0f;
        total += of_part.y * weight;
        for (int i = simdgroup; i < min(32, splits - first); i += SIMDGROUPS) {
            const float w = simd_shuffle(weight, ushort(i));
            if (w == 0.0f) continue;  // saw no key and wrote no output
            UNROLL
            for (int c = 0; c < COLUMNS; c++) {
                const int d = c * 32 + lane;
                if (d < V_HEAD_DIM) output[c] += w * parts[(first + i) * V_HEAD_DIM + d];
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
