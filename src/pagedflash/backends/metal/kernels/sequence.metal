// One sequence: where its queries and keys lie, and which keys a query may see.
//
// Lengths live on the device. The grid covers the longest sequence there may be; each threadgroup reads here what its own
// sequence has. What nobody has checked is clamped, so that no value of a length touches memory outside of the tensors.

#define UNBOUNDED ((1 << 30) - 1)  // a window this wide hides nothing; positions stay inside 32 bits

struct Sequence {
    int first_row;     // row of q and out that holds its first query
    int rows;          // its rows in out
    int seqlen_q;      // how many of them are queries; the others get 0
    int leftpad;       // slots before its first key
    int seqlen_k;      // one past the slot of its last key, appended keys included
    int append_begin;  // slot of its first appended key
    int window_left;
    int window_right;
    long cache_row;    // row of a dense cache, or of packed keys, that holds slot 0
};

inline int window_width(long width) {
    return width < 0 || width > UNBOUNDED ? UNBOUNDED : int(width);
}

// The rows of a sequence in q and out: the first, and how many.
struct Rows {
    int first;
    int count;
};

inline Rows rows_of(int b, constant Params& params, device const int* cu_seqlens_q) {
    const int num_tokens = int(params.num_tokens_q);
    if (!params.has_cu_seqlens_q) return {b * num_tokens, num_tokens};
    const int first = clamp(cu_seqlens_q[b], 0, num_tokens);
    return {first, clamp(cu_seqlens_q[b + 1], first, num_tokens) - first};
}

// The queries of a sequence; its keys are for find_keys.
inline Sequence sequence_at(int b, constant Params& params, device const int* cu_seqlens_q, device const int* seqused_q) {
    Sequence s;
    const Rows rows = rows_of(b, params, cu_seqlens_q);
    s.first_row = rows.first;
    s.rows = rows.count;
    s.seqlen_q = params.has_seqused_q ? clamp(seqused_q[b], 0, s.rows) : s.rows;
    return s;
}

// The length of a sequence's keys where there is one, for find_keys: loaded by one lane, not by all.
inline int load_length(int b, constant Params& params, device const int* seqused_k, int lane) {
    return params.has_seqused_k && lane == 0 ? seqused_k[b] : 0;
}

inline void find_keys(
    thread Sequence& s,
    int b,
    constant Params& params,
    constant ScoreParams& score_params,
    device const int* cu_seqlens_k,
    int loaded_length,
    device const int* cache_batch_idx,
    device const int* cache_leftpad
) {
    s.leftpad = params.has_cache_leftpad ? max(cache_leftpad[b], 0) : 0;
    s.window_left = window_width(score_params.window_left);
    s.window_right = window_width(score_params.window_right);

    int capacity = int(params.capacity), cached = capacity;
    s.cache_row = b;
#if PAGED
    s.cache_row = 0;
#else
    if (params.has_cu_seqlens_k) {
        const int first = clamp(cu_seqlens_k[b], 0, capacity);
        s.cache_row = first;
        capacity -= first;
    } else if (params.has_cache_batch_idx) {
        s.cache_row = clamp(cache_batch_idx[b], 0, int(params.num_pages) - 1);
    }
#endif
    if (params.has_seqused_k) {
        cached = simd_shuffle(loaded_length, ushort(0));
    } else if (params.has_cu_seqlens_k) {
        cached = max(cu_seqlens_k[b + 1], 0) - max(cu_seqlens_k[b], 0);
    }
    const bool skipped = cached < 0;
    s.append_begin = skipped ? 0 : min(cached, capacity);
    const int num_new_tokens = params.has_cu_seqlens_new ? s.rows : int(params.num_new_tokens);
    s.seqlen_k = skipped ? 0 : min(s.append_begin + num_new_tokens, capacity);
}

// Whether a sequence of so many queries is decode's: all are, unless the batch is mixed.
inline bool is_decoded(int rows, constant Params& params) {
    return !params.decode_limit || rows <= int(params.decode_limit);
}

// Where decode leaves what combine reduces for a query, whose row in out is `row`. In a mixed batch, each sequence has room for
// as many queries as are decode's.
inline long partial_row(constant Params& params, int b, int query, int row) {
    return params.decode_limit ? long(b) * params.decode_limit + query : row;
}

// Keys from `begin` to `end`, which is not one of them; none if end <= begin.
struct KVRange {
    int begin;
    int end;
};

inline bool contains(KVRange range, int key) {
    return key >= range.begin && key < range.end;
}

// Key position of query i: the last query sits on the last key.
inline int position_of(Sequence s, int query) {
    return query + s.seqlen_k - s.seqlen_q;
}

// The keys that query i sees.
inline KVRange kv_range(Sequence s, int query) {
    const int position = position_of(s, query);
    KVRange range;
    range.begin = max(s.leftpad, position - s.window_left);
    range.end = min(s.seqlen_k, position + s.window_right + 1);
    return range;
}

// The keys that any of the queries from `first` to `last` sees: of those that there are.
inline KVRange kv_range(Sequence s, int first, int last) {
    KVRange range;
    range.begin = kv_range(s, first).begin;
    range.end = first < s.seqlen_q ? kv_range(s, min(last, s.seqlen_q - 1)).end : range.begin;
    return range;
}
