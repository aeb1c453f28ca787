// decode: few query rows per key head against a range of keys. All query rows of a key head meet each key together, so that
// keys and values are read once; a task takes all key heads of its tokens, so that it reads memory in long runs.
//
//   queries   heads x rows x head_dim, kept for the whole task
//   for each tile of tokens
//     for each key head                     (while the next tile is fetched into the cache)
//       scores        rows x tile           dot products, blocks of 1 to 4 rows x a few tokens
//       softmax       rows x tile           scores become weights, in place
//       accumulate    rows x v_head_dim     earlier sums shrink, weights x values are added
//   one answer, or partial answer, per row
#pragma once

#include "task.h"

namespace pagedflash {
namespace PAGEDFLASH_ISA {

constexpr int64_t MIN_TILE = 16, MAX_TILE = 64;  // tokens
constexpr int64_t TILE_BYTES = 64 << 10;   // keys and values of a tile, all heads: two tiles share a core's cache
constexpr int64_t LINE = 64;               // bytes that one prefetch fetches
constexpr int ROW_BLOCK = 4;               // rows that share each loaded key

// Sums of a block of ROWS rows: three rows take the place of four.
constexpr int padded_rows(int rows) { return rows == 3 ? 4 : rows; }

// Asks for the lines of the next tile's keys and values, a few at a time, in the order of memory.
template <class T>
class Prefetcher {
 public:
  void aim(const T* const* k, const T* const* v, int64_t tokens, const CacheWrite& write, Range heads, int64_t steps) {
    k_ = k;
    v_ = v;
    k_run_ = run(write.k, write.head_dim, heads);
    v_run_ = run(write.v, write.v_head_dim, heads);
    tokens_ = tokens;
    token_ = -1;
    segment_ = segments_ = 0;
    const int64_t lines = tokens * (k_run_.count * divide_up(k_run_.bytes, LINE) + v_run_.count * divide_up(v_run_.bytes, LINE));
    lines_a_step_ = divide_up(lines, steps);
    at_ = end_ = nullptr;
  }
  PAGEDFLASH_INLINE void step() {
    for (int64_t i = 0; i < lines_a_step_; i++) {
      if (at_ >= end_ && !next_segment()) return;
      __builtin_prefetch(at_, 0, 3);
      at_ += LINE;
    }
  }

 private:
  // The heads of one token: one run of bytes if they lie side by side, else a run for each head.
  struct Run {
    int64_t first, count, stride, bytes;  // bytes
  };
  static Run run(const Rows& rows, int64_t head_dim, Range heads) {
    const int64_t size = sizeof(T);
    if (rows.head == head_dim) return {heads.begin * head_dim * size, 1, 0, heads.size() * head_dim * size};
    return {heads.begin * rows.head * size, heads.size(), rows.head * size, head_dim * size};
  }
  bool next_segment() {
    if (segment_ == segments_) {
      if (++token_ >= tokens_) {
        lines_a_step_ = 0;
        return false;
      }
      segment_ = 0;
      segments_ = k_run_.count + v_run_.count;
    }
    const bool of_keys = segment_ < k_run_.count;
    const Run& run = of_keys ? k_run_ : v_run_;
    at_ = reinterpret_cast<const char*>((of_keys ? k_ : v_)[token_]) + run.first;
    at_ += (of_keys ? segment_ : segment_ - k_run_.count) * run.stride;
    end_ = at_ + run.bytes;
    segment_++;
    return true;
  }

  const T *const *k_ = nullptr, *const *v_ = nullptr;
  Run k_run_ = {}, v_run_ = {};
  int64_t tokens_ = 0, token_ = 0, segment_ = 0, segments_ = 0, lines_a_step_ = 0;
  const char *at_ = nullptr, *end_ = nullptr;
};

template <class T>
struct DecodeScratch {
  DecodeScratch(Carver carver, const AttentionCall& call, int64_t heads, int64_t rows) {
    queries = carver.take<typename Dot<T>::Query>(heads * rows * round_up(call.write.head_dim, CHUNK));
    values = carver.take<float>(heads * rows * round_up(call.write.v_head_dim, CHUNK));
    scores = carver.take<float>(rows * MAX_TILE);
    states = carver.take<RowState>(heads * rows);
    for (int i = 0; i < 2; i++) {
      k[i] = carver.take<const T*>(MAX_TILE);
      v[i] = carver.take<const T*>(MAX_TILE);
    }
    bytes = carver.taken();
  }

  typename Dot<T>::Query* queries;  // (heads, rows, head_dim padded to CHUNK)
  float* values;                    // (heads, rows, v_head_dim padded to CHUNK), weighted sums in the order of chunks
  float* scores;                    // (rows, MAX_TILE)
  RowState* states;                 // (heads, rows)
  const T **k[2], **v[2];           // where the tokens of this tile and the next lie
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
        value_size_(round_up(v_head_dim_, CHUNK)), my_(Carver(scratch), call_, heads_, rows_) {}

  void run() {
    load_queries();
    const int64_t tile = tile_tokens(), end = task_.keys.end;
    int now = 0;
    locate(call_, sequence_, task_.keys.begin, lesser(tile, end - task_.keys.begin), my_.k[now], my_.v[now]);
    for (int64_t first = task_.keys.begin; first < end; first += tile, now ^= 1) {
      const int64_t tokens = lesser(tile, end - first), next_tokens = greater(0, lesser(tile, end - first - tile));
      locate(call_, sequence_, first + tile, next_tokens, my_.k[now ^ 1], my_.v[now ^ 1]);
      next_.aim(my_.k[now ^ 1], my_.v[now ^ 1], next_tokens, call_.write, task_.heads, heads_ * steps_a_head(tokens));
      for (int64_t head = 0; head < heads_; head++) attend_tile(head, first, tokens, my_.k[now], my_.v[now]);
    }
    finish();
  }

 private:
  using Query = typename Dot<T>::Query;

  void load_queries() {
    T row[MAX_HEAD_DIM + CHUNK];
    for (int64_t i = 0; i < heads_ * rows_; i++) {
      load_query(call_, sequence_, task_.heads.begin + i / rows_, i % rows_, row, query_size_);
      for (int64_t d = 0; d < query_size_; d += CHUNK) Dot<T>::store_query(my_.queries + i * query_size_ + d, row + d);
      my_.states[i] = RowState();
    }
    memset(my_.values, 0, heads_ * rows_ * value_size_ * sizeof(float));
  }

  int64_t tile_tokens() const {
    const int64_t token_bytes = heads_ * (head_dim_ + v_head_dim_) * sizeof(T);
    return greater(MIN_TILE, lesser(MAX_TILE, TILE_BYTES / token_bytes / MIN_TILE * MIN_TILE));
  }

  // How often attend_tile lets the prefetcher step.
  int64_t steps_a_head(int64_t tokens) const {
    const int64_t block = padded_rows(lesser(rows_, ROW_BLOCK));
    return divide_up(rows_, ROW_BLOCK) *
           (divide_up(tokens, ACCUMULATORS / block) + divide_up(value_size_ / CHUNK, ACCUMULATORS / 2 / block));
  }

  void attend_tile(int64_t head, int64_t first, int64_t tokens, const T* const* k, const T* const* v) {
    const int64_t kv_head = task_.heads.begin + head;
    const Query* queries = my_.queries + head * rows_ * query_size_;
    float* values = my_.values + head * rows_ * value_size_;

    for (int64_t row = 0; row < rows_; row += ROW_BLOCK) {
      float* scores = my_.scores + row * MAX_TILE;
      switch (lesser(ROW_BLOCK, rows_ - row)) {
        case 1: score<1>(queries + row * query_size_, k, kv_head, tokens, scores); break;
        case 2: score<2>(queries + row * query_size_, k, kv_head, tokens, scores); break;
        case 3: score<3>(queries + row * query_size_, k, kv_head, tokens, scores); break;
        case 4: score<4>(queries + row * query_size_, k, kv_head, tokens, scores); break;
      }
    }
    float shrink[MAX_DECODE_ROWS];
    for (int64_t row = 0; row < rows_; row++)
      shrink[row] = softmax_tile(my_.scores + row * MAX_TILE, tokens, rule_,
                                 tile_row(call_, sequence_, kv_head, row, first), my_.states[head * rows_ + row]);
    for (int64_t row = 0; row < rows_; row += ROW_BLOCK) {
      const float* weights = my_.scores + row * MAX_TILE;
      switch (lesser(ROW_BLOCK, rows_ - row)) {
        case 1: accumulate<1>(weights, shrink + row, v, kv_head, tokens, values + row * value_size_); break;
        case 2: accumulate<2>(weights, shrink + row, v, kv_head, tokens, values + row * value_size_); break;
        case 3: accumulate<3>(weights, shrink + row, v, kv_head, tokens, values + row * value_size_); break;
        case 4: accumulate<4>(weights, shrink + row, v, kv_head, tokens, values + row * value_size_); break;
      }
    }
  }

  // Dot products of ROWS query rows with the tile's keys. A block of rows x tokens keeps one register of sums for each
  // pair; totals() then folds LANES of these registers into one.
  //
  //            key t   key t+1            a loaded chunk of a key meets all ROWS rows,
  //   row 0    sum     sum                a row's chunk comes from the nearest cache
  //   row 1    sum     sum
  template <int ROWS>
  void score(const Query* queries, const T* const* k, int64_t kv_head, int64_t tokens, float* scores) {
    constexpr int PADDED = padded_rows(ROWS), TOKENS = ACCUMULATORS / PADDED;
    const int64_t offset = kv_head * call_.write.k.head, whole = head_dim_ / CHUNK * CHUNK;
    for (int64_t t = 0; t < tokens; t += TOKENS) {
      next_.step();
      const T* key[TOKENS];
      for (int j = 0; j < TOKENS; j++) key[j] = k[lesser(t + j, tokens - 1)] + offset;
      Vec sum[PADDED * TOKENS];
      for (int i = 0; i < PADDED * TOKENS; i++) sum[i] = zero();
      for (int64_t d = 0; d < whole; d += CHUNK) {
        for (int j = 0; j < TOKENS; j++) {
          const auto chunk = Dot<T>::load_key(key[j] + d);
          for (int r = 0; r < ROWS; r++) sum[r * TOKENS + j] = Dot<T>::step(chunk, queries + r * query_size_ + d, sum[r * TOKENS + j]);
        }
      }
      if (whole < head_dim_) {
        for (int j = 0; j < TOKENS; j++) {
          const auto chunk = Dot<T>::load_key_part(key[j] + whole, head_dim_ - whole);
          for (int r = 0; r < ROWS; r++) sum[r * TOKENS + j] = Dot<T>::step(chunk, queries + r * query_size_ + whole, sum[r * TOKENS + j]);
        }
      }
      float folded[PADDED * TOKENS];
      for (int i = 0; i < PADDED * TOKENS; i += LANES) store(folded + i, totals(sum + i));
      for (int r = 0; r < ROWS; r++) memcpy(scores + r * MAX_TILE + t, folded + r * TOKENS, TOKENS * sizeof(float));
    }
  }

  // values = values * shrink + weights x V, a few chunks of v_head_dim at a time.
  template <int ROWS>
  void accumulate(const float* weights, const float* shrink, const T* const* v, int64_t kv_head, int64_t tokens, float* values) {
    constexpr int CHUNKS = ACCUMULATORS / 2 / padded_rows(ROWS);
    const int64_t offset = kv_head * call_.write.v.head, whole = v_head_dim_ / CHUNK * CHUNK;
    int64_t d = accumulate_chunks<ROWS, CHUNKS>(0, whole, weights, shrink, v, offset, tokens, values);
    if (d < v_head_dim_) accumulate_block<ROWS, 1, true>(d, weights, shrink, v, offset, tokens, values);
  }

  // As many blocks of CHUNKS as fit from `d` on, then of half as many, ...; returns where it stopped.
  template <int ROWS, int CHUNKS>
  int64_t accumulate_chunks(int64_t d, int64_t whole, const float* weights, const float* shrink, const T* const* v,
                            int64_t offset, int64_t tokens, float* values) {
    for (; d + CHUNKS * CHUNK <= whole; d += CHUNKS * CHUNK)
      accumulate_block<ROWS, CHUNKS, false>(d, weights, shrink, v, offset, tokens, values);
    if constexpr (CHUNKS > 1)
      return accumulate_chunks<ROWS, CHUNKS / 2>(d, whole, weights, shrink, v, offset, tokens, values);
    return d;
  }

  template <int ROWS, int CHUNKS, bool PART>
  void accumulate_block(int64_t d, const float* weights, const float* shrink, const T* const* v, int64_t offset,
                        int64_t tokens, float* values) {
    next_.step();
    Vec sum[ROWS][CHUNKS][2];
    for (int r = 0; r < ROWS; r++)
      for (int i = 0; i < 2 * CHUNKS; i++)
        sum[r][i / 2][i % 2] = mul(splat(shrink[r]), load(values + r * value_size_ + d + i * LANES));
    for (int64_t t = 0; t < tokens; t++) {
      const T* value = v[t] + offset + d;
      for (int c = 0; c < CHUNKS; c++) {
        const Chunk chunk = PART ? load_chunk_part(value, v_head_dim_ - d) : load_chunk(value + c * CHUNK);
        for (int r = 0; r < ROWS; r++) {
          const Vec weight = splat(weights[r * MAX_TILE + t]);
          sum[r][c][0] = fma(weight, chunk.a, sum[r][c][0]);
          sum[r][c][1] = fma(weight, chunk.b, sum[r][c][1]);
        }
      }
    }
    for (int r = 0; r < ROWS; r++)
      for (int i = 0; i < 2 * CHUNKS; i++) store(values + r * value_size_ + d + i * LANES, sum[r][i / 2][i % 2]);
  }

  void finish() {
    for (int64_t i = 0; i < heads_ * rows_; i++) {
      float* values = my_.values + i * value_size_;
      for (int64_t d = 0; d < value_size_; d += CHUNK) {
        Chunk chunk = {load(values + d), load(values + d + LANES)};
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
  const DecodeScratch<T> my_;
  Prefetcher<T> next_;
};

}  // namespace PAGEDFLASH_ISA
}  // namespace pagedflash
