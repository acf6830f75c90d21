// Loaders made, used, forked from and dropped at all moments, to be run under a sanitizer.
// Usage: loader_stress PREFIX [fork]
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <exception>
#include <memory>
#include <vector>

#include "loader.h"
#include "mixture.h"
#include "span_corruption.h"

using namespace megaswitch;
using std::chrono::milliseconds;

namespace {

constexpr int kRows = 16;
constexpr unsigned kAhead = 8;
constexpr int64_t kBadBatch = 20;  // has a negative index

std::shared_ptr<const Sampler> mixture(const char* prefix, Access access) {
  const auto tokens = std::make_shared<IndexedTokens>(prefix, access);
  const SpanLayout layout{568, 85, 28, 513, 115, 32128, true};
  std::vector<std::shared_ptr<const Sampler>> sources;
  for (uint64_t i = 0; i < 5; ++i) {
    sources.push_back(
        std::make_shared<SpanSampler>(tokens, layout, i, 32128, 50 + 100 * i, 1, true));
  }
  const std::vector<MixtureSegment> segments{{0, {200, 200, 200, 200, 200}},
                                             {777, {1000, 0, 0, 0, 0}},
                                             {1500, {10, 20, 30, 40, 900}}};
  return std::make_shared<MixtureSampler>(sources,
                                          std::make_shared<MixtureOrder>(1, 1000, segments));
}

bool child_is_refused(Loader& loader) {
  const pid_t child = ::fork();
  if (child == 0) {
    std::exception_ptr error;
    try {
      loader.next(milliseconds(1), error);
    } catch (const DataError&) {
      ::_exit(0);
    }
    ::_exit(1);
  }
  int status = 0;
  return ::waitpid(child, &status, 0) == child && status == 0;
}

bool one_loader(const std::shared_ptr<const Sampler>& sampler, int round, bool forks) {
  std::vector<std::vector<int32_t>> pool(kAhead, std::vector<int32_t>(kRows * (513 + 2 * 115)));
  Loader loader(sampler, 1 + static_cast<unsigned>(round) % 4, kAhead);  // gone before its buffers
  int64_t submitted = 0;
  const auto submit = [&] {
    int32_t* const at = pool[submitted % kAhead].data();
    int64_t indices[kRows];
    for (int row = 0; row < kRows; ++row) indices[row] = submitted * kRows + row;
    if (submitted++ == kBadBatch) indices[3] = -1;
    loader.submit(indices, kRows, {at, at + kRows * 513, at + kRows * 628, nullptr, nullptr});
  };
  for (unsigned i = 0; i < kAhead; ++i) submit();
  const int taken = 10 + 5 * round;
  int errors = 0;
  for (int i = 0; i < taken; ++i) {
    std::exception_ptr error;
    while (!loader.next(milliseconds(10), error)) {
    }
    errors += error != nullptr;
    submit();
  }
  return errors == (taken > kBadBatch ? 1 : 0) && (!forks || child_is_refused(loader));
}

}  // namespace

int main(int arguments, char** values) {
  for (const Access access : {Access::kMmap, Access::kPread}) {
    const auto sampler = mixture(values[1], access);
    for (int round = 0; round < 30; ++round) {
      if (!one_loader(sampler, round, arguments > 2)) {
        std::printf("round %d went wrong\n", round);
        return 1;
      }
    }
  }
  std::puts("done");
}
