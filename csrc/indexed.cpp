#include "indexed.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <limits>

#include "bus_guard.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the files are little-endian");

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

constexpr uint64_t kWindow = 4096;  // tokens, or entries of the index, copied in one piece
// Magics of fairseq's other formats; the one that shares Megatron's is told apart by its size.
constexpr const char* kFairseqMagics[] = {"TNTIDX", "HUFFIDX"};

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

MappedFile::MappedFile(const std::string& path, Access access) : path_(path), access_(access) {
  // Not blocking: the path may be a pipe that nobody writes to.
  descriptor_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (descriptor_ < 0) {
    throw DataError("cannot open " + quoted(path) + ": " + std::strerror(errno) +
                    ". A corpus is named by its prefix: the path of its two files without .bin "
                    "and .idx, as `megaswitch preprocess` printed it.");
  }
  struct stat status {};
  int error = ::fstat(descriptor_, &status) == 0 ? 0 : errno;
  if (error == 0 && !S_ISREG(status.st_mode)) error = EINVAL;
  if (error == 0) size_ = static_cast<uint64_t>(status.st_size);
  if (error == 0 && is_mapped() && size_ > 0) {  // an empty file cannot be mapped, nor need it be
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
                    "one that does, or set data.access='pread'.");
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

void MappedFile::copy(uint64_t start, uint64_t bytes, void* to) const {
  if (start > size_ || bytes > size_ - start) throw std::logic_error("a read beyond a file");
  if (bytes == 0) return;
  const bool read = is_mapped() ? copy_mapped(to, data_ + start, bytes) : pread_all(start, bytes, to);
  if (!read) refuse_read(start, bytes);
}

bool MappedFile::pread_all(uint64_t start, uint64_t bytes, void* to) const {
  auto* out = static_cast<unsigned char*>(to);
  while (bytes > 0) {
    const ssize_t got = ::pread(descriptor_, out, bytes, static_cast<off_t>(start));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    out += got;
    start += static_cast<uint64_t>(got);
    bytes -= static_cast<uint64_t>(got);
  }
  return true;
}

void MappedFile::refuse_read(uint64_t start, uint64_t bytes) const {
  check_not_cut();
  throw DataError(quoted(path_) + " cannot be read in bytes [" + std::to_string(start) + ", " +
                  std::to_string(start + bytes) +
                  "): its disk or file system failed, or it was cut for a moment. Check the "
                  "storage, then start again.");
}

// Advice changes speed, never results, so a kernel that does not take it is no error. Asked of the
// file it costs half of what it does of the mapping, and threads do not wait for each other.
void MappedFile::prefetch(uint64_t start, uint64_t bytes) const {
  ::posix_fadvise(descriptor_, static_cast<off_t>(start), static_cast<off_t>(bytes),
                  POSIX_FADV_WILLNEED);
}

void MappedFile::expect_random_access(bool random) const {
  if (!is_mapped()) {
    ::posix_fadvise(descriptor_, 0, 0, random ? POSIX_FADV_RANDOM : POSIX_FADV_SEQUENTIAL);
    return;
  }
  if (data_ == nullptr) return;
  ::madvise(const_cast<unsigned char*>(data_), size_, random ? MADV_RANDOM : MADV_SEQUENTIAL);
}

void MappedFile::release() const {
  if (data_ != nullptr) ::madvise(const_cast<unsigned char*>(data_), size_, MADV_DONTNEED);
}

IndexedTokens::IndexedTokens(const std::string& prefix, Access access)
    : prefix_(prefix), idx_(prefix + ".idx"), bin_(prefix + ".bin", access) {
  begin_visits();
  read_header();
  check_sequences();
  check_documents();
  check_not_cut();
  idx_.release();
  // Samples are scattered: default read-ahead would fetch a hundred times what one needs.
  bin_.expect_random_access(true);
}

void IndexedTokens::begin_visits() const { claim_bus_errors(); }

void IndexedTokens::check_not_cut() const {
  idx_.check_not_cut();
  bin_.check_not_cut();
}

void IndexedTokens::refuse_index(const std::string& why) const {
  throw DataError(quoted(prefix_ + ".idx") + " cannot be used: " + why +
                  ". The file is damaged or not a Megatron index; copy it again from its source "
                  "or run `megaswitch preprocess` again.");
}

void IndexedTokens::read_header() {
  const uint64_t size = idx_.size();
  const auto has = [&](const std::string& field, const auto& value, const std::string& rule) {
    refuse_index("its " + field + " is " + std::to_string(value) + " and must be " + rule);
  };
  std::array<unsigned char, kHeaderBytes> header{};
  idx_.copy(0, std::min<uint64_t>(size, kHeaderBytes), header.data());
  const auto count_at = [&](uint64_t byte) {
    uint64_t value;
    std::memcpy(&value, header.data() + byte, sizeof value);
    return value;
  };
  const auto refuse_fairseq = [&] {
    throw DataError(quoted(prefix_ + ".idx") +
                    " is a fairseq index, which has no document boundaries; the Megatron format "
                    "is needed. Write the corpus again with `megaswitch preprocess`.");
  };
  for (const char* magic : kFairseqMagics) {
    if (std::memcmp(header.data(), magic, std::strlen(magic)) == 0) refuse_fairseq();
  }
  if (size < kFairseqHeaderBytes) has("size", size, "at least the 34 bytes of its header");
  if (std::memcmp(header.data(), kMagic, sizeof kMagic) != 0) {
    refuse_index("its magic, the first 9 bytes, must be MMIDIDX and two zeros, and is not");
  }
  if (count_at(kVersionAt) != 1) has("version", count_at(kVersionAt), "1");

  num_sequences_ = count_at(kSequencesAt);
  // Dividing the size instead of multiplying the count keeps forged counts from overflowing.
  const uint64_t after_fairseq = size - kFairseqHeaderBytes;
  if (after_fairseq % kBytesPerSequence == 0 &&
      after_fairseq / kBytesPerSequence == num_sequences_) {
    refuse_fairseq();
  }
  type_ = static_cast<TokenType>(header[kTypeAt]);
  token_bytes_ = bytes_of(type_);
  if (token_bytes_ == 0) {
    has("token type code", header[kTypeAt],
        "1 (uint8), 3 (int16), 4 (int32), 5 (int64) or 8 (uint16)");
  }
  if (size < kHeaderBytes) has("size", size, "at least the 34 bytes of its header");
  const uint64_t boundaries = count_at(kDocumentsAt);
  const uint64_t body = size - kHeaderBytes;
  if (num_sequences_ > body / kBytesPerSequence) {
    has("sequence count", num_sequences_,
        "at most what its " + std::to_string(size) + " bytes can hold");
  }
  const uint64_t rest = body - num_sequences_ * kBytesPerSequence;
  if (boundaries == 0) has("document boundary count", boundaries, "at least 1");
  if (boundaries <= rest / 8 && rest - boundaries * 8 == num_sequences_ && num_sequences_ > 0) {
    throw DataError(quoted(prefix_ + ".idx") +
                    " is a multimodal index (it holds a mode per sequence); only text is trained "
                    "on. Write the text alone with `megaswitch preprocess`.");
  }
  if (rest % 8 != 0 || rest / 8 != boundaries) {
    has("size", size,
        "34 + 12 S + 8 D bytes for its sequence count S = " + std::to_string(num_sequences_) +
            " and document boundary count D = " + std::to_string(boundaries));
  }
  num_documents_ = boundaries - 1;
  offsets_at_ = kHeaderBytes + 4 * num_sequences_;
  documents_at_ = offsets_at_ + 8 * num_sequences_;
}

void IndexedTokens::check_sequences() {
  const uint64_t capacity = bin_.size() / token_bytes_;
  std::array<int32_t, kWindow> lengths;
  std::array<int64_t, kWindow> offsets;
  uint64_t total = 0;
  for (uint64_t i = 0; i < num_sequences_; ++i) {
    const uint64_t at = i % kWindow;
    if (at == 0) {
      const uint64_t count = std::min(kWindow, num_sequences_ - i);
      idx_.copy(kHeaderBytes + 4 * i, 4 * count, lengths.data());
      idx_.copy(offsets_at_ + 8 * i, 8 * count, offsets.data());
    }
    const auto has = [&](const char* field, int64_t value, const std::string& rule) {
      refuse_index(field + (" of sequence " + std::to_string(i)) + " is " + std::to_string(value) +
                   " and must be " + rule);
    };
    if (lengths[at] < 0) has("the length", lengths[at], "at least 0");
    if (offsets[at] < 0 || static_cast<uint64_t>(offsets[at]) != total * token_bytes_) {
      has("the byte offset", offsets[at],
          std::to_string(total * token_bytes_) + ", where the sequence before ends");
    }
    if (static_cast<uint64_t>(lengths[at]) > capacity - total) {
      has("the length", lengths[at],
          "at most " + std::to_string(capacity - total) + ", as the .bin of " +
              std::to_string(bin_.size()) + " bytes ends there");
    }
    total += static_cast<uint64_t>(lengths[at]);
  }
  if (total * token_bytes_ != bin_.size()) {
    refuse_index("the sum of its sequence lengths is " + std::to_string(total * token_bytes_) +
                 " bytes and must be the size of the .bin, " + std::to_string(bin_.size()) +
                 " bytes, so the two files do not belong together or one is cut off");
  }
  num_tokens_ = total;
}

void IndexedTokens::check_documents() const {
  std::array<int64_t, kWindow> boundaries;
  int64_t previous = 0;
  for (uint64_t i = 0; i <= num_documents_; ++i) {
    const uint64_t at = i % kWindow;
    if (at == 0) {
      const uint64_t count = std::min(kWindow, num_documents_ + 1 - i);
      idx_.copy(documents_at_ + 8 * i, 8 * count, boundaries.data());
    }
    const auto has = [&](const std::string& rule) {
      refuse_index("document boundary " + std::to_string(i) + " is sequence " +
                   std::to_string(boundaries[at]) + " and must be " + rule);
    };
    if (i == 0 && boundaries[at] != 0) has("0");
    if (boundaries[at] < previous || static_cast<uint64_t>(boundaries[at]) > num_sequences_) {
      has("in [" + std::to_string(previous) + ", " + std::to_string(num_sequences_) + "]");
    }
    previous = boundaries[at];
    if (i == num_documents_ && static_cast<uint64_t>(previous) != num_sequences_) {
      has(std::to_string(num_sequences_) + ", the number of sequences, as it is the last");
    }
  }
}

void IndexedTokens::check_range(uint64_t start, uint64_t count, uint64_t size,
                                const char* of) const {
  if (start > size || count > size - start) {
    throw std::out_of_range(of + (" [" + std::to_string(start)) + ", +" + std::to_string(count) +
                            ") of " + std::to_string(size) + " in " + quoted(prefix_));
  }
}

uint64_t IndexedTokens::sequence_start(uint64_t index) const {
  if (index == num_sequences_) return num_tokens_;
  int64_t offset;
  idx_.copy(offsets_at_ + 8 * index, sizeof offset, &offset);
  return static_cast<uint64_t>(offset) / token_bytes_;
}

TokenSpan IndexedTokens::document(uint64_t index) const {
  check_range(index, 1, num_documents_, "document");
  std::array<uint64_t, 2> sequences;
  idx_.copy(documents_at_ + 8 * index, sizeof sequences, sequences.data());
  if (sequences[0] <= sequences[1] && sequences[1] <= num_sequences_) {
    const uint64_t start = sequence_start(sequences[0]);
    const uint64_t end = sequence_start(sequences[1]);
    if (start <= end && end <= num_tokens_) return {start, end - start};
  }
  idx_.check_not_cut();
  refuse_index("document " + std::to_string(index) + " must be as it was, and changed while open");
}

void IndexedTokens::document_lengths(uint64_t first, uint64_t count, int64_t* out) const {
  check_range(first, count, num_documents_, "document");
  begin_visits();
  for (uint64_t i = 0; i < count; ++i) out[i] = static_cast<int64_t>(document(first + i).count);
  check_not_cut();
}

void IndexedTokens::sequence_lengths(uint64_t first, uint64_t count, int64_t* out) const {
  check_range(first, count, num_sequences_, "sequence");
  begin_visits();
  std::array<int32_t, kWindow> lengths;
  for (uint64_t done = 0; done < count; done += kWindow) {
    const uint64_t now = std::min(kWindow, count - done);
    idx_.copy(kHeaderBytes + 4 * (first + done), 4 * now, lengths.data());
    std::copy_n(lengths.data(), now, out + done);
  }
  check_not_cut();
}

void IndexedTokens::document_starts(uint64_t first, uint64_t count, int64_t* out) const {
  check_range(first, count, num_documents_ + 1, "document boundary");
  begin_visits();
  idx_.copy(documents_at_ + 8 * first, 8 * count, out);
  check_not_cut();
}

void IndexedTokens::read(uint64_t start, uint64_t count, int64_t* out) const {
  check_range(start, count, num_tokens_, "token");
  begin_visits();
  for (uint64_t done = 0; done < count; done += kWindow) {
    const uint64_t now = std::min(kWindow, count - done);
    visit(start + done, now, [&](const auto* tokens) { std::copy_n(tokens, now, out + done); });
  }
  check_not_cut();
}

void IndexedTokens::prefetch(uint64_t start, uint64_t count) const {
  check_range(start, count, num_tokens_, "token");
  bin_.prefetch(start * token_bytes_, count * token_bytes_);
}

std::pair<int64_t, int64_t> IndexedTokens::id_range(uint64_t budget) const {
  std::pair<int64_t, int64_t> range{std::numeric_limits<int64_t>::max(),
                                    std::numeric_limits<int64_t>::min()};
  const auto scan = [&](uint64_t start, uint64_t count) {
    visit(start, count, [&](const auto* tokens) { widen_range(tokens, count, range); });
  };
  begin_visits();
  if (num_tokens_ <= budget) {
    bin_.expect_random_access(false);
    for (uint64_t at = 0; at < num_tokens_; at += kWindow) {
      scan(at, std::min(kWindow, num_tokens_ - at));
    }
    bin_.expect_random_access(true);
  } else {
    const uint64_t windows = std::max<uint64_t>(budget / kWindow, 1);
    const uint64_t stride = num_tokens_ / windows;
    const uint64_t count = std::min(kWindow, stride);
    for (uint64_t i = 0; i < windows; ++i) prefetch(i * stride, count);
    for (uint64_t i = 0; i < windows; ++i) scan(i * stride, count);
  }
  check_not_cut();
  bin_.release();
  return range;
}

}  // namespace megaswitch
