// Where one sequence's queries and keys begin and end. Lengths live on the device: the grid is laid out for the longest
// sequence there may be, and each threadgroup finds out here what its own sequence needs.

struct Sequence {
    int first_row;     // row of q and out that holds its first query
    int rows;          // rows of out that belong to it
    int queries;       // how many of them are queries; the others get 0
    int key_begin;     // first slot in use: left padding lies before it
    int key_end;       // one past the last slot in use, new keys included
    int append_begin;  // slot of the first new key
    int window_left;   // how far a query sees to the left and to the right of its own position
    int window_right;
    long keys_row;     // row of an unpaged cache, or of ragged keys, that holds slot 0
};

inline Sequence sequence_at(
    int b,
    constant Sizes& sizes,
    device const int* query_offsets,
    device const int* key_offsets,
    device const int* queries_used,
    device const int* keys_used,
    device const int* cache_rows,
    device const int* left_padding
) {
    Sequence s;
    s.first_row = sizes.has_query_offsets ? query_offsets[b] : b * int(sizes.queries);
    s.rows = sizes.has_query_offsets ? query_offsets[b + 1] - s.first_row : int(sizes.queries);
    s.queries = sizes.has_queries_used ? queries_used[b] : s.rows;
    s.key_begin = sizes.has_left_padding ? left_padding[b] : 0;

    int keys = int(sizes.capacity);
    if (sizes.has_keys_used) {
        keys = keys_used[b];
    } else if (sizes.has_key_offsets) {
        keys = key_offsets[b + 1] - key_offsets[b];
    }
    const bool skipped = keys < 0;
    s.append_begin = skipped ? 0 : keys;
    s.key_end = skipped ? 0 : keys + int(sizes.new_keys);
    s.window_left = int(sizes.window_left);
    s.window_right = int(sizes.window_right);

#if PAGED
    s.keys_row = 0;
#else
    s.keys_row = sizes.has_key_offsets ? key_offsets[b] : sizes.has_cache_rows ? cache_rows[b] : b;
#endif
    return s;
}

// The keys that a query sees: from `first` to `last`, none if last < first.
struct Visible {
    int first;
    int last;
};

// Key position of query i: the last query sits on the last key.
inline int position_of(Sequence s, int query) {
    return query + s.key_end - s.queries;
}

inline Visible visible_from(Sequence s, int query) {
    const int position = position_of(s, query);
    Visible visible;
    visible.first = max(s.key_begin, position - s.window_left);
    visible.last = min(s.key_end - 1, position + s.window_right);
    return visible;
}

// Place of a row's LSE: (B, Hq, Sq), or (Hq, total_q) for ragged queries, whose `queries` is total_q.
inline long lse_index(constant Sizes& sizes, int row, int head) {
    const int batch = row / int(sizes.queries);
    return (long(batch) * sizes.heads + head) * sizes.queries + (row - batch * int(sizes.queries));
}
