// Work divided among threads that live as long as it takes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace megaswitch {

// Calls work(i) once for each i below `count`, from at most `threads` threads of which the caller
// is one; where the system gives no more, from fewer. `numbers` is what all of it touches: little is
// not worth a thread. What work(i) leaves must not depend on who did it; it must not throw.
template <typename Work>
void parallel_for(uint64_t count, uint64_t numbers, unsigned threads, const Work& work) {
  constexpr uint64_t kWorthAThread = 1 << 17;  // some 100 µs, of which starting one takes 20
  const uint64_t most = std::min<uint64_t>(count, numbers / kWorthAThread);
  const uint64_t parts = std::max<uint64_t>(1, std::min<uint64_t>(most, threads));
  const auto run = [&](uint64_t first, uint64_t last) {
    const uint64_t end = count * last / parts;
    for (uint64_t i = count * first / parts; i < end; ++i) work(i);
  };
  std::vector<std::thread> others;
  others.reserve(parts - 1);
  uint64_t mine = parts;  // parts from this one on are others'
  try {
    for (; mine > 1; --mine) others.emplace_back(run, mine - 1, mine);
  } catch (const std::system_error&) {
  }
  run(0, mine);
  for (std::thread& other : others) other.join();
}

}  // namespace megaswitch
