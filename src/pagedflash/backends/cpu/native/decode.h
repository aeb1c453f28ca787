// decode: few packed-GQA rows per KV head against a range of keys. All rows of a KV head meet each key together, so that keys
// and values are read once; a task takes all KV heads of its tokens, so that memory is read in address order.
//
//   queries        heads x rows x head_dim, kept for the whole task
//   for each tile of tokens, for as many heads as the near caches hold queries of
//     scores       a few tokens at a time: heads x rows x tokens of q.k
//     softmax      row by row: scores become probabilities, in place
//     output       a few tokens at a time: accumulators of heads x rows x v_head_dim += probabilities x V
//   one output, or partial output, per row
//
// A block of 8 tokens passes head by head, so that loaded queries and accumulators serve all of them. Meanwhile the next block
// is prefetched, token by token: memory is fastest in address order, whatever the order of use.
//
//                head 0   head 1   head 2
//   token t      1####    3####    5####       order of use: head by head
//   token t + 1  2####    4####    6####
//   ...
//   token t + 8  >>>>>    >>>>>    >>>>>       prefetched meanwhile: line after line
//   token t + 9  >>>>>    >>...    .....
#pragma once

#include "kv_format.h"
#include "paging.h"
#include "rows.h"
#include "scratch.h"

namespace pagedflash {
namespace PAGEDFLASH_ISA {

constexpr int64_t DECODE_TILE = 64;        // tokens
static_assert(DECODE_TILE <= MAX_TILE);
constexpr int64_t BLOCK_TOKENS = 8;        // tokens that pass together, all heads of them before the next
constexpr int64_t QUERY_BYTES = 64 << 10;  // queries (or accumulators) of the heads that pass together: should stay cached
constexpr int ROW_BLOCK = 4;               // rows that share each loaded key

// A single row works so little on each line that the hardware prefetcher keeps up, and prefetching would only be more work, if
// the heads of a token take so many bytes: the hardware prefetches within pages of that size.
constexpr int64_t LONG_TOKEN_BYTES = 4 << 10;

// As many accumulators as there are registers for, in independent chains: a multiply-add takes longer than the next can start.
constexpr int tokens_at_once(int rows) { return rows == 3 ? 4 : min(4, ACCUMULATORS / rows); }
constexpr int chunks_at_once(int rows) {
  return rows == 3 ? ACCUMULATORS / 4 : min(ACCUMULATORS / 2 / rows, 128 / (2 * LANES));
}

template <int N>
struct Int {
  static constexpr int value = N;
};

// Calls body(Int<n>()) with n = min(rows, ROW_BLOCK), so that it is a constant in there.
template <class Body>
PAGEDFLASH_INLINE void with_row_count(int64_t rows, const Body& body) {
  static_assert(ROW_BLOCK == 4);
  switch (rows) {
    case 1: return body(Int<1>());
    case 2: return body(Int<2>());
    case 3: return body(Int<3>());
    default: return body(Int<4>());
  }
}

struct DecodeScratch {
  DecodeScratch(ScratchArena arena, const AttentionProblem& problem, int64_t heads, int64_t rows) {
    const int64_t query_size = round_up(problem.write.head_dim, CHUNK), out_size = round_up(problem.write.v_head_dim, CHUNK);
    queries = arena.allocate<float>(heads * rows * query_size);
    accumulators = arena.allocate<float>(heads * rows * out_size);
    scores = arena.allocate<float>(heads * rows * DECODE_TILE);
    states = arena.allocate<SoftmaxState>(heads * rows);
    score_rows = arena.allocate<ScoreRow>(heads * rows);
    tokens.k = arena.allocate<const char*>(DECODE_TILE + BLOCK_TOKENS);
    tokens.v = arena.allocate<const char*>(DECODE_TILE + BLOCK_TOKENS);
    tokens.k_descale = arena.allocate<const float*>(DECODE_TILE + BLOCK_TOKENS);
    tokens.v_descale = arena.allocate<const float*>(DECODE_TILE + BLOCK_TOKENS);
    query = arena.allocate<float>(query_size);
    rounded = arena.allocate<float>(query_size);
    values = arena.allocate<float>(out_size);
    bytes = arena.used();
  }

  // Queries and accumulators lie chunk by chunk, the rows of a chunk together: what meets a loaded chunk lies side by side.
  void* queries;             // (heads, head_dim / CHUNK rounded up, rows, CHUNK), of the type that the dot product takes
  float* accumulators;       // (heads, v_head_dim / CHUNK rounded up, rows, CHUNK)
  float* scores;             // (heads, rows, DECODE_TILE)
  SoftmaxState* states;      // (heads, rows)
  ScoreRow* score_rows;      // (heads, rows)
  TokenAddresses tokens;     // of the tile and of the next block
  float* query;              // (head_dim rounded up), one row as it is loaded
  void* rounded;             // the same in its dtype
  float* values;             // (v_head_dim rounded up), one row as it is written
  int64_t bytes;
};

class Decode {
 public:
  Decode(const Plan& plan, const Task& task, void* scratch)
      : plan_(plan), problem_(plan.problem), task_(task), sequence_(plan.sequences[task.sequence]), score_(problem_),
        heads_(task.kv_heads.size()), rows_(task.rows.size()), head_dim_(problem_.write.head_dim),
        v_head_dim_(problem_.write.v_head_dim), query_size_(round_up(head_dim_, CHUNK)),
        out_size_(round_up(v_head_dim_, CHUNK)),
        prefetches_(rows_ > 1 || heads_ * head_dim_ * element_size(problem_.write.k_dtype) < LONG_TOKEN_BYTES),
        scratch_(ScratchArena(scratch), problem_, heads_, rows_) {}

  void run() {
    const CacheWrite& write = problem_.write;
    int64_t heads_at_once = 1;
    with_dot_product(write.dtype, write.k_dtype, [&](auto dot_product) {
      using Dot = decltype(dot_product);
      with_dtype(write.dtype, [&](auto element) { load_queries<decltype(element), Dot>(); });
      const int64_t head_bytes = max(query_size_, out_size_) * sizeof(typename Dot::Query);
      heads_at_once = max<int64_t>(1, QUERY_BYTES / (rows_ * head_bytes));
    });
    for (int64_t first = task_.keys.begin; first < task_.keys.end; first += DECODE_TILE) {
      const int64_t tokens = min(DECODE_TILE, task_.keys.end - first);
      locate_tile(first);
      for (int64_t head = 0; head < heads_; head += heads_at_once) {
        const Range heads = {head, min(heads_, head + heads_at_once)};
        with_dot_product(write.dtype, write.k_dtype, [&](auto dot_product) {
          with_row_count(rows_, [&](auto rows) { score_tile<decltype(dot_product), decltype(rows)::value>(heads, tokens); });
        });
        if (write.k_descale) scale(heads, tokens, write.k_dtype, scratch_.tokens.k_descale, write.k_descale_stride.head);
        softmax(heads, first, tokens);
        if (write.v_descale) scale(heads, tokens, write.v_dtype, scratch_.tokens.v_descale, write.v_descale_stride.head);
        with_format(write.v_dtype, [&](auto element) {
          with_row_count(rows_, [&](auto rows) { accumulate_tile<decltype(element), decltype(rows)::value>(heads, tokens); });
        });
      }
    }
    with_dtype(write.dtype, [&](auto element) { finish<decltype(element)>(); });
  }

 private:
  static constexpr int64_t STEP = 2 * CHUNK;

  // Prefetches tokens line after line: all heads of a token, then the next token.
  class Prefetcher {
   public:
    PAGEDFLASH_INLINE Prefetcher(const char* const* token, Range heads, int64_t stride, int64_t size)
        : token_(token), heads_(heads), stride_(stride), size_(size), head_(heads.begin) {}
    PAGEDFLASH_INLINE void next(int64_t lines) {
      for (int64_t i = 0; i < lines; i++) {
        prefetch(*token_ + head_ * stride_ + byte_);
        byte_ += CACHE_LINE;
        if (byte_ < size_) continue;
        byte_ = 0;
        if (++head_ < heads_.end) continue;
        head_ = heads_.begin;
        token_++;
      }
    }

   private:
    const char* const* token_;
    const Range heads_;
    const int64_t stride_, size_;  // bytes from head to head, of a head
    int64_t head_, byte_ = 0;
  };

  template <class T, class Dot>
  void load_queries() {
    using Query = typename Dot::Query;
    for (int64_t i = 0; i < heads_ * rows_; i++) {
      const int64_t head = i / rows_, row = i % rows_;
      const QueryAndHead at = unpack_row(problem_, task_.kv_heads.begin + head, row);
      T* loaded = static_cast<T*>(scratch_.rounded);
      load_query(problem_, sequence_, at.query, at.head, loaded, query_size_);
      convert(scratch_.query, loaded, query_size_);
      Query* to = static_cast<Query*>(scratch_.queries) + head * rows_ * query_size_ + row * CHUNK;
      for (int64_t d = 0; d < query_size_; d += CHUNK) Dot::store_query(to + d * rows_, scratch_.query + d);
      scratch_.score_rows[i] = score_row(problem_, sequence_, at.query, at.head);
      scratch_.states[i] = SoftmaxState();
    }
    memset(scratch_.accumulators, 0, heads_ * rows_ * out_size_ * sizeof(float));
  }

  // The tile's tokens and the next block's, some of which the tile before has located. Behind the last key it is repeated.
  void locate_tile(int64_t first) {
    const int64_t count = DECODE_TILE + BLOCK_TOKENS, known = first == task_.keys.begin ? 0 : BLOCK_TOKENS;
    const TokenAddresses& tokens = scratch_.tokens;
    const int64_t located = max(known, min(count, task_.keys.end - first));
    const auto move = [&](auto* addresses) { memcpy(addresses, addresses + DECODE_TILE, known * sizeof *addresses); };
    const auto repeat_last = [&](auto* addresses) {
      for (int64_t t = located; t < count; t++) addresses[t] = addresses[located - 1];
    };
    move(tokens.k), move(tokens.v), move(tokens.k_descale), move(tokens.v_descale);
    locate(problem_, sequence_, first + known, located - known, tokens + known);
    repeat_last(tokens.k), repeat_last(tokens.v);
  }

  // Scores, or probabilities, of all rows of some heads times the scale of each token, and that of chunks of the format.
  void scale(Range heads, int64_t tokens, int64_t dtype, const float* const* descales, int64_t head_stride) {
    float chunk_scale = 1.0f;
    with_format(dtype, [&](auto element) { chunk_scale = CHUNK_SCALE<decltype(element)>; });
    for (int64_t head = heads.begin; head < heads.end; head++) {
      float scales[DECODE_TILE];
      for (int64_t t = 0; t < tokens; t++)
        scales[t] = chunk_scale * descales[t][(task_.kv_heads.begin + head) * head_stride];
      for (int64_t row = 0; row < rows_; row++) {
        float* scores = scratch_.scores + (head * rows_ + row) * DECODE_TILE;
        for (int64_t t = 0; t < tokens; t++) scores[t] *= scales[t];
      }
    }
  }

  // What the loops need lies in local constants, here and in accumulate_tile: behind every store the compiler would read the
  // members again.
  template <class Dot, int ROWS>
  void score_tile(Range heads, int64_t tokens) {
    using Element = typename Dot::Element;
    using Query = typename Dot::Query;
    constexpr int TOKENS = tokens_at_once(ROWS);
    const int64_t rows = ROWS < ROW_BLOCK ? ROWS : rows_, query_size = query_size_;
    const int64_t k_head = problem_.write.k_stride.head;
    const int64_t lines = prefetches_ ? TOKENS * STEP * sizeof(Element) / CACHE_LINE : 0;
    const int64_t all_lines = prefetches_ ? TOKENS * divide_up(head_dim_ * sizeof(Element), CACHE_LINE) : 0;
    const char* const* k = scratch_.tokens.k;
    const Range all_heads = {task_.kv_heads.begin + heads.begin, task_.kv_heads.begin + heads.end};
    for (int64_t begin = 0; begin < tokens; begin += BLOCK_TOKENS) {
      Prefetcher prefetcher(k + begin + BLOCK_TOKENS, all_heads, k_head * sizeof(Element), head_dim_ * sizeof(Element));
      for (int64_t head = heads.begin; head < heads.end; head++) {
        const int64_t offset = (task_.kv_heads.begin + head) * k_head;
        const Query* query = static_cast<const Query*>(scratch_.queries) + head * rows * query_size;
        for (int64_t t = begin; t < begin + BLOCK_TOKENS; t += TOKENS) {
          const Element* key[TOKENS];
          for (int j = 0; j < TOKENS; j++) key[j] = reinterpret_cast<const Element*>(k[t + j]) + offset;
          float* scores = scratch_.scores + head * rows * DECODE_TILE + t;
          score_block<Dot, ROWS, TOKENS, true>(key, query, rows, scores, prefetcher, lines, all_lines);
          if (ROWS < ROW_BLOCK) continue;
          for (int64_t row = ROWS; row < rows; row += ROWS)
            with_row_count(rows - row, [&](auto count) {
              score_block<Dot, decltype(count)::value, TOKENS, false>(key, query + row * CHUNK, rows,
                                                                      scores + row * DECODE_TILE, prefetcher, 0, 0);
            });
        }
      }
    }
  }

  // Dot products of ROWS queries with TOKENS keys. Each pair has a register to accumulate in (or two, one for every other
  // chunk); reduce_sums() then folds LANES of these registers into one. One block of rows (PREFETCHES) prefetches on the way.
  //
  //            key t        key t+1           a loaded chunk of a key meets all ROWS rows,
  //   row 0    accumulator  accumulator       a row's chunk comes from the first-level cache
  //   row 1    accumulator  accumulator
  template <class Dot, int ROWS, int TOKENS, bool PREFETCHES>
  PAGEDFLASH_INLINE void score_block(const typename Dot::Element* const* key, const typename Dot::Query* query, int64_t rows,
                                     float* scores, Prefetcher& prefetcher, int64_t lines, int64_t all_lines) {
    constexpr int COUNT = (ROWS * TOKENS + LANES - 1) / LANES * LANES;
    constexpr int CHAINS = ROWS * TOKENS * 2 <= ACCUMULATORS ? 2 : 1;
    const int64_t head_dim = head_dim_, whole = head_dim / STEP * STEP;
    Vec accumulator[CHAINS][COUNT];
    for (int chain = 0; chain < CHAINS; chain++)
      for (int i = 0; i < COUNT; i++) accumulator[chain][i] = zero();
    for (int64_t d = 0; d < whole; d += STEP) {
      if (PREFETCHES) prefetcher.next(lines);
      for (int c = 0; c < STEP; c += CHUNK)
        score_chunk<Dot, ROWS, TOKENS>([&](int j) { return Dot::load_key(key[j] + d + c); }, query + (d + c) * rows,
                                       accumulator[c / CHUNK % CHAINS]);
    }
    if (PREFETCHES && whole < head_dim) prefetcher.next(all_lines - whole / STEP * lines);
    for (int64_t d = whole; d < head_dim; d += CHUNK)
      score_chunk<Dot, ROWS, TOKENS>([&](int j) { return Dot::load_key_part(key[j] + d, head_dim - d); }, query + d * rows,
                                     accumulator[0]);
    float dots[COUNT];
    for (int i = 0; i < COUNT; i++)
      if (CHAINS == 2) accumulator[0][i] = add(accumulator[0][i], accumulator[CHAINS - 1][i]);
    for (int i = 0; i < COUNT; i += LANES) store(dots + i, reduce_sums(accumulator[0] + i));
    for (int r = 0; r < ROWS; r++) memcpy(scores + r * DECODE_TILE, dots + r * TOKENS, TOKENS * sizeof(float));
  }

  // One chunk of each key and row. What is loaded first stays in registers while the other side passes.
  template <class Dot, int ROWS, int TOKENS, class LoadKey>
  static PAGEDFLASH_INLINE void score_chunk(const LoadKey& load_key, const typename Dot::Query* query, Vec* accumulator) {
    using Key = typename Dot::Key;
    if constexpr (ROWS >= TOKENS) {
      Key keys[TOKENS];
      for (int j = 0; j < TOKENS; j++) keys[j] = load_key(j);
      for (int r = 0; r < ROWS; r++) {
        const Key row = Dot::load_query(query + r * CHUNK);
        for (int j = 0; j < TOKENS; j++) {
          Vec& sum = accumulator[r * TOKENS + j];
          sum = Dot::dot(keys[j], row, sum);
        }
      }
    } else {
      Key rows[ROWS];
      for (int r = 0; r < ROWS; r++) rows[r] = Dot::load_query(query + r * CHUNK);
      for (int j = 0; j < TOKENS; j++) {
        const Key key = load_key(j);
        for (int r = 0; r < ROWS; r++) {
          Vec& sum = accumulator[r * TOKENS + j];
          sum = Dot::dot(key, rows[r], sum);
        }
      }
    }
  }

  void softmax(Range heads, int64_t first, int64_t tokens) {
    for (int64_t i = heads.begin * rows_; i < heads.end * rows_; i++) {
      const float alpha = softmax_tile(scratch_.scores + i * DECODE_TILE, score_, scratch_.score_rows[i], first, tokens,
                                       scratch_.states[i], [](float* row, int64_t j, Vec p) { store(row + j, p); });
      if (alpha == 1.0f) continue;
      float* chunk = row_accumulators(i);
      for (int64_t d = 0; d < out_size_; d += CHUNK, chunk += rows_ * CHUNK)
        for (int64_t j = 0; j < CHUNK; j += LANES) store(chunk + j, mul(splat(alpha), load(chunk + j)));
    }
  }

  // The first chunk of a row's accumulators; the others are rows_ * CHUNK apart.
  float* row_accumulators(int64_t i) const {
    return scratch_.accumulators + i / rows_ * rows_ * out_size_ + i % rows_ * CHUNK;
  }

  template <class Element, int ROWS>
  void accumulate_tile(Range heads, int64_t tokens) {
    constexpr int CHUNKS = chunks_at_once(ROWS);
    const int64_t rows = ROWS < ROW_BLOCK ? ROWS : rows_, out_size = out_size_;
    const int64_t v_head = problem_.write.v_stride.head, v_head_dim = v_head_dim_, whole = v_head_dim / CHUNK * CHUNK;
    const char* const* v = scratch_.tokens.v;
    const Range all_heads = {task_.kv_heads.begin + heads.begin, task_.kv_heads.begin + heads.end};
    const bool prefetches = prefetches_ && !problem_.write.v_is_in_k();  // else scores have brought them near
    const int64_t lines = prefetches ? BLOCK_TOKENS * CHUNK * sizeof(Element) / CACHE_LINE : 0;  // for each chunk
    const int64_t all_lines = prefetches ? BLOCK_TOKENS * divide_up(v_head_dim * sizeof(Element), CACHE_LINE) : 0;
    for (int64_t t = 0; t < tokens; t += BLOCK_TOKENS) {
      const int64_t count = min(BLOCK_TOKENS, tokens - t);
      Prefetcher prefetcher(v + t + BLOCK_TOKENS, all_heads, v_head * sizeof(Element), v_head_dim * sizeof(Element));
      for (int64_t head = heads.begin; head < heads.end; head++) {
        const int64_t offset = (task_.kv_heads.begin + head) * v_head;
        const float* weights = scratch_.scores + head * rows * DECODE_TILE + t;
        float* accumulators = scratch_.accumulators + head * rows * out_size;
        const Element* value[BLOCK_TOKENS];
        for (int j = 0; j < BLOCK_TOKENS; j++) value[j] = reinterpret_cast<const Element*>(v[t + j]) + offset;
        int64_t d = 0;
        // As many chunks at once as a row still has.
        const auto pass = [&](auto chunks) {
          constexpr int64_t N = decltype(chunks)::value;
          for (; d + N * CHUNK <= whole; d += N * CHUNK) {
            prefetcher.next(N * lines);
            accumulate_chunks<ROWS, N, BLOCK_TOKENS>(value, count, d, weights, rows, accumulators + d * rows);
          }
        };
        if (count == BLOCK_TOKENS) {
          pass(Int<CHUNKS>());
          if constexpr (CHUNKS > 2) pass(Int<2>());
          if constexpr (CHUNKS > 1) pass(Int<1>());
        }
        if (d < v_head_dim) prefetcher.next(all_lines - d / CHUNK * lines);
        for (; d < v_head_dim; d += CHUNK)
          accumulate_chunks<ROWS, 1, 0>(value, count, d, weights, rows, accumulators + d * rows);
      }
    }
  }

  // CHUNKS chunks from element d on: all rows, while the chunks are cached. COUNT tokens in whole chunks; if 0, `count` tokens
  // in chunks that may reach behind the end of a row.
  template <int ROWS, int CHUNKS, int COUNT, class Element>
  PAGEDFLASH_INLINE void accumulate_chunks(const Element* const* value, int64_t count, int64_t d, const float* weights,
                                           int64_t rows, float* accumulators) {
    accumulate_block<ROWS, CHUNKS, COUNT>(value, count, d, weights, rows, accumulators);
    if (ROWS < ROW_BLOCK) return;
    for (int64_t row = ROWS; row < rows; row += ROWS)
      with_row_count(rows - row, [&](auto block) {
        accumulate_block<decltype(block)::value, CHUNKS, COUNT>(value, count, d, weights + row * DECODE_TILE, rows,
                                                                accumulators + row * CHUNK);
      });
  }

  // ROWS rows and CHUNKS chunks, in registers: accumulators += probabilities x values.
  template <int ROWS, int CHUNKS, int COUNT, class Element>
  PAGEDFLASH_INLINE void accumulate_block(const Element* const* value, int64_t count, int64_t d, const float* weights,
                                          int64_t rows, float* accumulators) {
    const int64_t v_head_dim = v_head_dim_;
    Vec sum[ROWS][2 * CHUNKS];
    for (int c = 0; c < CHUNKS; c++)
      for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < 2; i++) sum[r][2 * c + i] = load(accumulators + (c * rows + r) * CHUNK + i * LANES);
    const auto add_token = [&](int64_t j) {
      for (int c = 0; c < CHUNKS; c++) {
        const int64_t at = d + c * CHUNK;
        const bool whole = COUNT || v_head_dim - at >= CHUNK;
        const Chunk chunk = whole ? load_chunk(value[j] + at) : load_chunk_part(value[j] + at, v_head_dim - at);
        for (int r = 0; r < ROWS; r++) {
          const Vec weight = splat(weights[r * DECODE_TILE + j]);
          sum[r][2 * c] = fma(weight, chunk.a, sum[r][2 * c]);
          sum[r][2 * c + 1] = fma(weight, chunk.b, sum[r][2 * c + 1]);
        }
      }
    };
    if constexpr (COUNT > 0) {
#pragma GCC unroll 4
      for (int j = 0; j < COUNT; j++) add_token(j);
    } else {
      for (int64_t j = 0; j < count; j++) add_token(j);
    }
    for (int c = 0; c < CHUNKS; c++)
      for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < 2; i++) store(accumulators + (c * rows + r) * CHUNK + i * LANES, sum[r][2 * c + i]);
  }

  template <class T>
  void finish() {
    for (int64_t i = 0; i < heads_ * rows_; i++) {
      const float* chunks = row_accumulators(i);
      for (int64_t d = 0; d < out_size_; d += CHUNK, chunks += rows_ * CHUNK) {
        Chunk chunk = {load(chunks), load(chunks + LANES)};
        with_format(problem_.write.v_dtype, [&](auto element) { restore_order<decltype(element)>(chunk); });
        store(scratch_.values + d, chunk.a);
        store(scratch_.values + d + LANES, chunk.b);
      }
      finish_row<T>(plan_, task_, task_.kv_heads.begin + i / rows_, i % rows_, scratch_.values, scratch_.states[i]);
    }
  }

  const Plan& plan_;
  const AttentionProblem& problem_;
  const Task& task_;
  const Sequence& sequence_;
  const Score score_;
  const int64_t heads_, rows_, head_dim_, v_head_dim_, query_size_, out_size_;
  const bool prefetches_;
  const DecodeScratch scratch_;
};

}  // namespace PAGEDFLASH_ISA
}  // namespace pagedflash
