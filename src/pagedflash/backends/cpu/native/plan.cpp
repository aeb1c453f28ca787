#include "plan.h"

namespace pagedflash {
namespace {

// Long sequences are split so that there are about this many tasks, whatever the number of threads: enough for balance on
// many cores, few enough that the reduction costs nothing.
constexpr int64_t TARGET_DECODE_TASKS = 128;
constexpr int64_t MIN_DECODE_KEYS = 256;
constexpr int64_t TARGET_PREFILL_TASKS = 64;
constexpr int64_t MIN_PREFILL_KEYS = 512;
// Where there would be more tasks, they have more rows, as long as a second-level cache may hold their queries and
// accumulators.
constexpr int64_t MAX_PREFILL_FLOATS = MAX_PREFILL_ROWS * 256;
constexpr int64_t ROWS_MULTIPLE = 96;  // whole blocks of every matrix product
constexpr int64_t SPLIT_MULTIPLE = 64;
constexpr int64_t TARGET_BACKWARD_TASKS = 32;
// Short sequences are divided by KV heads instead, where there are fewer of them than this for each thread: into groups with
// at least so many bytes of keys and values. No more than needed, since a task skips the memory of the other heads.
constexpr int64_t SHORT_TASKS_PER_THREAD = 2;
constexpr int64_t MIN_GROUP_BYTES = 64 << 10;

void write_empty_rows(const AttentionProblem& problem, int64_t batch, Range tokens) {
  for (int64_t token = tokens.begin; token < tokens.end; token++)
    for (int64_t head = 0; head < problem.q_heads; head++) write_empty_row(problem, batch, token, head);
}

bool is_decode(const AttentionProblem& problem, const Sequence& sequence) {
  return sequence.seqlen_q * problem.group() <= MAX_DECODE_ROWS;
}

// Rows of each prefill task, of so many rows in all.
int64_t rows_per_task(const AttentionProblem& problem, int64_t total) {
  const int64_t most = min(MAX_PREFILL_ROWS, MAX_PREFILL_FLOATS / (problem.write.head_dim + problem.write.v_head_dim));
  const int64_t wanted = round_up(total / TARGET_PREFILL_TASKS - ROWS_MULTIPLE / 2, ROWS_MULTIPLE);
  return max(PREFILL_ROWS, min(most / ROWS_MULTIPLE * ROWS_MULTIPLE, wanted));
}

// Keys of each split, so that `total` keys in all make about `target` splits of at least `least` keys.
int64_t keys_per_split(const AttentionProblem& problem, int64_t keys, int64_t total, int64_t target, int64_t least) {
  const int64_t split_keys = problem.num_splits > 0 ? max<int64_t>(1, divide_up(keys, problem.num_splits))
                                                    : max(least, divide_up(total, target));
  return round_up(split_keys, SPLIT_MULTIPLE);
}

}  // namespace

bool Plan::build(int64_t threads) {
  const CacheWrite& write = problem.write;
  int64_t decode_keys = 0, decode_sequences = 0, all_prefill_rows = 0, prefill_tasks = 0;
  for (int64_t b = 0; b < write.batch_size; b++) {
    const Sequence sequence = sequence_of(problem, b);
    const int64_t q_end = problem.cu_seqlens_q ? problem.cu_seqlens_q[b + 1] : sequence.q_begin + sequence.seqlen_q;
    const bool used = sequence.seqused_k >= 0 && sequence.seqlen_q;
    const int64_t keys = used ? sequence.kv_range(problem, {0, sequence.seqlen_q}).size() : 0;
    write_empty_rows(problem, b, {sequence.q_begin + (keys ? sequence.seqlen_q : 0), q_end});
    if (!keys) continue;
    if (!sequences.append(sequence)) return false;
    if (is_decode(problem, sequence)) {
      decode_keys += keys;
      decode_sequences++;
    } else {
      const int64_t rows = sequence.seqlen_q * problem.group();
      all_prefill_rows += rows * write.kv_heads;
      prefill_tasks += divide_up(rows, PREFILL_ROWS) * write.kv_heads;
    }
  }
  if (problem.cu_seqlens_q) write_empty_rows(problem, 0, {problem.cu_seqlens_q[write.batch_size], problem.q_tokens});

  for (int64_t s = 0; s < sequences.size(); s++) {
    const Range keys = sequences[s].kv_range(problem, {0, sequences[s].seqlen_q});
    if (is_decode(problem, sequences[s])) {
      const int64_t split_keys =
          keys_per_split(problem, keys.size(), decode_keys, TARGET_DECODE_TASKS, MIN_DECODE_KEYS);
      int64_t head_groups = 1;
      if (split_keys >= keys.size()) {
        const int64_t bytes = keys.size() * write.token_bytes();
        head_groups = min(min(write.kv_heads, divide_up(SHORT_TASKS_PER_THREAD * threads, decode_sequences)),
                          max<int64_t>(1, bytes / MIN_GROUP_BYTES));
      }
      if (!add_decode(s, keys, split_keys, head_groups)) return false;
    } else {
      const int64_t splits = divide_up(TARGET_PREFILL_TASKS, prefill_tasks);
      const int64_t split_keys = splits == 1 && problem.num_splits == 0
                                     ? keys.size()
                                     : keys_per_split(problem, keys.size(), keys.size(), splits, MIN_PREFILL_KEYS);
      if (!add_prefill(s, keys, split_keys, rows_per_task(problem, all_prefill_rows))) return false;
    }
  }
  return true;
}

bool Plan::add_decode(int64_t s, Range keys, int64_t split_keys, int64_t head_groups) {
  const int64_t kv_heads = problem.write.kv_heads, rows = sequences[s].seqlen_q * problem.group();
  const int64_t splits = divide_up(keys.size(), split_keys);
  int64_t partial_row;
  if (!add_reduction(s, splits, &partial_row)) return false;
  for (int64_t split = 0; split < splits; split++) {
    const int64_t begin = keys.begin + split * split_keys;
    const Range of_split = {begin, min(keys.end, begin + split_keys)};
    const int64_t of_partials = splits == 1 ? -1 : partial_row + split * sequences[s].seqlen_q * problem.q_heads;
    for (int64_t g = 0; g < head_groups; g++) {
      const Range heads = {kv_heads * g / head_groups, kv_heads * (g + 1) / head_groups};
      if (!tasks.append({DECODE, s, heads, {0, rows}, of_split, of_partials})) return false;
    }
  }
  return true;
}

bool Plan::add_prefill(int64_t s, Range keys, int64_t split_keys, int64_t task_rows) {
  const Sequence& sequence = sequences[s];
  const int64_t group = problem.group(), rows = sequence.seqlen_q * group, splits = divide_up(keys.size(), split_keys);
  int64_t partial_row;
  if (!add_reduction(s, splits, &partial_row)) return false;
  // Under a causal mask the last rows see most keys: they go first.
  for (int64_t block = divide_up(rows, task_rows) - 1; block >= 0; block--) {
    const Range block_rows = {block * task_rows, min(rows, (block + 1) * task_rows)};
    prefill_rows = max(prefill_rows, block_rows.size());
    const Range seen = sequence.kv_range(problem, Range{block_rows.begin / group, (block_rows.end - 1) / group + 1});
    for (int64_t split = 0; split < splits; split++) {
      const int64_t begin = keys.begin + split * split_keys;
      const Range of_split = {max(seen.begin, begin), min(seen.end, begin + split_keys)};
      const int64_t of_partials = splits == 1 ? -1 : partial_row + split * sequence.seqlen_q * problem.q_heads;
      for (int64_t head = 0; head < problem.write.kv_heads; head++)
        if (!tasks.append({PREFILL, s, {head, head + 1}, block_rows, of_split, of_partials})) return false;
    }
  }
  return true;
}

// Sets partial_row to the first partial row of a sequence of so many splits, -1 if it is not split. False if memory ran out.
bool Plan::add_reduction(int64_t s, int64_t splits, int64_t* partial_row) {
  *partial_row = -1;
  if (splits == 1) return true;
  const int64_t rows = sequences[s].seqlen_q * problem.q_heads;
  *partial_row = partial_rows;
  if (!reductions.append({s, splits, partial_rows, reduced_rows})) return false;
  partial_rows += splits * rows;
  reduced_rows += rows;
  return true;
}

namespace {

int64_t rows_of(const AttentionProblem& problem, const Sequence& sequence) { return sequence.seqlen_q * problem.group(); }

// Keys that some rows of a sequence see.
Range keys_of(const AttentionProblem& problem, const Sequence& sequence, Range rows) {
  const int64_t group = problem.group();
  return sequence.kv_range(problem, Range{rows.begin / group, (rows.end - 1) / group + 1});
}

// The rows of a block of PREFILL_ROWS.
Range block_rows(const AttentionProblem& problem, const Sequence& sequence, int64_t block) {
  return {block * PREFILL_ROWS, min(rows_of(problem, sequence), (block + 1) * PREFILL_ROWS)};
}

// Scores of a KV head of a sequence, in whole blocks.
int64_t work_of(const AttentionProblem& problem, const Sequence& sequence) {
  int64_t work = 0;
  for (int64_t block = 0; block * PREFILL_ROWS < rows_of(problem, sequence); block++) {
    const Range rows = block_rows(problem, sequence, block);
    work += rows.size() * keys_of(problem, sequence, rows).size();
  }
  return work;
}

}  // namespace

// Rows are divided so that no task has much more than its share of all scores.
bool BackwardPlan::build() {
  const int64_t kv_heads = problem.write.kv_heads;
  int64_t total = 0;
  for (int64_t b = 0; b < problem.write.batch_size; b++) {
    const Sequence sequence = sequence_of(problem, b);
    const bool used = sequence.seqused_k >= 0 && sequence.seqlen_q;
    const Range seen = used ? sequence.kv_range(problem, Range{0, sequence.seqlen_q}) : Range{0, 0};
    if (!seen.size()) continue;
    if (!sequences.append({sequence, 0, 0, seen, keys})) return false;
    keys += seen.size();
    total += kv_heads * work_of(problem, sequence);
  }
  for (int64_t s = 0; s < sequences.size(); s++) {
    BackwardSequence& sequence = sequences[s];
    const int64_t work = work_of(problem, sequence), rows = rows_of(problem, sequence);
    const int64_t most = divide_up(work * TARGET_BACKWARD_TASKS, total);
    sequence.first_task = tasks.size();
    for (int64_t head = 0; head < kv_heads; head++) {
      int64_t done = 0, begin = 0, task = 1;
      for (int64_t block = 0; begin < rows; block++) {
        const Range of_block = block_rows(problem, sequence, block);
        done += of_block.size() * keys_of(problem, sequence, of_block).size();
        if (of_block.end < rows && done * most < work * task) continue;
        const Range of_task = {begin, of_block.end}, seen = keys_of(problem, sequence, of_task);
        if (!tasks.append({s, head, of_task, seen, partial_keys})) return false;
        partial_keys += seen.size() + PARTIAL_MULTIPLE;
        begin = of_block.end;
        task++;
      }
    }
    sequence.tasks = (tasks.size() - sequence.first_task) / kv_heads;
  }
  return true;
}

}  // namespace pagedflash
