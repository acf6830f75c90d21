// What is fuzzed: opening an .idx/.bin pair and every read of it, before and after a file is cut.
// The functions are libFuzzer's, so that it can drive them too; driver.cpp needs no clang.
//
// An input is four u32 (bytes of the .idx, where to cut, two arguments of reads), the .idx and the
// .bin. Beside crashes, a finding is whatever contradicts the plain reader below: a pair that is
// accepted or refused wrongly, or a value that is read wrongly and not refused.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../indexed.h"

namespace {

using megaswitch::DataError;
using megaswitch::IndexedTokens;
using Bytes = std::vector<uint8_t>;

struct Input {
  uint32_t cut = 0;  // 0: none; else bit 0 is the file and the rest its new size, modulo the old
  uint32_t first = 0;
  uint32_t count = 0;
  Bytes idx;
  Bytes bin;
};

constexpr size_t kFront = 16;
constexpr size_t kLengthsAt = 34;

#define REQUIRE(condition)                                                      \
  do {                                                                          \
    if (!(condition)) {                                                         \
      std::fprintf(stderr, "finding: line %d: %s\n", __LINE__, #condition);     \
      std::abort();                                                             \
    }                                                                           \
  } while (false)

template <typename Value>
Value value_at(const Bytes& bytes, size_t at) {
  Value value;
  std::memcpy(&value, bytes.data() + at, sizeof value);
  return value;
}

template <typename Value>
void append(Bytes& bytes, Value value) {
  const auto* const at = reinterpret_cast<const uint8_t*>(&value);
  bytes.insert(bytes.end(), at, at + sizeof value);
}

Input parse(const uint8_t* data, size_t size) {
  Input input;
  if (size < kFront) return input;
  uint32_t front[4];
  std::memcpy(front, data, kFront);
  const size_t idx = std::min<size_t>(front[0], size - kFront);
  input.cut = front[1];
  input.first = front[2];
  input.count = front[3];
  input.idx.assign(data + kFront, data + kFront + idx);
  input.bin.assign(data + kFront + idx, data + size);
  return input;
}

Bytes packed(const Input& input) {
  Bytes bytes;
  append(bytes, static_cast<uint32_t>(input.idx.size()));
  append(bytes, input.cut);
  append(bytes, input.first);
  append(bytes, input.count);
  bytes.insert(bytes.end(), input.idx.begin(), input.idx.end());
  bytes.insert(bytes.end(), input.bin.begin(), input.bin.end());
  return bytes;
}

// What the pair holds, read without thought of speed.
struct Plain {
  bool valid = false;
  std::vector<int64_t> tokens, lengths, documents;  // documents: starts, and the end
};

size_t bytes_of(uint8_t code) {
  return code == 1 ? 1 : code == 3 || code == 8 ? 2 : code == 4 ? 4 : code == 5 ? 8 : 0;
}

int64_t token_at(const Bytes& bin, uint8_t code, size_t i) {
  switch (code) {
    case 1: return bin[i];
    case 3: return value_at<int16_t>(bin, 2 * i);
    case 4: return value_at<int32_t>(bin, 4 * i);
    case 5: return value_at<int64_t>(bin, 8 * i);
    default: return value_at<uint16_t>(bin, 2 * i);
  }
}

Plain read_plainly(const Input& input) {
  Plain plain;
  const Bytes& idx = input.idx;
  if (idx.size() < kLengthsAt || std::memcmp(idx.data(), "MMIDIDX\0\0", 9) != 0) return plain;
  const size_t width = bytes_of(idx[17]);
  const auto sequences = value_at<uint64_t>(idx, 18);
  const auto boundaries = value_at<uint64_t>(idx, 26);
  if (value_at<uint64_t>(idx, 9) != 1 || width == 0 || boundaries == 0) return plain;
  if (sequences > idx.size() || boundaries > idx.size()) return plain;
  if (idx.size() != kLengthsAt + 12 * sequences + 8 * boundaries) return plain;
  uint64_t total = 0;
  for (uint64_t i = 0; i < sequences; ++i) {
    const auto length = value_at<int32_t>(idx, kLengthsAt + 4 * i);
    const auto offset = value_at<uint64_t>(idx, kLengthsAt + 4 * sequences + 8 * i);
    if (length < 0 || offset != total * width) return plain;
    total += static_cast<uint64_t>(length);
    plain.lengths.push_back(length);
  }
  if (total * width != input.bin.size()) return plain;
  for (uint64_t i = 0; i < boundaries; ++i) {
    const auto start = value_at<int64_t>(idx, kLengthsAt + 12 * sequences + 8 * i);
    if (start < (i == 0 ? 0 : plain.documents.back())) return plain;
    plain.documents.push_back(start);
  }
  if (plain.documents.front() != 0) return plain;
  if (plain.documents.back() != static_cast<int64_t>(sequences)) return plain;
  for (uint64_t i = 0; i < total; ++i) plain.tokens.push_back(token_at(input.bin, idx[17], i));
  plain.valid = true;
  return plain;
}

// Every read returns what the plain reader found; or throws DataError, which is for the caller.
void compare(const IndexedTokens& tokens, const Plain& plain, const Input& input) {
  const uint64_t sequences = plain.lengths.size();
  const uint64_t documents = plain.documents.size() - 1;
  REQUIRE(tokens.num_tokens() == plain.tokens.size());
  REQUIRE(tokens.num_sequences() == sequences);
  REQUIRE(tokens.num_documents() == documents);
  std::vector<int64_t> found(sequences);
  tokens.sequence_lengths(0, sequences, found.data());
  REQUIRE(found == plain.lengths);
  found.resize(documents + 1);
  tokens.document_starts(0, documents + 1, found.data());
  REQUIRE(found == plain.documents);
  found.resize(documents);
  tokens.document_lengths(0, documents, found.data());
  uint64_t end = 0;
  for (uint64_t i = 0; i < documents; ++i) {
    const megaswitch::TokenSpan span = tokens.document(i);
    tokens.check_not_cut();
    REQUIRE(span.start == end && static_cast<int64_t>(span.count) == found[i]);
    end += span.count;
  }
  REQUIRE(end == plain.tokens.size());
  found.resize(plain.tokens.size());
  tokens.read(0, found.size(), found.data());
  REQUIRE(found == plain.tokens);
  if (!found.empty()) {
    const auto [low, high] = std::minmax_element(found.begin(), found.end());
    REQUIRE(tokens.id_range(found.size()) == std::make_pair(*low, *high));
    const auto [some_low, some_high] = tokens.id_range(input.first % found.size());
    REQUIRE(*low <= some_low && some_low <= some_high && some_high <= *high);
  }
  // Anywhere, also beyond the end, by every way that takes a range.
  const auto ranged = [&](auto read, const std::vector<int64_t>& all) {
    std::vector<int64_t> out(input.count);
    try {
      read(input.first, input.count, out.data());
    } catch (const std::out_of_range&) {
      REQUIRE(uint64_t{input.first} + input.count > all.size());
      return;
    }
    REQUIRE(std::equal(out.begin(), out.end(), all.begin() + input.first));
  };
  using Numbers = int64_t*;
  ranged([&](uint64_t at, uint64_t n, Numbers out) { tokens.read(at, n, out); }, plain.tokens);
  ranged([&](uint64_t at, uint64_t n, Numbers out) { tokens.sequence_lengths(at, n, out); },
         plain.lengths);
  ranged([&](uint64_t at, uint64_t n, Numbers out) { tokens.document_starts(at, n, out); },
         plain.documents);
}

void write_file(const std::string& path, const Bytes& bytes) {
  const int file = ::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
  if (file < 0 || ::write(file, bytes.data(), bytes.size()) < 0) std::perror("fuzz");
  ::close(file);
}

const std::string& prefix() {
  static const std::string path = [] {
    std::string name = std::string(std::getenv("TMPDIR") ? std::getenv("TMPDIR") : "/tmp");
    name += "/fuzz-XXXXXX";
    if (::mkdtemp(name.data()) == nullptr) std::perror("fuzz"), std::exit(1);
    return name + "/c";
  }();
  return path;
}

// A valid pair of random shape.
Input generate(std::mt19937& random) {
  const auto below = [&](uint32_t n) { return static_cast<uint32_t>(random() % n); };
  constexpr uint8_t kCodes[] = {1, 3, 4, 5, 8};
  Input input;
  const uint8_t code = kCodes[below(5)];
  const uint32_t width = static_cast<uint32_t>(bytes_of(code));
  const uint32_t sequences = below(8) == 0 ? below(9000) : below(12);
  const uint32_t longest = below(4) == 0 ? 12'000 / (sequences + 1) + 1 : 9;
  std::vector<int64_t> offsets;
  std::vector<int64_t> documents{0};
  std::vector<int32_t> lengths;
  int64_t total = 0;
  for (uint32_t i = 0; i < sequences; ++i) {
    offsets.push_back(total * width);
    lengths.push_back(static_cast<int32_t>(below(longest)));
    total += lengths.back();
    while (below(3) == 0) documents.push_back(i);
  }
  documents.push_back(sequences);
  const char magic[9] = {'M', 'M', 'I', 'D', 'I', 'D', 'X', 0, 0};
  input.idx.assign(magic, magic + 9);
  append(input.idx, uint64_t{1});
  append(input.idx, code);
  append(input.idx, uint64_t{sequences});
  append(input.idx, uint64_t{documents.size()});
  for (const int32_t value : lengths) append(input.idx, value);
  for (const int64_t value : offsets) append(input.idx, value);
  for (const int64_t value : documents) append(input.idx, value);
  for (int64_t i = 0; i < total * width; ++i) input.bin.push_back(static_cast<uint8_t>(random()));
  return input;
}

// Replaces one field of the index by a value that is likely to be mistaken.
void change_field(Input& input, std::mt19937& random) {
  Bytes& idx = input.idx;
  if (idx.size() < kLengthsAt) return;
  const auto sequences = std::min<uint64_t>(value_at<uint64_t>(idx, 18), idx.size() / 12);
  const auto boundaries = std::min<uint64_t>(value_at<uint64_t>(idx, 26), idx.size() / 8);
  const uint64_t field = random() % 7;
  size_t at = field == 0 ? random() % 9 : field == 1 ? 9 : field == 2 ? 17 : field == 3 ? 18 : 26;
  size_t width = field == 0 || field == 2 ? 1 : 8;
  if (field == 4 && sequences > 0) at = kLengthsAt + 4 * (random() % sequences), width = 4;
  if (field == 5 && sequences > 0) at = kLengthsAt + 4 * sequences + 8 * (random() % sequences);
  if (field == 6 && boundaries > 0) at = kLengthsAt + 12 * sequences + 8 * (random() % boundaries);
  if (at + width > idx.size()) return;
  uint64_t value = 0;
  std::memcpy(&value, idx.data() + at, width);
  constexpr int kShifts[] = {0, 7, 15, 16, 31, 32, 60, 61, 63};
  switch (random() % 5) {
    case 0: value += random() % 9 - 4; break;
    case 1: value = (uint64_t{1} << kShifts[random() % 9]) - random() % 2; break;
    case 2: value = -static_cast<uint64_t>(random() % 17); break;
    case 3: value = random() % (idx.size() + 1); break;
    default: value ^= uint64_t{1} << (random() % (8 * width)); break;
  }
  std::memcpy(idx.data() + at, &value, width);
}

void resize(Bytes& bytes, std::mt19937& random) {
  const size_t change = random() % 3 == 0 ? random() % (bytes.size() + 1) : random() % 20;
  const bool shrink = random() % 2 == 0;
  bytes.resize(shrink ? bytes.size() - std::min(change, bytes.size()) : bytes.size() + change);
}

}  // namespace

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t most, unsigned seed) {
  std::mt19937 random(seed);
  Input input = parse(data, size);
  if (input.idx.empty() || random() % 16 == 0) input = generate(random);
  for (uint32_t changes = random() % 3; changes-- > 0;) {
    Bytes& file = random() % 2 == 0 ? input.idx : input.bin;
    switch (random() % 8) {
      case 0: resize(file, random); break;
      case 1:
        for (uint32_t n = random() % 8; n-- > 0 && !file.empty();) {
          file[random() % file.size()] = static_cast<uint8_t>(random());
        }
        break;
      default: change_field(input, random); break;
    }
  }
  if (random() % 2 == 0) input.cut = static_cast<uint32_t>(random() >> (random() % 20));
  input.first = static_cast<uint32_t>(random() >> (random() % 32));
  input.count = static_cast<uint32_t>(random() % 5000 >> random() % 12);
  const Bytes bytes = packed(input);
  if (bytes.size() > most) return std::min(size, most);
  std::copy(bytes.begin(), bytes.end(), data);
  return bytes.size();
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input input = parse(data, size);
  input.count = std::min<uint32_t>(input.count, 1 << 16);  // memory that a caller would provide
  const Plain plain = read_plainly(input);
  write_file(prefix() + ".idx", input.idx);
  write_file(prefix() + ".bin", input.bin);
  try {
    const IndexedTokens tokens(prefix());
    REQUIRE(plain.valid);
    try {
      compare(tokens, plain, input);
    } catch (const DataError&) {
      REQUIRE(!"whole files were refused");
    }
    if (input.cut == 0) return 0;
    const bool of_index = input.cut % 2 == 0;
    const size_t before = of_index ? input.idx.size() : input.bin.size();
    const std::string path = prefix() + (of_index ? ".idx" : ".bin");
    const size_t after = (input.cut >> 1) % (before + 1);
    if (::truncate(path.c_str(), static_cast<off_t>(after)) != 0) std::perror("fuzz");
    bool refused = false;
    try {
      compare(tokens, plain, input);
    } catch (const DataError&) {
      refused = true;
    }
    REQUIRE(refused == (after < before));
  } catch (const DataError&) {
    REQUIRE(!plain.valid);
  }
  return 0;
}
