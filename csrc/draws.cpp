#include "draws.h"

#include "parallel.h"

// Products of 64 bits are what a draw takes: with AVX-512 it is three times as fast. Which clone is
// right turns out when the program is loaded, before sanitizers can bear it.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12 && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define MEGASWITCH_CLONES __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define MEGASWITCH_CLONES
#endif

namespace megaswitch {

namespace {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;

MEGASWITCH_CLONES void draw_row(uint64_t counter, uint64_t columns, float* out) {
  for (uint64_t column = 0; column < columns; ++column) {
    uint64_t x = counter + column * kGolden;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    // SplitMix64 ends by x ^ (x >> 31), which leaves the upper bits as they are.
    out[column] = static_cast<float>(static_cast<int32_t>(x >> 40)) * 0x1p-24f;
  }
}

}  // namespace

void draw(const int64_t* keys, uint64_t rows, int64_t first, uint64_t columns, unsigned threads,
          float* out) {
  const uint64_t start = (static_cast<uint64_t>(first) + 1) * kGolden;
  parallel_for(rows, rows * columns, threads, [=](uint64_t row) {
    draw_row(static_cast<uint64_t>(keys[row]) + start, columns, out + row * columns);
  });
}

}  // namespace megaswitch
