// A small coverage-guided fuzzer for compilers without libFuzzer. The code under test is compiled
// with -fsanitize-coverage=trace-pc; an input that takes a new edge, or one much more often, is
// kept and mutated further.
//
//   driver --seconds N --seed S --finding FILE   fuzz; the input that fails is written to FILE
//   driver FILE...                               run inputs again
#include <sanitizer/common_interface_defs.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t most, unsigned seed);

namespace {

using Bytes = std::vector<uint8_t>;

constexpr size_t kMostBytes = 1 << 18;
constexpr size_t kEdges = 1 << 16;
uint8_t taken[kEdges];  // how often each edge was taken in this run
uint8_t known[kEdges];  // the orders of magnitude seen of each edge so far, a bit each
uintptr_t last_place = 0;

const Bytes* running = nullptr;
std::string finding_path;

// Called when a sanitizer ends the process, for failed requirements too (handle_abort).
void save_finding() {
  if (running == nullptr || finding_path.empty()) return;
  std::ofstream(finding_path, std::ios::binary)
      .write(reinterpret_cast<const char*>(running->data()),
             static_cast<std::streamsize>(running->size()));
}

void run(const Bytes& input) {
  std::memset(taken, 0, sizeof taken);
  last_place = 0;
  running = &input;
  LLVMFuzzerTestOneInput(input.data(), input.size());
  running = nullptr;
}

bool is_new() {
  bool found = false;
  for (size_t i = 0; i < kEdges; ++i) {
    if (taken[i] == 0) continue;
    int magnitude = 0;
    while (taken[i] >> (magnitude + 1) != 0) ++magnitude;
    const auto bit = static_cast<uint8_t>(1 << magnitude);
    found |= (known[i] & bit) == 0;
    known[i] |= bit;
  }
  return found;
}

int fuzz(double seconds, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<Bytes> kept{{}};
  const auto start = std::chrono::steady_clock::now();
  const auto elapsed = [&] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  uint64_t runs = 0;
  for (; elapsed() < seconds; ++runs) {
    // Half of the time one of the newest, which lead further.
    const size_t newest = std::min<size_t>(kept.size(), 16);
    const size_t parent =
        random() % 2 == 0 ? kept.size() - 1 - random() % newest : random() % kept.size();
    Bytes input = kept[parent];
    const size_t size = input.size();
    input.resize(kMostBytes);
    input.resize(LLVMFuzzerCustomMutator(input.data(), size, kMostBytes,
                                         static_cast<unsigned>(random())));
    run(input);
    if (is_new()) kept.push_back(std::move(input));
  }
  const auto edges = kEdges - static_cast<size_t>(std::count(known, known + kEdges, 0));
  std::printf("no finding in %llu runs: %zu inputs kept, %zu edges\n",
              static_cast<unsigned long long>(runs), kept.size(), edges);
  return 0;
}

}  // namespace

extern "C" void __sanitizer_cov_trace_pc() {
  const auto place = reinterpret_cast<uintptr_t>(__builtin_return_address(0));
  uint8_t& count = taken[(place ^ last_place << 1) % kEdges];
  if (count < 255) ++count;
  last_place = place;
}

extern "C" const char* __asan_default_options() { return "handle_abort=1"; }

int main(int count, char** arguments) {
  double seconds = 0;
  unsigned seed = 0;
  __sanitizer_set_death_callback(save_finding);
  for (int i = 1; i < count; ++i) {
    const std::string word = arguments[i];
    const bool valued = word.rfind("--", 0) == 0 && i + 1 < count;
    if (valued && word == "--seconds") {
      seconds = std::atof(arguments[++i]);
    } else if (valued && word == "--seed") {
      seed = static_cast<unsigned>(std::atoi(arguments[++i]));
    } else if (valued && word == "--finding") {
      finding_path = arguments[++i];
    } else {
      std::ifstream file(word, std::ios::binary);
      run(Bytes(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()));
    }
  }
  return seconds > 0 ? fuzz(seconds, seed) : 0;
}
