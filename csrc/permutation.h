// A random order of [0, size) that can be asked for any position, in constant memory for large
// sizes. `KeyedPermutation` in `megaswitch/data/philox.py` is the readable twin.
#pragma once

#include <array>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include "philox.h"

namespace megaswitch {

class Permutation {
 public:
  // Requires 1 <= size <= 2^62; the caller checks.
  Permutation(uint64_t size, uint64_t seed, uint64_t epoch,
              Stream stream = Stream::kPermutation)
      : size_(size) {
    Random random(seed, epoch, stream);
    if (size < kFeistelFrom) {
      shuffle(random);
      return;
    }
    unsigned bits = 0;
    while ((size - 1) >> bits) ++bits;
    column_bits_ = bits / 2;
    rows_ = ((size - 1) >> column_bits_) + 1;
    for (uint64_t& key : keys_) key = random.next64();
  }

  // The element at `position` < size.
  uint64_t operator()(uint64_t position) const {
    if (!table_.empty()) return table_[position];
    // The grid rows x columns exceeds size by less than one row; walking the cycle until it
    // re-enters [0, size) keeps the map a bijection there.
    do {
      position = encrypt(position);
    } while (position >= size_);
    return position;
  }

 private:
  // A Feistel network mixes tiny domains badly (at 5 elements even 8 rounds are not uniform).
  static constexpr uint64_t kFeistelFrom = uint64_t{1} << 16;
  static constexpr int kRounds = 8;  // 4 are visibly non-random at a thousand elements

  void shuffle(Random& random) {
    table_.resize(size_);
    std::iota(table_.begin(), table_.end(), 0u);
    for (uint32_t last = static_cast<uint32_t>(size_) - 1; last > 0; --last) {
      std::swap(table_[last], table_[random.below(last + 1)]);
    }
  }

  static uint64_t mix(uint64_t value, uint64_t key) {
    value = (value ^ key) * 0xBF58476D1CE4E5B9u;
    value ^= value >> 32;
    value *= 0x94D049BB133111EBu;
    return value >> 32;
  }

  // Feistel on Z_rows x {0,1}^column_bits: the rounds change the row and the column by turns.
  uint64_t encrypt(uint64_t position) const {
    const uint64_t columns_mask = (uint64_t{1} << column_bits_) - 1;
    uint64_t row = position >> column_bits_;
    uint64_t column = position & columns_mask;
    for (int round = 0; round < kRounds; round += 2) {
      row += mix(column, keys_[round]) * rows_ >> 32;  // rows <= 2^32: no overflow
      if (row >= rows_) row -= rows_;
      column ^= mix(row, keys_[round + 1]) & columns_mask;
    }
    return row << column_bits_ | column;
  }

  uint64_t size_;
  unsigned column_bits_ = 0;
  uint64_t rows_ = 0;
  std::array<uint64_t, kRounds> keys_{};
  std::vector<uint32_t> table_;
};

}  // namespace megaswitch
