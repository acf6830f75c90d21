// Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy
// as 1, 2, 3", SC 2011). A draw is a pure function of (seed, index, stream, block), so any sample
// can be produced anywhere in any order. `megaswitch/data/philox.py` is the readable twin.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

namespace megaswitch {

using PhiloxBlock = std::array<uint32_t, 4>;
using PhiloxKey = std::array<uint32_t, 2>;

// Third word of the counter: what the numbers are for. The values are part of the data order.
enum class Stream : uint32_t {
  kSpans = 0,
  kEpochOffset = 1,
  kPermutation = 2,
  kMixture = 3,  // 4 is Python's alone: seeds of a mixture's sources
};

inline PhiloxBlock philox4x32(PhiloxBlock counter, PhiloxKey key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * counter[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * counter[2];
    counter = {static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ key[0],
               static_cast<uint32_t>(product1),
               static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ key[1],
               static_cast<uint32_t>(product0)};
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return counter;
}

// The 2^34 numbers belonging to one (seed, index, stream).
class Random {
 public:
  Random(uint64_t seed, uint64_t index, Stream stream)
      : key_{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
        counter_{static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32),
                 static_cast<uint32_t>(stream), 0} {}

  uint32_t next() {
    if (used_ == ahead_.size()) refill();
    return ahead_[used_++];
  }

  uint64_t next64() {
    const uint64_t low = next();
    return low | uint64_t{next()} << 32;
  }

  // Uniform in [0, bound), bound >= 1, without bias (Lemire 2019: multiply, reject the short rest).
  uint32_t below(uint32_t bound) {
    uint64_t product = uint64_t{next()} * bound;
    if (static_cast<uint32_t>(product) < bound) {
      const uint32_t rest = -bound % bound;
      while (static_cast<uint32_t>(product) < rest) product = uint64_t{next()} * bound;
    }
    return static_cast<uint32_t>(product >> 32);
  }

 private:
  // Four blocks, which a processor computes side by side in little more than the time of one.
  void refill() {
    for (std::size_t at = 0; at < ahead_.size(); at += 4) {
      const PhiloxBlock block = philox4x32(counter_, key_);
      ++counter_[3];
      std::copy(block.begin(), block.end(), &ahead_[at]);
    }
    used_ = 0;
  }

  PhiloxKey key_;
  PhiloxBlock counter_;
  std::array<uint32_t, 16> ahead_;
  std::size_t used_ = 16;  // of them
};

}  // namespace megaswitch
