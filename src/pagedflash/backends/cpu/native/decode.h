// decode: few query rows per key head against a range of keys. All query rows of a key head meet each key together, so that
// keys and values are read once; a task takes all key heads of its tokens, so that memory is read in its own order.
//
//   queries   heads x rows x head_dim, kept for the whole task
//   for each tile of tokens, for as many heads as the caches nearby hold queries of
//     scores        few tokens by few tokens: heads x rows x these tokens
//     softmax       row by row: scores become weights, in place
//     values        few tokens by few tokens: sums of heads x rows x v_head_dim += weights x V
//   one answer, or partial answer, per row
//
// A block of tokens passes head by head, so that loaded queries and sums serve all of them. Meanwhile the next block is
// asked for, token by token: memory answers fastest in its own order, whatever the order of use.
//
//                head 0   head 1   head 2
//   token t      1####    3####    5####       the order of use, head by head
//   token t + 1  2####    4####    6####
//   ...
//   token t + 8  >>>>>    >>>>>    >>>>>       asked for meanwhile, line after line
//   token t + 9  >>>>>    >>...    .....
#pragma once

#include "task.h"

namespace pagedflash {
namespace PAGEDFLASH_ISA {

constexpr int64_t DECODE_TILE = 64;        // tokens
constexpr int64_t BLOCK_TOKENS = 8;        // tokens that pass together, all heads of them before the next
constexpr int64_t QUERY_BYTES = 64 << 10;  // queries (or sums) of the heads that pass together: they should stay near
constexpr int ROW_BLOCK = 4;               // rows that share each loaded key

// A single row works so little on each line that the processor's own prefetching keeps up, and asking would only be more
// work, if the heads of a token take so many bytes: it prefetches within pages of that size.
constexpr int64_t LONG_TOKEN_BYTES = 4 << 10;

// As many sums as there are registers for, in independent chains: multiply-adds take longer than they are apart.
constexpr int least(int a, int b) { return a < b ? a : b; }
constexpr int tokens_at_once(int rows) { return rows == 3 ? 4 : least(4, ACCUMULATORS / rows); }
constexpr int chunks_at_once(int rows) {
  return rows == 3 ? ACCUMULATORS / 4 : least(ACCUMULATORS / 2 / rows, 128 / (2 * LANES));
}

template <class T>
struct DecodeScratch {
  DecodeScratch(Carver carver, const AttentionCall& call, int64_t heads, int64_t rows) {
    queries = carver.take<typename Dot<T>::Query>(heads * rows * round_up(call.write.head_dim, CHUNK));
    values = carver.take<float>(heads * rows * round_up(call.write.v_head_dim, CHUNK));
    scores = carver.take<float>(heads * rows * DECODE_TILE);
    states = carver.take<RowState>(heads * rows);
    described = carver.take<Row>(heads * rows);
    k = carver.take<const T*>(DECODE_TILE + BLOCK_TOKENS);
    v = carver.take<const T*>(DECODE_TILE + BLOCK_TOKENS);
    bytes = carver.taken();
  }

  // Queries and sums lie chunk by chunk, the rows of a chunk together: what meets a loaded chunk is found side by side.
  typename Dot<T>::Query* queries;  // (heads, head_dim / CHUNK rounded up, rows, CHUNK)
  float* values;                    // (heads, v_head_dim / CHUNK rounded up, rows, CHUNK), weighted sums
  float* scores;                    // (heads, rows, DECODE_TILE)
  RowState* states;                 // (heads, rows)
  Row* described;                   // (heads, rows)
  const T **k, **v;                 // where the tokens of the tile and the next block lie
  int64_t bytes;
};

inline int64_t decode_scratch_bytes(const AttentionCall& call) {
  return DecodeScratch<float>(Carver(nullptr), call, call.write.kv_heads, MAX_DECODE_ROWS).bytes;
}

template <class T>
class Decode {
 public:
  Decode(const Plan& plan, const Task& task, void* scratch)
      : plan_(plan), call_(*plan.call), task_(task), sequence_(plan.sequences[task.sequence]), rule_(call_),
        heads_(task.heads.size()), rows_(task.rows.size()), head_dim_(call_.write.head_dim),
        v_head_dim_(call_.write.v_head_dim), query_size_(round_up(head_dim_, CHUNK)),
        value_size_(round_up(v_head_dim_, CHUNK)),
        asks_ahead_(rows_ > 1 || heads_ * head_dim_ * (int64_t)sizeof(T) < LONG_TOKEN_BYTES),
        my_(Carver(scratch), call_, heads_, rows_) {}

  void run() {
    load_queries();
    const int64_t heads_at_once = greater(1, QUERY_BYTES / (rows_ * query_size_ * (int64_t)sizeof(Query)));
    for (int64_t first = task_.keys.begin; first < task_.keys.end; first += DECODE_TILE) {
      const int64_t tokens = lesser(DECODE_TILE, task_.keys.end - first);
      find_tokens(first);
      for (int64_t head = 0; head < heads_; head += heads_at_once) {
        const Range heads = {head, lesser(heads_, head + heads_at_once)};
        score_tile(heads, tokens);
        soften_tile(heads, first, tokens);
        add_tile(heads, tokens);
      }
    }
    finish();
  }

 private:
  using Query = typename Dot<T>::Query;

  static constexpr int64_t STEP = 2 * CHUNK;

  // Lines of keys or values that will be needed, head after head, token by token: in the order of memory.
  class Upcoming {
   public:
    PAGEDFLASH_INLINE Upcoming(const T* const* token, Range heads, int64_t stride, int64_t size)
        : token_(token), heads_(heads), stride_(stride), size_(size), head_(heads.begin) {}
    PAGEDFLASH_INLINE void ask(int64_t lines) {
      for (int64_t i = 0; i < lines; i++) {
        fetch(*token_ + head_ * stride_ + at_);
        at_ += LINE / sizeof(T);
        if (at_ < size_) continue;
        at_ = 0;
        if (++head_ < heads_.end) continue;
        head_ = heads_.begin;
        token_++;
      }
    }

   private:
    const T* const* token_;
    const Range heads_;
    const int64_t stride_, size_;
    int64_t head_, at_ = 0;
  };

  void load_queries() {
    T row[MAX_HEAD_DIM + CHUNK];
    for (int64_t i = 0; i < heads_ * rows_; i++) {
      const int64_t head = i / rows_, kv_head = task_.heads.begin + head;
      load_query(call_, sequence_, kv_head, i % rows_, row, query_size_);
      Query* to = my_.queries + head * rows_ * query_size_ + i % rows_ * CHUNK;
      for (int64_t d = 0; d < query_size_; d += CHUNK) Dot<T>::store_query(to + d * rows_, row + d);
      my_.described[i] = describe_row(call_, sequence_, kv_head, i % rows_);
      my_.states[i] = RowState();
    }
    memset(my_.values, 0, heads_ * rows_ * value_size_ * sizeof(float));
  }

  // The tile's tokens and the next block's, which the tile before has found; behind the last key it is repeated.
  void find_tokens(int64_t first) {
    const int64_t known = first == task_.keys.begin ? 0 : BLOCK_TOKENS, wanted = DECODE_TILE + BLOCK_TOKENS;
    memcpy(my_.k, my_.k + DECODE_TILE, known * sizeof(T*));
    memcpy(my_.v, my_.v + DECODE_TILE, known * sizeof(T*));
    const int64_t found = greater(known, lesser(wanted, task_.keys.end - first));
    locate(call_, sequence_, first + known, found - known, my_.k + known, my_.v + known);
    for (int64_t t = found; t < wanted; t++) {
      my_.k[t] = my_.k[found - 1];
      my_.v[t] = my_.v[found - 1];
    }
  }

  void score_tile(Range heads, int64_t tokens) {
    switch (lesser(rows_, ROW_BLOCK)) {
      case 1: return score_tokens<1>(heads, tokens);
      case 2: return score_tokens<2>(heads, tokens);
      case 3: return score_tokens<3>(heads, tokens);
      case 4: return score_tokens<4>(heads, tokens);
    }
  }

  // What the loops need lies in local constants, here and in add_tokens: behind every store the compiler would read the
  // members again.
  template <int ROWS>
  void score_tokens(Range heads, int64_t tokens) {
    constexpr int TOKENS = tokens_at_once(ROWS);
    const int64_t rows = ROWS < ROW_BLOCK ? ROWS : rows_, query_size = query_size_;
    const int64_t k_head = call_.write.k_stride.head;
    const int64_t lines = asks_ahead_ ? TOKENS * STEP * sizeof(T) / LINE : 0;
    const T* const* k = my_.k;
    const Range all_heads = {task_.heads.begin + heads.begin, task_.heads.begin + heads.end};
    for (int64_t begin = 0; begin < tokens; begin += BLOCK_TOKENS) {
      Upcoming upcoming(k + begin + BLOCK_TOKENS, all_heads, k_head, head_dim_);
      for (int64_t head = heads.begin; head < heads.end; head++) {
        const int64_t offset = (task_.heads.begin + head) * k_head;
        const Query* query = my_.queries + head * rows * query_size;
        for (int64_t t = begin; t < begin + BLOCK_TOKENS; t += TOKENS) {
          const T* key[TOKENS];
          for (int j = 0; j < TOKENS; j++) {
            key[j] = k[t + j] + offset;
          }
          float* scores = my_.scores + head * rows * DECODE_TILE + t;
          score_block<ROWS, TOKENS, true>(key, query, rows, scores, upcoming, lines);
          if (ROWS < ROW_BLOCK) continue;
          for (int64_t row = ROWS; row < rows; row += ROWS) {
            const Query* of_rows = query + row * CHUNK;
            float* to = scores + row * DECODE_TILE;
            switch (lesser(ROWS, rows - row)) {
              case 1: score_block<1, TOKENS, false>(key, of_rows, rows, to, upcoming, 0); break;
              case 2: score_block<2, TOKENS, false>(key, of_rows, rows, to, upcoming, 0); break;
              case 3: score_block<3, TOKENS, false>(key, of_rows, rows, to, upcoming, 0); break;
              case 4: score_block<4, TOKENS, false>(key, of_rows, rows, to, upcoming, 0); break;
            }
          }
        }
      }
    }
  }

  // Dot products of ROWS query rows with TOKENS keys. Each pair has a register of sums (or two, one for every other chunk);
  // totals() then folds LANES of these registers into one. One block of rows (ASKS) asks for upcoming lines on the way.
  //
  //            key t   key t+1            a loaded chunk of a key meets all ROWS rows,
  //   row 0    sum     sum                a row's chunk comes from the nearest cache
  //   row 1    sum     sum
  template <int ROWS, int TOKENS, bool ASKS>
  PAGEDFLASH_INLINE void score_block(const T* const* key, const Query* query, int64_t rows, float* scores,
                                     Upcoming& upcoming, int64_t lines) {
    constexpr int SUMS = (ROWS * TOKENS + LANES - 1) / LANES * LANES;
    constexpr int CHAINS = ROWS * TOKENS * 2 <= ACCUMULATORS ? 2 : 1;
    const int64_t head_dim = head_dim_, whole = head_dim / STEP * STEP;
    Vec sum[CHAINS][SUMS];
    for (int chain = 0; chain < CHAINS; chain++)
      for (int i = 0; i < SUMS; i++) sum[chain][i] = zero();
    for (int64_t d = 0; d < whole; d += STEP) {
      if (ASKS) upcoming.ask(lines);
      for (int c = 0; c < STEP; c += CHUNK)
        score_chunk<ROWS, TOKENS>([&](int j) { return Dot<T>::load_key(key[j] + d + c); }, query + (d + c) * rows,
                                  sum[c / CHUNK % CHAINS]);
    }
    for (int64_t d = whole; d < head_dim; d += CHUNK)
      score_chunk<ROWS, TOKENS>([&](int j) { return Dot<T>::load_key_part(key[j] + d, head_dim - d); }, query + d * rows,
                                sum[0]);
    float folded[SUMS];
    for (int i = 0; i < SUMS; i++)
      if (CHAINS == 2) sum[0][i] = add(sum[0][i], sum[CHAINS - 1][i]);
    for (int i = 0; i < SUMS; i += LANES) store(folded + i, totals(sum[0] + i));
    for (int r = 0; r < ROWS; r++) memcpy(scores + r * DECODE_TILE, folded + r * TOKENS, TOKENS * sizeof(float));
  }

  // One chunk of each key and row. What is loaded first stays in registers while the other side passes.
  template <int ROWS, int TOKENS, class LoadKey>
  static PAGEDFLASH_INLINE void score_chunk(const LoadKey& load_key, const Query* query, Vec* sum) {
    using Loaded = typename Dot<T>::Loaded;
    if constexpr (ROWS >= TOKENS) {
      Loaded keys[TOKENS];
      for (int j = 0; j < TOKENS; j++) keys[j] = load_key(j);
      for (int r = 0; r < ROWS; r++) {
        const Loaded row = Dot<T>::load_query(query + r * CHUNK);
        for (int j = 0; j < TOKENS; j++) sum[r * TOKENS + j] = Dot<T>::step(keys[j], row, sum[r * TOKENS + j]);
      }
    } else {
      Loaded rows[ROWS];
      for (int r = 0; r < ROWS; r++) rows[r] = Dot<T>::load_query(query + r * CHUNK);
      for (int j = 0; j < TOKENS; j++) {
        const Loaded key = load_key(j);
        for (int r = 0; r < ROWS; r++) sum[r * TOKENS + j] = Dot<T>::step(key, rows[r], sum[r * TOKENS + j]);
      }
    }
  }

  void soften_tile(Range heads, int64_t first, int64_t tokens) {
    for (int64_t i = heads.begin * rows_; i < heads.end * rows_; i++) {
      const float shrink = softmax_tile(my_.scores + i * DECODE_TILE, first, tokens, rule_, my_.described[i], my_.states[i]);
      if (shrink == 1.0f) continue;
      float* values = row_values(i);
      for (int64_t d = 0; d < value_size_; d += CHUNK, values += rows_ * CHUNK)
        for (int64_t j = 0; j < CHUNK; j += LANES) store(values + j, mul(splat(shrink), load(values + j)));
    }
  }

  // The first chunk of a row's sums; the others are rows_ * CHUNK apart.
  float* row_values(int64_t i) const { return my_.values + i / rows_ * rows_ * value_size_ + i % rows_ * CHUNK; }

  void add_tile(Range heads, int64_t tokens) {
    switch (lesser(rows_, ROW_BLOCK)) {
      case 1: return add_tokens<1>(heads, tokens);
      case 2: return add_tokens<2>(heads, tokens);
      case 3: return add_tokens<3>(heads, tokens);
      case 4: return add_tokens<4>(heads, tokens);
    }
  }

  template <int ROWS>
  void add_tokens(Range heads, int64_t tokens) {
    constexpr int CHUNKS = chunks_at_once(ROWS);
    const int64_t rows = ROWS < ROW_BLOCK ? ROWS : rows_, value_size = value_size_;
    const int64_t v_head = call_.write.v_stride.head, v_head_dim = v_head_dim_, whole = v_head_dim / CHUNK * CHUNK;
    const T* const* v = my_.v;
    const Range all_heads = {task_.heads.begin + heads.begin, task_.heads.begin + heads.end};
    const int64_t lines = asks_ahead_ ? BLOCK_TOKENS * CHUNKS * CHUNK * sizeof(T) / LINE : 0;
    for (int64_t t = 0; t < tokens; t += BLOCK_TOKENS) {
      const int64_t count = lesser(BLOCK_TOKENS, tokens - t);
      Upcoming upcoming(v + t + BLOCK_TOKENS, all_heads, v_head, v_head_dim);
      for (int64_t head = heads.begin; head < heads.end; head++) {
        const int64_t offset = (task_.heads.begin + head) * v_head;
        const float* weights = my_.scores + head * rows * DECODE_TILE + t;
        float* sums = my_.values + head * rows * value_size;
        const T* value[BLOCK_TOKENS];
        for (int j = 0; j < BLOCK_TOKENS; j++) value[j] = v[t + j] + offset;
        int64_t d = 0;
        if (count == BLOCK_TOKENS) {
          for (; d + CHUNKS * CHUNK <= whole; d += CHUNKS * CHUNK) {
            upcoming.ask(lines);
            add_chunks<ROWS, CHUNKS, BLOCK_TOKENS>(value, count, d, weights, rows, sums + d * rows);
          }
          for (; d < whole; d += CHUNK)
            add_chunks<ROWS, 1, BLOCK_TOKENS>(value, count, d, weights, rows, sums + d * rows);
        }
        for (; d < v_head_dim; d += CHUNK)
          add_chunks<ROWS, 1, 0>(value, count, d, weights, rows, sums + d * rows);
      }
    }
  }

  // CHUNKS chunks from element d on: all rows, while the chunks are near. COUNT tokens in whole chunks; if 0, `count` tokens
  // in chunks that may reach behind the end of a row.
  template <int ROWS, int CHUNKS, int COUNT>
  PAGEDFLASH_INLINE void add_chunks(const T* const* value, int64_t count, int64_t d,
                                    const float* weights, int64_t rows, float* sums) {
    add_block<ROWS, CHUNKS, COUNT>(value, count, d, weights, rows, sums);
    if (ROWS < ROW_BLOCK) return;
    for (int64_t row = ROWS; row < rows; row += ROWS) {
      const float* of_rows = weights + row * DECODE_TILE;
      float* to = sums + row * CHUNK;
      switch (lesser(ROWS, rows - row)) {
        case 1: add_block<1, CHUNKS, COUNT>(value, count, d, of_rows, rows, to); break;
        case 2: add_block<2, CHUNKS, COUNT>(value, count, d, of_rows, rows, to); break;
        case 3: add_block<3, CHUNKS, COUNT>(value, count, d, of_rows, rows, to); break;
        case 4: add_block<4, CHUNKS, COUNT>(value, count, d, of_rows, rows, to); break;
      }
    }
  }

  // Sums of ROWS rows and CHUNKS chunks, in registers, += weights x values.
  template <int ROWS, int CHUNKS, int COUNT>
  PAGEDFLASH_INLINE void add_block(const T* const* value, int64_t count, int64_t d,
                                   const float* weights, int64_t rows, float* sums) {
    const int64_t v_head_dim = v_head_dim_;
    Vec sum[ROWS][2 * CHUNKS];
    for (int c = 0; c < CHUNKS; c++)
      for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < 2; i++) sum[r][2 * c + i] = load(sums + (c * rows + r) * CHUNK + i * LANES);
    const auto add_token = [&](int64_t j) {
      for (int c = 0; c < CHUNKS; c++) {
        const int64_t at = d + c * CHUNK;
        const Chunk chunk = COUNT ? load_chunk(value[j] + at) : load_chunk_of(value[j], at, v_head_dim);
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
        for (int i = 0; i < 2; i++) store(sums + (c * rows + r) * CHUNK + i * LANES, sum[r][2 * c + i]);
  }

  void finish() {
    for (int64_t i = 0; i < heads_ * rows_; i++) {
      const float* chunks = row_values(i);
      float values[MAX_HEAD_DIM + CHUNK];
      for (int64_t d = 0; d < value_size_; d += CHUNK, chunks += rows_ * CHUNK) {
        Chunk chunk = {load(chunks), load(chunks + LANES)};
        restore_order<T>(chunk);
        store(values + d, chunk.a);
        store(values + d + LANES, chunk.b);
      }
      finish_row<T>(plan_, task_, task_.heads.begin + i / rows_, i % rows_, values, my_.states[i]);
    }
  }

  const Plan& plan_;
  const AttentionCall& call_;
  const Task& task_;
  const Sequence& sequence_;
  const ScoreRule rule_;
  const int64_t heads_, rows_, head_dim_, v_head_dim_, query_size_, value_size_;
  const bool asks_ahead_;
  const DecodeScratch<T> my_;
};

}  // namespace PAGEDFLASH_ISA
}  // namespace pagedflash
