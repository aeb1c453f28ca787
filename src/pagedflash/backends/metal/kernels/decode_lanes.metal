// decode for few rows: dot products over lanes.
//
// A tile is 32 keys, or half, a quarter, ... of that. Lane l owns key l: it looks up its page and ends up with its score and weight. The elements of K are
// spread differently, so that each load reads whole lines: K_LANES lanes side by side hold one key, CHUNK elements each, and
// step s of K_LANES steps covers one key in each group of K_LANES lanes (here K_LANES = 16, as for D = 128, CHUNK = 8):
//
//              lanes 0 .. 15                            lanes 16 .. 31
//   step  0    key  0: [0..7] [8..15] ... [120..127]    key 16: [0..7] [8..15] ... [120..127]
//   step  1    key  1: [0..7] [8..15] ... [120..127]    key 17: ...
//     ...
//   step 15    key 15: ...                              key 31: ...
//
// A tile of 16 keys has steps 0 .. 7 of these only, its keys 0 .. 7 in the first 16 lanes and 8 .. 15 in the others; lanes 8 .. 15
// and 24 .. 31 then own none.
//
// Each lane multiplies its part of a key with its part of the query; the sums over K_LANES lanes are taken together for
// KEY_BLOCK steps, and lane l keeps the score of key l. V is read in the same shape with V_LANES; there a key's
// weight comes from the lane that owns it (one shuffle a step), and each lane accumulates its dims of the output.
//
// While the keys or values of some steps are multiplied, those of the next are on their way: V's behind K's, and behind V's
// the K of the next tile.
//
// Defined by the launcher, besides decode.metal's: ROWS; CHUNK (elements of a load); K_LANES, K_CHUNKS (loads of a key by one
// lane), K_STEPS (steps whose loads are issued together), KEY_BLOCK (of them, those multiplied together), and V's; K_RUN,
// V_RUN (steps in one page for sure).

#if !MATRICES

#define K_DIMS (K_CHUNKS * CHUNK)    // elements of a key that a lane holds
#define V_DIMS (V_CHUNKS * CHUNK)
#define QUERY_DIMS (K_LANES * K_DIMS)  // of a query in threadgroup memory, padded to what the lanes hold
#define SLICE (CHUNK < 4 ? CHUNK : 4)  // of them, those that a lane reads at once
#define PAGE_RUN MAX_OF(K_RUN, V_RUN)

typedef float QueryElement;

// Slices of a query that neighbouring lanes read lie side by side.
inline int query_index(int row, int d) {
    const int chunk = d / CHUNK;
    const int slice = (chunk / K_LANES) * (CHUNK / SLICE) + d % CHUNK / SLICE;
    return row * QUERY_DIMS + (slice * K_LANES + chunk % K_LANES) * SLICE + d % SLICE;
}

struct Accumulator {
    float maximum[ROWS];  // over all keys so far
    float sum[ROWS];      // over the keys of this lane
    float output[ROWS][V_DIMS];
};

inline void clear(thread Accumulator& rows) {
    UNROLL
    for (int r = 0; r < ROWS; r++) {
        rows.maximum[r] = LOWEST;
        rows.sum[r] = 0.0f;
        UNROLL
        for (int d = 0; d < V_DIMS; d++) rows.output[r][d] = 0.0f;
    }
}

// Sums of N values over LANES lanes side by side: of value l % N for lane l. While there is more than one, lanes exchange half of
// them, so that N values take little more shuffles than one.
template <int N, int LANES>
struct LaneSum {
    static float of(thread const float* values, int lane) {
        const bool upper = (lane & (N / 2)) != 0;
        float half_of_them[N / 2];
        UNROLL
        for (int i = 0; i < N / 2; i++) {
            const float first = values[i], second = values[i + N / 2];  // loaded before the choice: arrays stay registers
            const float kept = upper ? second : first, sent = upper ? first : second;
            half_of_them[i] = kept + simd_shuffle_xor(sent, ushort(N / 2));
        }
        float sum = LaneSum<N / 2, N / 2>::of(half_of_them, lane);
        UNROLL
        for (int distance = N; distance < LANES; distance *= 2) sum += simd_shuffle_xor(sum, ushort(distance));
        return sum;
    }
};

template <int LANES>
struct LaneSum<1, LANES> {
    static float of(thread const float* values, int lane) {
        float sum = values[0];
        UNROLL
        for (int distance = 1; distance < LANES; distance *= 2) sum += simd_shuffle_xor(sum, ushort(distance));
        return sum;
    }
};

// Tiles have 2^tile_bits keys: step s of a group of LANES lanes is one of `steps_of(LANES, tile_bits)`.
inline int tile_bits_of(constant Params& params) { return int(params.tile_bits); }
inline int steps_of(int lanes, int tile_bits) { return lanes >> (5 - tile_bits); }

// Whether there are steps behind the STEPS from `step` on. Where that can be so once at most, compilers are told.
template <int LANES, int STEPS>
inline bool has_more_steps(int step, int steps) {
    return (LANES > 2 * STEPS || step < LANES - STEPS) && step < steps - STEPS;
}

// The key of a tile that a lane owns, as its place in the tile; -1 if none.
inline int owned_key(int lane, int tile_bits) {
    const int steps = steps_of(K_LANES, tile_bits), column = lane & (K_LANES - 1);
    return column < steps ? lane / K_LANES * steps + column : -1;
}

// The lane that owns key `key` of a tile, and that of step `step` of this lane's group of LANES lanes.
inline ushort owner_of(int key, int tile_bits) {
    const int steps = steps_of(K_LANES, tile_bits);
    return ushort(key / steps * K_LANES + key % steps);
}

template <int LANES>
inline ushort owner_of_step(int step, int lane, int tile_bits) {
    if (LANES == K_LANES) return ushort((lane & ~(LANES - 1)) + step);
    return owner_of(lane / LANES * steps_of(LANES, tile_bits) + step, tile_bits);
}

struct Tile {
    int first_key;
    int page;  // of the key that this lane owns
};

// The tile at `first_key`, whose pages were looked up; lanes that looked up none take that of the first key of their run.
inline Tile tile_of(int first_key, int looked_up, int tile_bits, int lane) {
    const int owned = owned_key(lane, tile_bits), steps = steps_of(K_LANES, tile_bits);
    const int first_of_run = (owned < 0 ? lane / K_LANES * steps : owned) & ~(PAGE_RUN - 1);
    Tile tile;
    tile.first_key = first_key;
    tile.page = PAGE_RUN == 1 ? looked_up : simd_shuffle(looked_up, owner_of(first_of_run, tile_bits));
    return tile;
}

// The pages of a tile's keys: one key a lane, and of those that lie in one page for sure the first.
inline int looked_up_page(
    device const int* pages, int num_pages, int tile, int simdgroups, KVRange range, int tile_bits, int lane
) {
    const int owned = owned_key(lane, tile_bits);
    if (owned < 0 || owned % PAGE_RUN != 0) return 0;
    return page_of(pages, clamp((tile << tile_bits) + owned, range.begin, range.end - 1), num_pages);
}

// What a lane loads of the keys, or values, of STEPS steps.
template <typename E, int STEPS, int CHUNKS>
struct Loaded {
    PackedOf<E, CHUNK> chunks[STEPS * CHUNKS];
};

template <bool CHECKED, int LANES, int RUN, int DIMS, typename E, int STEPS, int CHUNKS>
inline void load_steps_of(
    thread Loaded<E, STEPS, CHUNKS>& loaded, int first_step, device const E* elements, thread const Tile& tile, KVRange range,
    long page_stride, int token_stride, int tile_bits, int lane
) {
    const int first_key = tile.first_key + lane / LANES * steps_of(LANES, tile_bits);  // of this lane's group
    const int column = lane % LANES * CHUNK;
    device const E* row = elements;
    UNROLL
    for (int i = 0; i < STEPS; i++) {
        const int step = first_step + i;
        const int key = first_key + step;
        if (i % RUN == 0) {
            const int page = RUN == LANES ? tile.page : simd_shuffle(tile.page, owner_of_step<LANES>(step, lane, tile_bits));
            row = token_at(elements, page, key, page_stride, token_stride);
        } else {
            row += token_stride;
        }
        UNROLL
        for (int c = 0; c < CHUNKS; c++) {
            const bool present = !CHECKED || contains(range, key);
            loaded.chunks[i * CHUNKS + c] =
                present ? load<CHUNK, DIMS>(row, c * LANES * CHUNK + column) : PackedOf<E, CHUNK>(0);
        }
    }
}

// Keys, or values, of some steps of a tile; 0 for keys outside the range. Most tiles lie inside, and then nothing stands
// between loads.
template <int LANES, int RUN, int DIMS, typename E, int STEPS, int CHUNKS>
inline void load_steps(
    thread Loaded<E, STEPS, CHUNKS>& loaded, int first_step, device const E* elements, thread const Tile& tile, KVRange range,
    long page_stride, int token_stride, int tile_bits, int lane
) {
    if (tile.first_key >= range.begin && tile.first_key + (1 << tile_bits) <= range.end) {
        load_steps_of<false, LANES, RUN, DIMS>(loaded, first_step, elements, tile, range, page_stride, token_stride, tile_bits, lane);
    } else {
        load_steps_of<true, LANES, RUN, DIMS>(loaded, first_step, elements, tile, range, page_stride, token_stride, tile_bits, lane);
    }
}

typedef Loaded<K_T, K_STEPS, K_CHUNKS> LoadedKeys;
typedef Loaded<V_T, V_STEPS, V_CHUNKS> LoadedValues;

inline void load_keys(
    thread LoadedKeys& keys, int step, thread const HeadCache& cache, thread const Tile& tile, KVRange range,
    int tile_bits, int lane
) {
    load_steps<K_LANES, K_RUN, HEAD_DIM>(
        keys, step, cache.k, tile, range, cache.k_page_stride, cache.k_token_stride, tile_bits, lane
    );
}

inline void load_values(
    thread LoadedValues& values, int step, thread const HeadCache& cache, thread const Tile& tile, KVRange range,
    int tile_bits, int lane
) {
    load_steps<V_LANES, V_RUN, V_HEAD_DIM>(
        values, step, cache.v, tile, range, cache.v_page_stride, cache.v_token_stride, tile_bits, lane
    );
}

// The scores of the keys of K_STEPS steps, from `step` on, to the lanes that own them. `queries` are this lane's.
inline void multiply_keys(
    thread float* scores, threadgroup const float* queries, thread const LoadedKeys& loaded, int step, int lane
) {
    UNROLL
    for (int block = 0; block < K_STEPS; block += KEY_BLOCK) {
        float keys[KEY_BLOCK][K_DIMS];
        UNROLL
        for (int i = 0; i < KEY_BLOCK * K_CHUNKS; i++) {
            unpack<K_T, CHUNK>(loaded.chunks[block * K_CHUNKS + i], &keys[i / K_CHUNKS][i % K_CHUNKS * CHUNK]);
        }
        if (ROWS > 1) simdgroup_barrier(mem_flags::mem_threadgroup);  // queries are read anew, not kept in registers
        const bool owned = ((lane ^ (step + block)) & (K_LANES - KEY_BLOCK)) == 0;  // or the lane owns no key
        UNROLL
        for (int r = 0; r < ROWS; r++) {
            float dots[KEY_BLOCK];
            UNROLL
            for (int i = 0; i < KEY_BLOCK; i++) dots[i] = 0.0f;
            UNROLL
            for (int d = 0; d < K_DIMS; d += SLICE) {
                const vec<float, SLICE> query = *reinterpret_cast<threadgroup const vec<float, SLICE>*>(
                    queries + r * QUERY_DIMS + d * K_LANES
                );
                UNROLL
                for (int i = 0; i < KEY_BLOCK; i++) {
                    UNROLL
                    for (int e = 0; e < SLICE; e++) dots[i] = fma(query[e], keys[i][d + e], dots[i]);
                }
            }
            const float score = LaneSum<KEY_BLOCK, K_LANES>::of(dots, lane);
            scores[r] = owned ? score : scores[r];
        }
    }
}

// The values of V_STEPS steps, from `step` on, times the weights of the lanes that own their keys.
inline void multiply_values(
    thread Accumulator& rows, thread const float* weights, thread const LoadedValues& loaded, int step, int tile_bits, int lane
) {
    UNROLL
    for (int i = 0; i < V_STEPS; i++) {
        float values[V_DIMS];
        UNROLL
        for (int c = 0; c < V_CHUNKS; c++) unpack<V_T, CHUNK>(loaded.chunks[i * V_CHUNKS + c], &values[c * CHUNK]);
        const ushort owner = owner_of_step<V_LANES>(step + i, lane, tile_bits);
        UNROLL
        for (int r = 0; r < ROWS; r++) {
            const float weight = simd_shuffle(weights[r], owner);
            UNROLL
            for (int d = 0; d < V_DIMS; d++) rows.output[r][d] = fma(weight, values[d], rows.output[r][d]);
        }
    }
}

// The first tile of a simdgroup, with the first of its keys.
struct Start {
    Tile tile;
    LoadedKeys keys;
};

inline void load_first(
    thread Start& start, thread const HeadCache& cache, int t, int tiles_end, KVRange range, int looked_up, int tile_bits, int lane
) {
    start.tile = tile_of(t << tile_bits, looked_up, tile_bits, lane);
    if (t < tiles_end) load_keys(start.keys, 0, cache, start.tile, range, tile_bits, lane);
}

// The tiles of a simdgroup: `t`, t + simdgroups, ... before `tiles_end`. `range` are the keys that any row sees.
inline void attend(
    thread Accumulator& rows, threadgroup const QueryElement* queries, threadgroup const ScoreRow* score_rows,
    thread const HeadCache& cache, thread Start& start, int t, int tiles_end, int simdgroups, KVRange range, int tile_bits,
    constant ScoreParams& score_params, thread const Dropout& dropout, int lane
) {
    threadgroup const float* my_queries = queries + (lane & (K_LANES - 1)) * SLICE;
    const int k_steps = steps_of(K_LANES, tile_bits), v_steps = steps_of(V_LANES, tile_bits);
    int page = start.tile.page, looked_up = 0;
    LoadedKeys loaded_keys = start.keys;

    for (; t < tiles_end; t += simdgroups) {
        const Tile tile = {t << tile_bits, page};
        const bool last = t + simdgroups >= tiles_end;
        if (!last) {  // while this tile is worked on
            looked_up = looked_up_page(cache.pages, cache.num_pages, t + simdgroups, simdgroups, range, tile_bits, lane);
        }

        // The scales of this lane's key, loaded before they are needed.
        const int owned = owned_key(lane, tile_bits), key = owned < 0 ? -1 : tile.first_key + owned;
        const bool present = contains(range, key);
        float k_scale = 1.0f, v_scale = 1.0f;
#if K_QUANTIZED
        k_scale = present ? *cache.k_scales.at(tile.page, key) : 0.0f;
#endif
#if V_QUANTIZED
        v_scale = present ? *cache.v_scales.at(tile.page, key) : 0.0f;
#endif

        // Q K^T
        float scores[ROWS];
        UNROLL
        for (int r = 0; r < ROWS; r++) scores[r] = 0.0f;
        int step = 0;
        ROLLED
        for (; has_more_steps<K_LANES, K_STEPS>(step, k_steps); step += K_STEPS) {
            LoadedKeys next_keys;
            load_keys(next_keys, step + K_STEPS, cache, tile, range, tile_bits, lane);
            multiply_keys(scores, my_queries, loaded_keys, step, lane);
            loaded_keys = next_keys;
        }
        LoadedValues loaded_values;
        load_values(loaded_values, 0, cache, tile, range, tile_bits, lane);
        multiply_keys(scores, my_queries, loaded_keys, step, lane);

        // Online softmax: once a tile, one key a lane.
        float weights[ROWS];
        UNROLL
        for (int r = 0; r < ROWS; r++) {
            const float score = masked_score(scores[r] * k_scale, key, score_rows[r], score_params);
            const float maximum = max(rows.maximum[r], simd_max(score));
            const float alpha = fast::exp2(rows.maximum[r] - maximum);
            const float weight = weight_of(score, maximum);
            rows.maximum[r] = maximum;
            rows.sum[r] = rows.sum[r] * alpha + weight;
            weights[r] = is_kept(dropout, r, key, score_params) ? weight * v_scale : 0.0f;
            UNROLL
            for (int d = 0; d < V_DIMS; d++) rows.output[r][d] *= alpha;
        }

        // P V
        const Tile next_tile = tile_of(last ? UNBOUNDED : (t + simdgroups) << tile_bits, looked_up, tile_bits, lane);
        step = 0;
        ROLLED
        for (; has_more_steps<V_LANES, V_STEPS>(step, v_steps); step += V_STEPS) {
            LoadedValues next_values;
            load_values(next_values, step + V_STEPS, cache, tile, range, tile_bits, lane);
            multiply_values(rows, weights, loaded_values, step, tile_bits, lane);
            loaded_values = next_values;
        }
        load_keys(loaded_keys, 0, cache, next_tile, range, tile_bits, lane);
        multiply_values(rows, weights, loaded_values, step, tile_bits, lane);
        page = next_tile.page;
    }
}

// This simdgroup's maximum and sum of each row, to threadgroup memory.
inline void share_sums(thread Accumulator& rows, threadgroup float* row_maximum, threadgroup float* row_total, int lane) {
    UNROLL
    for (int r = 0; r < ROWS; r++) {
        UNROLL
        for (int other = V_LANES; other < 32; other *= 2) {
            UNROLL
            for (int d = 0; d < V_DIMS; d++) rows.output[r][d] += simd_shuffle_xor(rows.output[r][d], ushort(other));
        }
        const float total = simd_sum(rows.sum[r]);
        if (lane == 0) {
            row_maximum[r] = rows.maximum[r];
            row_total[r] = total;
        }
    }
}

// This simdgroup's output and sums of `count` rows from `block` on, as if its maxima were the largest of all, to threadgroup memory.
inline void share_output(
    thread const Accumulator& rows, threadgroup float* shared, int block, int count, threadgroup const float* row_maximum,
    threadgroup float* row_total, threadgroup float* row_top, int simdgroup, int simdgroups, int lane
) {
    UNROLL
    for (int r = 0; r < ROWS; r++) {
        if (r < block || r >= block + count || lane >= V_LANES) continue;
        const float top = largest_of(row_maximum + r, ROWS, simdgroups), factor = exp2(rows.maximum[r] - top);
        if (lane == 0) {
            row_total[simdgroup * ROWS + r] *= factor;
            if (simdgroup == 0) row_top[r] = top;
        }
        UNROLL
        for (int c = 0; c < V_CHUNKS; c++) {
            const int column = (c * V_LANES + lane) * CHUNK;
            UNROLL
            for (int e = 0; e < CHUNK; e++) {
                if (column + e < V_HEAD_DIM) shared[(r - block) * V_HEAD_DIM + column + e] = rows.output[r][c * CHUNK + e] * factor;
            }
        }
    }
}

#endif
