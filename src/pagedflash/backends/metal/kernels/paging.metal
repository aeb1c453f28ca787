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

inline device const T* token_at(device const T* pages, int page, int key, long page_stride, int token_stride) {
    return pages + long(page) * page_stride + (key % PAGE_SIZE) * token_stride;
}

inline device T* slot_at(device T* pages, int page, int key, long page_stride, long token_stride) {
    return pages + long(page) * page_stride + (key % PAGE_SIZE) * token_stride;
}
