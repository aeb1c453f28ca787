// Dropout: which probabilities are dropped, by Philox 4x32-10, as ../../dropout.py says.
#pragma once

#include "sequence.h"
#include "vec.h"

namespace pagedflash {
namespace PAGEDFLASH_ISA {

// What the counters of a packed-GQA row have in common.
struct DropoutRow {
  uint32_t query, head, batch;
};

class Dropout {
 public:
  explicit Dropout(const AttentionProblem& problem)
      : threshold_((uint32_t)problem.dropout_threshold), scale_((float)problem.dropout_scale) {
    if (!drops()) return;
    seed_[0] = (uint32_t)*problem.dropout_seed;
    seed_[1] = (uint32_t)(*problem.dropout_seed >> 32);
  }

  PAGEDFLASH_INLINE bool drops() const { return threshold_ != 0; }

  // Factors of the probabilities of a row and keys `first` to `first + count`, and on to a whole vector: 0, or the scale. Returns
  // where in `buffer`, of factors_size(count), the first of them lies.
  const float* factors(float* buffer, const DropoutRow& row, int64_t first, int64_t count) const {
    const int64_t begin = first / BLOCK_KEYS * BLOCK_KEYS;
    for (int64_t key = begin; key < first + round_up(count, LANES); key += BLOCK_KEYS) fill_block(buffer + (key - begin), row, key);
    return buffer + (first - begin);
  }
  static constexpr int64_t factors_size(int64_t count) { return count + 2 * BLOCK_KEYS; }

 private:
  static constexpr int64_t COUNTERS = 16, BLOCK_KEYS = 4 * COUNTERS;  // that the compiler makes vectors of

  void fill_block(float* to, const DropoutRow& row, int64_t key) const {
    uint32_t a[COUNTERS], b[COUNTERS], c[COUNTERS], d[COUNTERS];
    for (int i = 0; i < COUNTERS; i++) {
      a[i] = (uint32_t)(key / 4 + i);
      b[i] = row.query;
      c[i] = row.head;
      d[i] = row.batch;
    }
    uint32_t low = seed_[0], high = seed_[1];
    for (int round = 0; round < 10; round++) {
      for (int i = 0; i < COUNTERS; i++) {
        const uint64_t first = (uint64_t)a[i] * 0xD2511F53, second = (uint64_t)c[i] * 0xCD9E8D57;
        a[i] = (uint32_t)(second >> 32) ^ b[i] ^ low;
        b[i] = (uint32_t)second;
        c[i] = (uint32_t)(first >> 32) ^ d[i] ^ high;
        d[i] = (uint32_t)first;
      }
      low += 0x9E3779B9;
      high += 0xBB67AE85;
    }
    const auto factor = [&](uint32_t word) { return word >> 1 < threshold_ ? 0.0f : scale_; };
    for (int i = 0; i < COUNTERS; i++) {
      to[4 * i] = factor(a[i]);
      to[4 * i + 1] = factor(b[i]);
      to[4 * i + 2] = factor(c[i]);
      to[4 * i + 3] = factor(d[i]);
    }
  }

  const uint32_t threshold_;
  const float scale_;
  uint32_t seed_[2] = {0, 0};
};

}  // namespace PAGEDFLASH_ISA
}  // namespace pagedflash
