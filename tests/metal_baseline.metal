// What the tests and benchmarks compare decode with: the plainest paged decode, as proposed upstream. One simdgroup for
// each sequence and query head; its lanes hold HEAD_DIM / 32 elements each, one key after the other.

#include <metal_stdlib>
using namespace metal;

#define PER_LANE (HEAD_DIM / 32)

kernel void plain_decode(
    device const T* q [[buffer(0)]],
    device const T* k [[buffer(1)]],
    device const T* v [[buffer(2)]],
    device T* out [[buffer(3)]],
    device const int* table [[buffer(4)]],
    device const int* lengths [[buffer(5)]],
    constant int& max_pages [[buffer(6)]],
    constant int& heads [[buffer(7)]],
    constant int& kv_heads [[buffer(8)]],
    constant float& scale [[buffer(9)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]]
) {
    const int head = int(group.x), b = int(group.y);
    const int kv_head = head / (heads / kv_heads);
    float query[PER_LANE], output[PER_LANE];
    for (int i = 0; i < PER_LANE; i++) {
        query[i] = scale * float(q[(b * heads + head) * HEAD_DIM + int(lane) + 32 * i]);
        output[i] = 0.0f;
    }
    float maximum = -1e30f, sum = 0.0f;
    for (int key = 0; key < lengths[b]; key++) {
        const long slot = long(table[b * max_pages + key / PAGE_SIZE]) * PAGE_SIZE + key % PAGE_SIZE;
        const long row = (slot * kv_heads + kv_head) * HEAD_DIM + lane;
        float score = 0.0f;
        for (int i = 0; i < PER_LANE; i++) score += query[i] * float(k[row + 32 * i]);
        score = simd_sum(score);
        const float new_maximum = max(maximum, score);
        const float shrink = exp(maximum - new_maximum), weight = exp(score - new_maximum);
        maximum = new_maximum;
        sum = sum * shrink + weight;
        for (int i = 0; i < PER_LANE; i++) output[i] = output[i] * shrink + weight * float(v[row + 32 * i]);
    }
    for (int i = 0; i < PER_LANE; i++) out[(b * heads + head) * HEAD_DIM + int(lane) + 32 * i] = T(output[i] / sum);
}
