#include "indexed.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <limits>
#include <type_traits>

namespace megaswitch {

namespace {

// Layout of .idx, little-endian and packed: magic 9, version u64, type u8, S u64, D u64, then
// i32[S] lengths, i64[S] byte offsets, i64[D] document boundaries (D = documents + 1).
constexpr char kMagic[9] = {'M', 'M', 'I', 'D', 'I', 'D', 'X', 0, 0};
constexpr uint64_t kVersionAt = 9;
constexpr uint64_t kTypeAt = 17;
constexpr uint64_t kSequencesAt = 18;
constexpr uint64_t kDocumentsAt = 26;
constexpr uint64_t kFairseqHeaderBytes = 26;  // fairseq's older format has no document array
constexpr uint64_t kHeaderBytes = 34;
constexpr uint64_t kBytesPerSequence = 12;

constexpr uint64_t kWindow = 4096;  // tokens read in one piece when ids are only sampled

std::string quoted(const std::string& path) { return "'" + path + "'"; }

uint64_t bytes_of(TokenType type) {
  switch (type) {
    case TokenType::kUint8: return 1;
    case TokenType::kInt16:
    case TokenType::kUint16: return 2;
    case TokenType::kInt32: return 4;
    case TokenType::kInt64: return 8;
  }
  return 0;  // int8, the float types and unknown codes
}

template <typename Token>
void widen_range(const Token* tokens, uint64_t count, std::pair<int64_t, int64_t>& range) {
  Token low = tokens[0];
  Token high = tokens[0];
  for (uint64_t i = 1; i < count; ++i) {
    low = std::min(low, tokens[i]);
    high = std::max(high, tokens[i]);
  }
  range.first = std::min<int64_t>(range.first, low);
  range.second = std::max<int64_t>(range.second, high);
}

}  // namespace

MappedFile::MappedFile(const std::string& path) : path_(path) {
  descriptor_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor_ < 0) {
    throw DataError("cannot open " + quoted(path) + ": " + std::strerror(errno) +
                    ". A corpus is named by its prefix: the path of its two files without .bin "
                    "and .idx, as `megaswitch preprocess` printed it.");
  }
  struct stat status {};
  int error = ::fstat(descriptor_, &status) == 0 ? 0 : errno;
  if (error == 0 && !S_ISREG(status.st_mode)) error = EINVAL;
  if (error == 0 && status.st_size > 0) {  // an empty file cannot be mapped, and need not be
    size_ = static_cast<uint64_t>(status.st_size);
    void* mapped = ::mmap(nullptr, size_, PROT_READ, MAP_SHARED, descriptor_, 0);
    if (mapped == MAP_FAILED) {
      error = errno;
    } else {
      data_ = static_cast<const unsigned char*>(mapped);
    }
  }
  if (error != 0) {
    ::close(descriptor_);
    throw DataError("cannot map " + quoted(path) + " into memory: " + std::strerror(error) +
                    ". It must be a regular file on a file system that supports mmap; copy it to "
                    "one that does.");
  }
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<unsigned char*>(data_), size_);
  ::close(descriptor_);
}

// The descriptor, not the path, is asked: a file replaced by renaming leaves the mapping whole.
void MappedFile::check_not_cut() const {
  struct stat status {};
  if (::fstat(descriptor_, &status) == 0 && static_cast<uint64_t>(status.st_size) >= size_) return;
  throw DataError(quoted(path_) + " had " + std::to_string(size_) +
                  " bytes when it was opened and now has " + std::to_string(status.st_size) +
                  ". A corpus in use must not be overwritten in place; put the file back and start "
                  "again.");
}

// Advice changes speed, never results, so a kernel that does not take it is no error.
void MappedFile::prefetch(uint64_t start, uint64_t bytes) const {
  static const uint64_t page = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
  const uint64_t first = start / page * page;
  ::madvise(const_cast<unsigned char*>(data_) + first, start + bytes - first, MADV_WILLNEED);
}

void MappedFile::expect_random_access(bool random) const {
  if (data_ == nullptr) return;
  ::madvise(const_cast<unsigned char*>(data_), size_, random ? MADV_RANDOM : MADV_SEQUENTIAL);
}

IndexedTokens::IndexedTokens(const std::string& prefix)
    : prefix_(prefix), idx_(prefix + ".idx"), bin_(prefix + ".bin") {
  read_header();
  check_sequences();
  check_documents();
  // Samples are scattered: default read-ahead would fetch a hundred times what one needs.
  bin_.expect_random_access(true);
}

void IndexedTokens::refuse_index(const std::string& why) const {
  throw DataError(quoted(prefix_ + ".idx") + " cannot be used: " + why +
                  ". The file is damaged or not a Megatron index; copy it again from its source "
                  "or run `megaswitch preprocess` again.");
}

void IndexedTokens::read_header() {
  const uint64_t size = idx_.size();
  if (size < kFairseqHeaderBytes) {
    refuse_index("it has " + std::to_string(size) + " bytes, fewer than its header");
  }
  if (std::memcmp(idx_.data(), kMagic, sizeof kMagic) != 0) {
    refuse_index("it does not begin with MMIDIDX");
  }
  const auto version = index_value<uint64_t>(kVersionAt);
  if (version != 1) refuse_index("its version is " + std::to_string(version) + " and must be 1");

  num_sequences_ = index_value<uint64_t>(kSequencesAt);
  // Dividing the size instead of multiplying the count keeps forged counts from overflowing.
  const uint64_t after_fairseq = size - kFairseqHeaderBytes;
  if (after_fairseq % kBytesPerSequence == 0 &&
      after_fairseq / kBytesPerSequence == num_sequences_) {
    throw DataError(quoted(prefix_ + ".idx") +
                    " is a fairseq index, which has no document boundaries; the Megatron format "
                    "is needed. Write the corpus again with `megaswitch preprocess`.");
  }
  const auto code = index_value<uint8_t>(kTypeAt);
  type_ = static_cast<TokenType>(code);
  token_bytes_ = bytes_of(type_);
  if (token_bytes_ == 0) {
    refuse_index("its token type code is " + std::to_string(code) +
                 " and must be 1 (uint8), 3 (int16), 4 (int32), 5 (int64) or 8 (uint16)");
  }
  if (size < kHeaderBytes) refuse_index("it ends within its header");
  const uint64_t boundaries = index_value<uint64_t>(kDocumentsAt);
  const uint64_t body = size - kHeaderBytes;
  if (num_sequences_ > body / kBytesPerSequence) {
    refuse_index("it names " + std::to_string(num_sequences_) + " sequences, more than its " +
                 std::to_string(size) + " bytes can hold");
  }
  const uint64_t rest = body - num_sequences_ * kBytesPerSequence;
  if (boundaries == 0) refuse_index("it has no document boundaries");
  if (boundaries <= rest / 8 && rest - boundaries * 8 == num_sequences_ && num_sequences_ > 0) {
    throw DataError(quoted(prefix_ + ".idx") +
                    " is a multimodal index (it holds a mode per sequence); only text is trained "
                    "on. Write the text alone with `megaswitch preprocess`.");
  }
  if (rest % 8 != 0 || rest / 8 != boundaries) {
    refuse_index("its size of " + std::to_string(size) + " bytes does not fit " +
                 std::to_string(num_sequences_) + " sequences and " + std::to_string(boundaries) +
                 " document boundaries");
  }
  num_documents_ = boundaries - 1;
  offsets_at_ = kHeaderBytes + 4 * num_sequences_;
  documents_at_ = offsets_at_ + 8 * num_sequences_;
}

void IndexedTokens::check_sequences() {
  const uint64_t capacity = bin_.size() / token_bytes_;
  uint64_t total = 0;
  for (uint64_t i = 0; i < num_sequences_; ++i) {
    const auto length = index_value<int32_t>(kHeaderBytes + 4 * i);
    const auto offset = index_value<int64_t>(offsets_at_ + 8 * i);
    if (length < 0) {
      refuse_index("sequence " + std::to_string(i) + " has length " + std::to_string(length));
    }
    if (offset < 0 || static_cast<uint64_t>(offset) != total * token_bytes_) {
      refuse_index("sequence " + std::to_string(i) + " starts at byte " + std::to_string(offset) +
                   " of the .bin and must start at byte " + std::to_string(total * token_bytes_) +
                   ", where the one before ends");
    }
    total += static_cast<uint64_t>(length);  // at most capacity + 2^31: no overflow
    if (total > capacity) {
      refuse_index("sequence " + std::to_string(i) + " reaches beyond the end of the .bin (" +
                   std::to_string(bin_.size()) + " bytes)");
    }
  }
  if (total * token_bytes_ != bin_.size()) {
    refuse_index("it accounts for " + std::to_string(total * token_bytes_) +
                 " bytes of tokens but the .bin has " + std::to_string(bin_.size()) +
                 ", so the two files do not belong together or one is cut off");
  }
  num_tokens_ = total;
}

void IndexedTokens::check_documents() const {
  int64_t previous = 0;
  for (uint64_t i = 0; i <= num_documents_; ++i) {
    const auto boundary = index_value<int64_t>(documents_at_ + 8 * i);
    if (i == 0 && boundary != 0) {
      refuse_index("its documents begin at sequence " + std::to_string(boundary) + ", not at 0");
    }
    if (boundary < previous || static_cast<uint64_t>(boundary) > num_sequences_) {
      refuse_index("document boundary " + std::to_string(i) + " is sequence " +
                   std::to_string(boundary) + ", outside [" + std::to_string(previous) + ", " +
                   std::to_string(num_sequences_) + "]");
    }
    previous = boundary;
  }
  if (static_cast<uint64_t>(previous) != num_sequences_) {
    refuse_index("its documents end at sequence " + std::to_string(previous) + " of " +
                 std::to_string(num_sequences_));
  }
}

void IndexedTokens::check_range(uint64_t start, uint64_t count) const {
  if (start > num_tokens_ || count > num_tokens_ - start) {
    throw std::out_of_range("tokens [" + std::to_string(start) + ", +" + std::to_string(count) +
                            ") of " + std::to_string(num_tokens_) + " in " + quoted(prefix_));
  }
}

uint64_t IndexedTokens::sequence_start(uint64_t index) const {
  if (index == num_sequences_) return num_tokens_;
  return static_cast<uint64_t>(index_value<int64_t>(offsets_at_ + 8 * index)) / token_bytes_;
}

TokenSpan IndexedTokens::document(uint64_t index) const {
  if (index >= num_documents_) throw std::out_of_range("no document " + std::to_string(index));
  const auto first = static_cast<uint64_t>(index_value<int64_t>(documents_at_ + 8 * index));
  const auto end = static_cast<uint64_t>(index_value<int64_t>(documents_at_ + 8 * index + 8));
  if (first > end || end > num_sequences_) refuse_index("it changed while it was open");
  const uint64_t start = sequence_start(first);
  return {start, sequence_start(end) - start};
}

void IndexedTokens::read(uint64_t start, uint64_t count, int64_t* out) const {
  visit(start, count, [&](const auto* tokens) { std::copy_n(tokens, count, out); });
}

void IndexedTokens::prefetch(uint64_t start, uint64_t count) const {
  check_range(start, count);
  bin_.prefetch(start * token_bytes_, count * token_bytes_);
}

std::pair<int64_t, int64_t> IndexedTokens::id_range(uint64_t budget) const {
  std::pair<int64_t, int64_t> range{std::numeric_limits<int64_t>::max(),
                                    std::numeric_limits<int64_t>::min()};
  const auto scan = [&](uint64_t start, uint64_t count) {
    visit(start, count, [&](const auto* tokens) { widen_range(tokens, count, range); });
  };
  if (num_tokens_ <= budget) {
    bin_.expect_random_access(false);
    scan(0, num_tokens_);
    bin_.expect_random_access(true);
    return range;
  }
  const uint64_t windows = std::max<uint64_t>(budget / kWindow, 1);
  const uint64_t stride = num_tokens_ / windows;
  for (uint64_t i = 0; i < windows; ++i) {
    prefetch(i * stride, std::min(kWindow, stride));
  }
  for (uint64_t i = 0; i < windows; ++i) scan(i * stride, std::min(kWindow, stride));
  return range;
}

}  // namespace megaswitch
