// kv_write: new keys (rotated) and values into their slots. One simdgroup writes one token of one head.
//
// Packed tokens lie one sequence behind the other, or each has a slot of its own.

kernel void kv_write(
    device const T* k_new [[buffer(0)]],
    device const T* v_new [[buffer(1)]],
    device K_T* k [[buffer(2)]],
    device V_T* v [[buffer(3)]],
    device const int* seqused_k [[buffer(4)]],
    device const int* cache_batch_idx [[buffer(5)]],
    device const int* block_table [[buffer(6)]],
    device const T* rotary_cos [[buffer(7)]],
    device const T* rotary_sin [[buffer(8)]],
    constant Params& params [[buffer(9)]],
    device float* k_descale [[buffer(10)]],
    device float* v_descale [[buffer(11)]],
    device const int* cu_seqlens_new [[buffer(12)]],
    device const long* slot_mapping [[buffer(13)]],
    uint3 position [[thread_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]]
) {
    const int head = int(position.x) / 32;
    const int token = int(position.y);
    int b = int(position.z);
    int page, slot;
    if (params.has_slot_mapping) {
        const long where = slot_mapping[token];
        if (where < 0 || where >= params.num_pages * PAGE_SIZE) return;
        b = token;
        page = int(where / PAGE_SIZE);
        slot = int(where % PAGE_SIZE);
    } else {
        int first_token = 0;
        if (params.has_cu_seqlens_new) {
            while (b < params.batch_size && cu_seqlens_new[b + 1] <= token) b++;
            if (b == params.batch_size) return;
            first_token = clamp(cu_seqlens_new[b], 0, token);
        }
        const int first = min(seqused_k[b], int(params.capacity));  // then adding to it does not overflow
        slot = first + token - first_token;
        if (first < 0 || slot >= int(params.capacity)) return;
        page = table_entry(block_table + long(b) * params.max_pages, slot);
    }
    const long row = PAGED ? 0 : params.has_cache_batch_idx ? cache_batch_idx[b] : b;
    if (row < 0 || row >= params.num_pages || !is_page(page, int(params.num_pages))) return;

    device K_T* k_slot = slot_at(k + row * params.k_batch_stride, page, slot, params.k_page_stride, params.k_token_stride);
    device V_T* v_slot = slot_at(v + row * params.v_batch_stride, page, slot, params.v_page_stride, params.v_token_stride);
    append_token(
        k_slot + head * params.k_head_stride,
        v_slot + head * params.v_head_stride,
        k_scales_of(k_descale, params, b, row, head).at(page, slot),
        v_scales_of(v_descale, params, b, row, head).at(page, slot),
        k_new + b * params.k_new_batch_stride + token * params.k_new_token_stride + head * params.k_new_head_stride,
        v_new + b * params.v_new_batch_stride + token * params.v_new_token_stride + head * params.v_new_head_stride,
        slot, rotary_cos, rotary_sin, params, int(lane)
    );
}
