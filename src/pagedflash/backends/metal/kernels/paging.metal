// Keys and values lie in pages of PAGE_SIZE tokens. The offset of a page takes 64 bits, one inside it 32.
//
// Unpaged keys are read the same way, as pages that follow each other: page 0, 1, 2, ... without a table.

inline int table_entry(device const int* pages_of_sequence, int key) {
#if PAGED
    return pages_of_sequence[key / PAGE_SIZE];
#else
    return key / PAGE_SIZE;
#endif
}

inline bool is_page(int page, int num_pages) { return !PAGED || (page >= 0 && page < num_pages); }

// The page to read a key from: some page where the table has none.
inline int page_of(device const int* pages_of_sequence, int key, int num_pages) {
    const int page = table_entry(pages_of_sequence, key);
    return PAGED ? clamp(page, 0, num_pages - 1) : page;
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

// The keys and values of one sequence and KV head.
struct HeadCache {
    device K_T* k;
    device V_T* v;
    Scales k_scales;
    Scales v_scales;
    device const int* pages;  // of the sequence
    int num_pages;
    long k_page_stride;
    long v_page_stride;
    int k_token_stride;
    int v_token_stride;
};

inline HeadCache head_cache(
    device K_T* k, device V_T* v, device float* k_descale, device float* v_descale, device const int* pages_of_sequence,
    constant Params& params, int b, long row, int head
) {
    HeadCache cache;
    cache.k = k + row * params.k_batch_stride + head * params.k_head_stride;
    cache.v = v + row * params.v_batch_stride + head * params.v_head_stride;
    cache.k_scales = k_scales_of(k_descale, params, b, row, head);
    cache.v_scales = v_scales_of(v_descale, params, b, row, head);
    cache.pages = pages_of_sequence;
    cache.num_pages = int(params.num_pages);
    cache.k_page_stride = params.k_page_stride;
    cache.v_page_stride = params.v_page_stride;
    cache.k_token_stride = int(params.k_token_stride);
    cache.v_token_stride = int(params.v_token_stride);
    return cache;
}
