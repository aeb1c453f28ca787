// kv_write: new keys (rotated) and values into their slots. One simdgroup writes one token of one head.

kernel void kv_write(
    device const T* k_new [[buffer(0)]],
    device const T* v_new [[buffer(1)]],
    device T* k [[buffer(2)]],
    device T* v [[buffer(3)]],
    device const int* keys_used [[buffer(4)]],
    device const int* cache_rows [[buffer(5)]],
    device const int* table [[buffer(6)]],
    device const T* cosines [[buffer(7)]],
    device const T* sines [[buffer(8)]],
    constant Sizes& sizes [[buffer(9)]],
    uint3 position [[thread_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]]
) {
    const int head = int(position.x) / 32;
    const int token = int(position.y);
    const int b = int(position.z);

    const int first = keys_used[b];
    if (first < 0) return;
    const int slot = first + token;
    const int page = page_of(table + long(b) * sizes.table_width, slot);
    const long row = PAGED ? 0 : sizes.has_cache_rows ? cache_rows[b] : b;

    device T* k_slot = slot_at(k + row * sizes.k_row_stride, page, slot, sizes.k_page_stride, sizes.k_token_stride);
    device T* v_slot = slot_at(v + row * sizes.v_row_stride, page, slot, sizes.v_page_stride, sizes.v_token_stride);
    append_token(
        k_slot + head * sizes.k_head_stride,
        v_slot + head * sizes.v_head_stride,
        k_new + b * sizes.k_new_batch_stride + token * sizes.k_new_token_stride + head * sizes.k_new_head_stride,
        v_new + b * sizes.v_new_batch_stride + token * sizes.v_new_token_stride + head * sizes.v_new_head_stride,
        slot, cosines, sines, sizes, int(lane)
    );
}
