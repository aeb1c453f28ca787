#include "plan.h"

#include <math.h>
#include <string.h>

namespace pagedflash {
namespace {

// Long sequences are split so that there are about this many tasks, whatever the number of threads: enough for balance on
// many cores, few enough that merging costs nothing.
constexpr int64_t TARGET_DECODE_TASKS = 128;
constexpr int64_t MIN_DECODE_KEYS = 256;
constexpr int64_t TARGET_PREFILL_TASKS = 64;
constexpr int64_t MIN_PREFILL_KEYS = 512;
constexpr int64_t CHUNK_MULTIPLE = 64;
// Short sequences are split by heads instead, where there are fewer of them than this for each thread: parts of at least so
// many bytes of keys and values. No more than needed, since a part skips the memory of the other heads.
constexpr int64_t SHORT_TASKS_PER_THREAD = 2;
constexpr int64_t MIN_PART_BYTES = 64 << 10;

Sequence describe(const AttentionCall& call, int64_t b) {
  const CacheWrite& write = call.write;
  Sequence sequence;
  sequence.index = b;
  if (call.cu_seqlens_q) {
    sequence.first_row = call.cu_seqlens_q[b];
    sequence.queries = call.seqused_q ? call.seqused_q[b] : call.cu_seqlens_q[b + 1] - call.cu_seqlens_q[b];
  } else {
    sequence.first_row = b * call.q_tokens;
    sequence.queries = call.q_tokens;
  }
  if (write.lengths) {
    sequence.keys = write.lengths[b];
  } else if (call.cu_seqlens_k) {
    sequence.keys = call.cu_seqlens_k[b + 1] - call.cu_seqlens_k[b];
  } else {
    sequence.keys = call.write.capacity();
  }
  sequence.rotary_start = sequence.keys;
  if (write.k_new && sequence.keys >= 0) sequence.keys += write.new_tokens;
  sequence.first_key = call.cache_leftpad ? call.cache_leftpad[b] : 0;
  return sequence;
}

void answer_nothing_seen(const AttentionCall& call, int64_t b, Range tokens) {
  if (!tokens.size()) return;
  const int64_t size = element_size(call.write.dtype) * call.q_heads * call.write.v_head_dim;
  memset(static_cast<char*>(call.out) + tokens.begin * size, 0, tokens.size() * size);
  for (int64_t head = 0; head < call.q_heads; head++)
    for (int64_t token = tokens.begin; token < tokens.end; token++)
      call.lse[call.cu_seqlens_q ? head * call.q_tokens + token
                                 : (b * call.q_heads + head) * call.q_tokens + token - b * call.q_tokens] = INFINITY;
}

bool is_decode(const AttentionCall& call, const Sequence& sequence) {
  return sequence.queries * call.group() <= MAX_DECODE_ROWS;
}

// Keys of each chunk, so that `spans` keys in all make about `target` tasks of at least `least` keys.
int64_t chunk_keys(const AttentionCall& call, int64_t span, int64_t spans, int64_t target, int64_t least) {
  if (call.num_splits > 0) return round_up(greater(1, divide_up(span, call.num_splits)), CHUNK_MULTIPLE);
  return round_up(greater(least, divide_up(spans, target)), CHUNK_MULTIPLE);
}

}  // namespace

bool Plan::make(const AttentionCall& of_call, int64_t threads) {
  call = &of_call;
  const int64_t batch = call->write.batch, kv_heads = call->write.kv_heads;
  int64_t decode_keys = 0, decode_sequences = 0, prefill_tasks = 0;
  for (int64_t b = 0; b < batch; b++) {
    const Sequence sequence = describe(*call, b);
    const int64_t room = call->cu_seqlens_q ? call->cu_seqlens_q[b + 1] - sequence.first_row : sequence.queries;
    const Range used = {0, sequence.keys < 0 ? 0 : sequence.queries};
    const int64_t seen = used.size() ? sequence.visible(*call, used).size() : 0;
    answer_nothing_seen(*call, b, {sequence.first_row + (seen ? used.end : 0), sequence.first_row + room});
    if (!seen) continue;
    if (!sequences.append(sequence)) return false;
    if (is_decode(*call, sequence)) {
      decode_keys += seen;
      decode_sequences++;
    } else {
      prefill_tasks += divide_up(sequence.queries * call->group(), PREFILL_ROWS) * kv_heads;
    }
  }
  if (call->cu_seqlens_q) answer_nothing_seen(*call, 0, {call->cu_seqlens_q[batch], call->q_tokens});

  for (int64_t s = 0; s < sequences.size(); s++) {
    const Range keys = sequences[s].visible(*call, {0, sequences[s].queries});
    if (is_decode(*call, sequences[s])) {
      const int64_t chunk = chunk_keys(*call, keys.size(), decode_keys, TARGET_DECODE_TASKS, MIN_DECODE_KEYS);
      const int64_t bytes = keys.size() * kv_heads * (call->write.head_dim + call->write.v_head_dim) *
                            element_size(call->write.dtype);
      const int64_t parts = chunk < keys.size()
                                ? 1
                                : lesser(lesser(kv_heads, divide_up(SHORT_TASKS_PER_THREAD * threads, decode_sequences)),
                                      greater(1, bytes / MIN_PART_BYTES));
      if (!add_decode(s, keys, chunk, parts)) return false;
    } else {
      const int64_t splits = divide_up(TARGET_PREFILL_TASKS, prefill_tasks);
      const int64_t chunk = splits == 1 && call->num_splits == 0
                                ? keys.size()
                                : chunk_keys(*call, keys.size(), keys.size(), splits, MIN_PREFILL_KEYS);
      if (!add_prefill(s, keys, chunk)) return false;
    }
  }
  return true;
}

bool Plan::add_decode(int64_t s, Range keys, int64_t chunk, int64_t head_parts) {
  const int64_t kv_heads = call->write.kv_heads, rows = sequences[s].queries * call->group();
  const int64_t splits = divide_up(keys.size(), chunk);
  const int64_t partial = add_merge(s, splits);
  if (partial < -1) return false;
  for (int64_t split = 0; split < splits; split++) {
    const Range part = {keys.begin + split * chunk, lesser(keys.end, keys.begin + (split + 1) * chunk)};
    const int64_t partial_row = partial < 0 ? -1 : partial + split * sequences[s].queries * call->q_heads;
    for (int64_t p = 0; p < head_parts; p++) {
      const Range heads = {kv_heads * p / head_parts, kv_heads * (p + 1) / head_parts};
      if (!tasks.append({DECODE, s, heads, {0, rows}, part, partial_row})) return false;
    }
  }
  return true;
}

bool Plan::add_prefill(int64_t s, Range keys, int64_t chunk) {
  const Sequence& sequence = sequences[s];
  const int64_t rows = sequence.queries * call->group(), splits = divide_up(keys.size(), chunk);
  const int64_t partial = add_merge(s, splits);
  if (partial < -1) return false;
  // Under a causal mask the last rows see most keys: they go first.
  for (int64_t block = divide_up(rows, PREFILL_ROWS) - 1; block >= 0; block--) {
    const Range block_rows = {block * PREFILL_ROWS, lesser(rows, (block + 1) * PREFILL_ROWS)};
    const Range queries = {block_rows.begin / call->group(), (block_rows.end - 1) / call->group() + 1};
    const Range seen = sequence.visible(*call, queries);
    for (int64_t split = 0; split < splits; split++) {
      const Range part = {greater(seen.begin, keys.begin + split * chunk), lesser(seen.end, keys.begin + (split + 1) * chunk)};
      const int64_t partial_row = partial < 0 ? -1 : partial + split * sequence.queries * call->q_heads;
      for (int64_t head = 0; head < call->write.kv_heads; head++)
        if (!tasks.append({PREFILL, s, {head, head + 1}, block_rows, part, partial_row})) return false;
    }
  }
  return true;
}

// The first partial row of a sequence of so many splits; -1 if it is not split, -2 if memory ran out.
int64_t Plan::add_merge(int64_t s, int64_t splits) {
  if (splits == 1) return -1;
  const int64_t rows = sequences[s].queries * call->q_heads, partial_row = partial_rows;
  if (!merges.append({s, splits, partial_row, merged_rows})) return -2;
  partial_rows += splits * rows;
  merged_rows += rows;
  return partial_row;
}

}  // namespace pagedflash
