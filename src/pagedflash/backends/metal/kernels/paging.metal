// Keys and values lie in pages of PAGE_SIZE tokens. The offset of a page takes 64 bits, one inside it 32.
//
// Unpaged keys are read the same way, as pages that follow each other: page 0, 1, 2, ... without a table.

inline int page_of(device const int* pages_of_sequence, int key) {
#if PAGED
    return pages_of_sequence[key / PAGE_SIZE];
#else
    return key / PAGE_SIZE;
#endif
}

template <typename E>
inline device const E* token_at(device const E* pages, int page, int key, long page_stride, int token_stride) {
    return pages + long(page) * page_stride + (key % PAGE_SIZE) * token_stride;
}

template <typename E>
inline device E* slot_at(device E* pages, int page, int key, long page_stride, long token_stride) {
    return pages + long(page) * page_stride + (key % PAGE_SIZE) * token_stride;
}

// The scales of the keys, or values, of one sequence and head; strides are 0 where one scale serves all.
struct Scales {
    device float* pages;
    long page_stride;
    long token_stride;

    device float* at(int page, int key) const thread { return slot_at(pages, page, key, page_stride, token_stride); }
};

inline Scales k_scales_of(device float* k_descale, constant Params& params, int b, long row, int head) {
    Scales scales;
    scales.pages = k_descale + b * params.k_descale_sequence_stride + row * params.k_descale_batch_stride
        + head * params.k_descale_head_stride;
    scales.page_stride = params.k_descale_page_stride;
    scales.token_stride = params.k_descale_token_stride;
    return scales;
}

inline Scales v_scales_of(device float* v_descale, constant Params& params, int b, long row, int head) {
    Scales scales;
    scales.pages = v_descale + b * params.v_descale_sequence_stride + row * params.v_descale_batch_stride
        + head * params.v_descale_head_stride;
    scales.page_stride = params.v_descale_page_stride;
    scales.token_stride = params.v_descale_token_stride;
    return scales;
}
