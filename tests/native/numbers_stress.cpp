// Draws and Adafactor's updates by one thread and by several, for sanitizers: the same bits.
#include <cstdio>
#include <vector>

#include "adafactor.h"
#include "draws.h"

using namespace megaswitch;

namespace {

std::vector<float> drawn(uint64_t rows, uint64_t columns, unsigned threads) {
  std::vector<int64_t> keys(rows);
  for (uint64_t i = 0; i < rows; ++i) keys[i] = static_cast<int64_t>(i * 0x9E3779B97F4A7C15u);
  std::vector<float> out(rows * columns);
  draw(keys.data(), rows, -7, columns, threads, out.data());
  return out;
}

std::vector<float> updated(uint64_t slices, uint64_t rows, uint64_t columns, unsigned threads) {
  std::vector<float> p = drawn(slices * rows, columns, 1);
  const std::vector<float> g = drawn(slices * rows, columns, threads);
  std::vector<float> row(slices * rows);
  std::vector<float> column(slices * columns);
  const AdafactorStep step{0.01, 0.5, 1.0, 1e-30, 1e-3, 0.9, true};
  for (int i = 0; i < 3; ++i) {
    adafactor(p.data(), g.data(), row.data(), column.data(), slices, rows, columns, step, threads);
  }
  p.insert(p.end(), row.begin(), row.end());
  p.insert(p.end(), column.begin(), column.end());
  return p;
}

}  // namespace

int main() {
  const uint64_t shapes[][3] = {{1, 1, 1}, {7, 300, 100}, {1, 5000, 97}, {3, 65, 1030}};
  for (const auto& [slices, rows, columns] : shapes) {
    const std::vector<float> alone = updated(slices, rows, columns, 1);
    for (const unsigned threads : {2u, 3u, 8u}) {
      if (updated(slices, rows, columns, threads) != alone) {
        std::printf("other bits by %u threads\n", threads);
        return 1;
      }
    }
  }
  std::puts("done");
}
