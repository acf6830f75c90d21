// Work divided among threads that live as long as it takes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace megaswitch {

// Calls work(i) once for each i below `count`, from at most `threads` threads of which the caller
// is one. `numbers` is what all of it touches: little is not worth a thread. What work(i) leaves
// must not depend on who did it; it must not throw.
template <typename Work>
void parallel_for(uint64_t count, uint64_t numbers, unsigned threads, const Work& work) {
  constexpr uint64_t kWorthAThread = 1 << 17;  // some 100 µs, of which starting one takes 20
  const uint64_t most = std::min<uint64_t>(count, numbers / kWorthAThread);
  const uint64_t used = std::max<uint64_t>(1, std::min<uint64_t>(most, threads));
  const auto part = [&](uint64_t thread) {
    const uint64_t end = count * (thread + 1) / used;
    for (uint64_t i = count * thread / used; i < end; ++i) work(i);
  };
  std::vector<std::thread> others;
  for (uint64_t thread = 1; thread < used; ++thread) others.emplace_back(part, thread);
  part(0);
  for (std::thread& other : others) other.join();
}

}  // namespace megaswitch
