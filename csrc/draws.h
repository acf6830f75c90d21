// Counter-based draws for jitter and dropout: `megaswitch/layers/noise.py` says what they are of.
#pragma once

#include <cstdint>

namespace megaswitch {

// Fills out [rows, columns] with uniform draws in [0, 1): SplitMix64 of key + element · golden for
// elements first + 1, first + 2, …, of which the upper 24 bits are kept.
void draw(const int64_t* keys, uint64_t rows, int64_t first, uint64_t columns, unsigned threads,
          float* out);

}  // namespace megaswitch
