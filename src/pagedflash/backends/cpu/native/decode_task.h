// What the kernels of decode share: few packed-GQA rows per KV head against a range of keys. All rows of a KV head meet each
// key together, so that keys and values are read once; a task takes all KV heads of its tokens, so that memory is read in
// address order.
//
//   queries        heads x rows x head_dim, kept for the whole task
//   for each tile of tokens, for as many heads as the near caches hold queries of
//     scores       heads x rows x tokens of q.k
//     softmax      row by row: scores become probabilities, in place
//     output       accumulators of heads x rows x v_head_dim += probabilities x V
//   one output, or partial output, per row
//
// A block of tokens passes head by head, so that loaded queries and accumulators serve all of them. Meanwhile the next block
// is prefetched, token by token: memory is fastest in address order, whatever the order of use. Lines are prefetched one by one
// between the multiplications, at the pace of those that are used: in bursts, memory is a third slower.
//
//                head 0   head 1   head 2
//   token t      1####    3####    5####       order of use: head by head
//   token t + 1  2####    4####    6####
//   ...
//   next block   >>>>>    >>>>>    >>>>>       prefetched meanwhile: line after line
//                >>>>>    >>...    .....
#pragma once

#include "kv_format.h"
#include "paging.h"
#include "rows.h"
#include "scratch.h"

namespace pagedflash {
namespace PAGEDFLASH_ISA {

constexpr int64_t DECODE_TILE = 64;  // tokens
static_assert(DECODE_TILE <= MAX_TILE);
constexpr int64_t QUERY_BYTES = 64 << 10;  // queries (or accumulators) of the heads that pass together: should stay cached
// A single row works so little on each line that prefetching costs more than it saves, where so few keys may well be cached.
constexpr int64_t FEW_KEYS = 128;

struct DecodeScratch {
  DecodeScratch(ScratchArena arena, const AttentionProblem& problem, int64_t heads, int64_t rows) {
    const int64_t query_size = round_up(problem.write.head_dim, CHUNK), out_size = round_up(problem.write.v_head_dim, CHUNK);
    queries = arena.allocate<float>(heads * rows * query_size);
    accumulators = arena.allocate<float>(heads * rows * out_size);
    scores = arena.allocate<float>(heads * rows * DECODE_TILE);
    states = arena.allocate<SoftmaxState>(heads * rows);
    score_rows = arena.allocate<ScoreRow>(heads * rows);
    tokens.k = arena.allocate<const char*>(2 * DECODE_TILE);
    tokens.v = arena.allocate<const char*>(2 * DECODE_TILE);
    tokens.k_descale = arena.allocate<const float*>(2 * DECODE_TILE);
    tokens.v_descale = arena.allocate<const float*>(2 * DECODE_TILE);
    lines = arena.allocate<const char*>(2 * max(query_size, out_size));
    query = arena.allocate<float>(query_size);
    values = arena.allocate<float>(out_size);
    bytes = arena.used();
  }

  // Accumulators lie chunk by chunk, the rows of a chunk together, and so do queries: what meets a loaded chunk lies side by
  // side.
  void* queries;             // (heads, head_dim / CHUNK rounded up, rows, CHUNK), as the kernel takes them
  float* accumulators;       // (heads, v_head_dim / CHUNK rounded up, rows, CHUNK)
  float* scores;             // (heads, rows, DECODE_TILE)
  SoftmaxState* states;      // (heads, rows)
  ScoreRow* score_rows;      // (heads, rows)
  TokenAddresses tokens;     // of the tile and of the next block
  const char** lines;        // that are prefetched while a block of registers or tiles is multiplied
  void* query;               // (head_dim rounded up), one row as it is loaded
  float* values;             // (v_head_dim rounded up), one row as it is written
  int64_t bytes;
};

// Kernel, which derives from it, offers load_queries(), score_tile(heads, tokens) and accumulate_tile(heads, tokens). It takes
// BLOCK tokens at a time.
template <class Kernel, int64_t BLOCK>
class DecodeTask {
 public:
  DecodeTask(const Plan& plan, const Task& task, void* scratch)
      : plan_(plan), problem_(plan.problem), task_(task), sequence_(plan.sequences[task.sequence]), score_(problem_),
        heads_(task.kv_heads.size()), rows_(task.rows.size()), head_dim_(problem_.write.head_dim),
        v_head_dim_(problem_.write.v_head_dim), query_size_(round_up(head_dim_, CHUNK)),
        out_size_(round_up(v_head_dim_, CHUNK)),
        scratch_(ScratchArena(scratch), problem_, heads_, rows_) {}

  void run() {
    const CacheWrite& write = problem_.write;
    Kernel& kernel = static_cast<Kernel&>(*this);
    kernel.load_queries();
    const int64_t head_bytes = rows_ * max(query_size_, out_size_) * sizeof(float);
    const int64_t heads_at_once = max<int64_t>(1, QUERY_BYTES / head_bytes);
    for (int64_t first = task_.keys.begin; first < task_.keys.end; first += DECODE_TILE) {
      const int64_t tokens = min(DECODE_TILE, task_.keys.end - first);
      locate_tile(first);
      for (int64_t head = 0; head < heads_; head += heads_at_once) {
        const Range heads = {head, min(heads_, head + heads_at_once)};
        kernel.score_tile(heads, tokens);
        if (write.k_descale) scale(heads, tokens, write.k_dtype, scratch_.tokens.k_descale, write.k_descale_stride.head);
        softmax(heads, first, tokens);
        if (write.v_descale) scale(heads, tokens, write.v_dtype, scratch_.tokens.v_descale, write.v_descale_stride.head);
        kernel.accumulate_tile(heads, tokens);
      }
    }
    with_dtype(write.dtype, [&](auto element) { finish<decltype(element)>(); });
  }

 protected:
  // Prefetches tokens in address order, line after line: all heads of a token, then the next token; or, where the tokens
  // of a head are nearer to each other than the heads of a token, all tokens of a head.
  class Prefetcher {
   public:
    // `size` bytes of each head.
    PAGEDFLASH_INLINE Prefetcher(const char* const* tokens, int64_t count, Range heads, const Strides& stride,
                                 int64_t element_bytes, int64_t size)
        : tokens_(tokens), count_(count), heads_(heads), stride_(stride.head * element_bytes), size_(size),
          by_head_(stride.head > stride.token), head_(heads.begin) {
      if (stride_ == size_) heads_ = {heads.begin, heads.begin + 1}, size_ *= heads.size();  // as one
      if (count_) go_to_piece();
    }
    // The next lines; behind the last one it is repeated. False if there are none.
    PAGEDFLASH_INLINE bool take(const char** lines, int64_t count) {
      if (line_ >= end_) return false;
      const char* last = line_;
      while (count > 0 && line_ < end_) {
        const int64_t n = min(count, divide_up(end_ - line_, CACHE_LINE));
        for (int64_t i = 0; i < n; i++) lines[i] = line_ + i * CACHE_LINE;
        last = lines[n - 1];
        lines += n, count -= n, line_ += n * CACHE_LINE;
        if (line_ >= end_) finish_piece();
      }
      for (int64_t i = 0; i < count; i++) lines[i] = last;
      return true;
    }

   private:
    PAGEDFLASH_INLINE void finish_piece() {
      if (by_head_) {
        if (++token_ == count_) token_ = 0, head_++;
      } else {
        if (++head_ == heads_.end) head_ = heads_.begin, token_++;
      }
      if (token_ < count_ && head_ < heads_.end) go_to_piece();
    }
    PAGEDFLASH_INLINE void go_to_piece() {
      line_ = tokens_[token_] + head_ * stride_;
      end_ = line_ + size_;
    }

    const char* const* const tokens_;
    const int64_t count_;
    Range heads_;
    const int64_t stride_;  // bytes from head to head
    int64_t size_;
    const bool by_head_;
    int64_t token_ = 0, head_;
    const char *line_ = nullptr, *end_ = nullptr;  // of a piece of memory: a head of a token, or all its heads
  };

  // The prefetcher of the block behind block `begin` of the tile.
  PAGEDFLASH_INLINE Prefetcher prefetcher(const char* const* tokens, int64_t begin, Range heads, const Strides& stride,
                                          int64_t element_bytes, int64_t size) const {
    const int64_t next = begin + BLOCK, known = rows_ == 1 && task_.keys.size() <= FEW_KEYS ? 0 : located_ - next;
    const Range all_heads = {task_.kv_heads.begin + heads.begin, task_.kv_heads.begin + heads.end};
    return Prefetcher(tokens + next, max<int64_t>(0, min(BLOCK, known)), all_heads, stride, element_bytes, size);
  }

  // store_query(head, row, query) stores a query of T as the kernel takes it.
  template <class T, class StoreQuery>
  void load_rows(const StoreQuery& store_query) {
    T* query = static_cast<T*>(scratch_.query);
    for (int64_t i = 0; i < heads_ * rows_; i++) {
      const int64_t head = i / rows_, row = i % rows_;
      const QueryAndHead at = unpack_row(problem_, task_.kv_heads.begin + head, row);
      load_query(problem_, sequence_, at.query, at.head, query, query_size_);
      store_query(head, row, query);
      scratch_.score_rows[i] = score_row(problem_, sequence_, at.query, at.head);
      scratch_.states[i] = SoftmaxState();
    }
    memset(scratch_.accumulators, 0, heads_ * rows_ * out_size_ * sizeof(float));
  }

  // The tile's tokens, some of which the tile before has located, and the next block's. Behind the last key it is repeated:
  // blocks are whole.
  void locate_tile(int64_t first) {
    const int64_t known = first == task_.keys.begin ? 0 : located_ - DECODE_TILE;
    const TokenAddresses& tokens = scratch_.tokens;
    located_ = min(DECODE_TILE + BLOCK, task_.keys.end - first);
    const auto move = [&](auto* addresses) { memcpy(addresses, addresses + DECODE_TILE, known * sizeof *addresses); };
    const auto repeat_last = [&](auto* addresses) {
      for (int64_t t = located_; t < round_up(located_, BLOCK); t++) addresses[t] = addresses[located_ - 1];
    };
    move(tokens.k), move(tokens.v), move(tokens.k_descale), move(tokens.v_descale);
    locate(problem_, sequence_, first + known, located_ - known, tokens + known);
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
  int64_t located_ = 0;  // tokens from the tile's first on
  const DecodeScratch scratch_;
};

}  // namespace PAGEDFLASH_ISA
}  // namespace pagedflash
