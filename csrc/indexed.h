// Reader of Megatron's `.bin/.idx` token files. Everything a file says is checked at open, and
// again at every later access, as files may change. Bytes are copied out of the mapping before they
// are looked at: what was checked is what is used, and a file cut meanwhile is an error.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace megaswitch {

// A file that cannot be used, in words for the user.
class DataError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// How the tokens of a corpus are read: through a mapping, or by pread(), which parallel file
// systems serve better, and which answers a failing disk or a cut file with an error, not SIGBUS.
enum class Access { kMmap, kPread };

// A whole file opened read-only, and mapped unless it is read by pread().
class MappedFile {
 public:
  explicit MappedFile(const std::string& path, Access access = Access::kMmap);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  uint64_t size() const { return size_; }
  bool is_mapped() const { return access_ == Access::kMmap; }

  // Copies bytes [start, start + bytes), which must lie in the file as it was opened. Throws
  // DataError where the file has lost them.
  void copy(uint64_t start, uint64_t bytes, void* to) const;

  // Tell the kernel that [start, start + bytes) is needed soon.
  void prefetch(uint64_t start, uint64_t bytes) const;
  // Switch the kernel's read-ahead of the whole file: scattered samples or one long scan.
  void expect_random_access(bool random) const;
  // Count the pages read so far no longer as memory of this process; the kernel keeps them cached.
  void release() const;
  // Throws DataError if the file is now shorter than it was when it was mapped. Called *after*
  // reading: behind a cut, the rest of the last page reads as zeros, and only this tells.
  void check_not_cut() const;

 private:
  bool pread_all(uint64_t start, uint64_t bytes, void* to) const;
  [[noreturn]] void refuse_read(uint64_t start, uint64_t bytes) const;

  std::string path_;
  Access access_;
  int descriptor_ = -1;
  const unsigned char* data_ = nullptr;
  uint64_t size_ = 0;
};

enum class TokenType : uint8_t { kUint8 = 1, kInt16 = 3, kInt32 = 4, kInt64 = 5, kUint16 = 8 };

// Tokens [start, start + count) of the flat stream.
struct TokenSpan {
  uint64_t start;
  uint64_t count;
};

class IndexedTokens {
 public:
  // Opens `prefix`.idx and `prefix`.bin; throws DataError naming the first thing that is wrong.
  explicit IndexedTokens(const std::string& prefix, Access access = Access::kMmap);

  const std::string& prefix() const { return prefix_; }
  TokenType type() const { return type_; }
  uint64_t num_tokens() const { return num_tokens_; }
  uint64_t num_sequences() const { return num_sequences_; }
  uint64_t num_documents() const { return num_documents_; }

  TokenSpan document(uint64_t index) const;
  // Tokens of documents [first, first + count).
  void document_lengths(uint64_t first, uint64_t count, int64_t* out) const;
  // Tokens of sequences [first, first + count).
  void sequence_lengths(uint64_t first, uint64_t count, int64_t* out) const;
  // First sequences of documents [first, first + count); that of document `num_documents` is
  // the number of sequences.
  void document_starts(uint64_t first, uint64_t count, int64_t* out) const;

  // Widen tokens [start, start + count) into `out`.
  void read(uint64_t start, uint64_t count, int64_t* out) const;
  void prefetch(uint64_t start, uint64_t count) const;

  // Every series of visits stands between these two: the first makes sure that bytes which are gone
  // do not end the process, the second throws DataError if a file was cut meanwhile.
  void begin_visits() const;
  void check_not_cut() const;

  // Smallest and largest id: of all tokens when there are at most `budget`, otherwise of evenly
  // spaced windows holding about that many. Requires a token.
  std::pair<int64_t, int64_t> id_range(uint64_t budget) const;

  // Calls f with a typed pointer to a copy of tokens [start, start + count), which lasts until the
  // next visit in this thread. Meant for a sample, not for a corpus.
  template <typename Function>
  auto visit(uint64_t start, uint64_t count, Function f) const {
    check_range(start, count, num_tokens_, "token");
    switch (type_) {
      case TokenType::kUint8: return f(fetch<uint8_t>(start, count));
      case TokenType::kInt16: return f(fetch<int16_t>(start, count));
      case TokenType::kInt32: return f(fetch<int32_t>(start, count));
      case TokenType::kInt64: return f(fetch<int64_t>(start, count));
      case TokenType::kUint16: return f(fetch<uint16_t>(start, count));
    }
    throw std::logic_error("a token type that open() did not let through");
  }

 private:
  template <typename Token>
  const Token* fetch(uint64_t start, uint64_t count) const {
    thread_local std::vector<Token> copy;
    if (copy.size() < count) copy.resize(count);
    bin_.copy(start * sizeof(Token), count * sizeof(Token), copy.data());
    return copy.data();
  }

  void read_header();
  void check_sequences();
  void check_documents() const;
  void check_range(uint64_t start, uint64_t count, uint64_t size, const char* of) const;
  uint64_t sequence_start(uint64_t index) const;
  [[noreturn]] void refuse_index(const std::string& why) const;

  std::string prefix_;
  MappedFile idx_;
  MappedFile bin_;
  TokenType type_{};
  uint64_t token_bytes_ = 0;
  uint64_t num_tokens_ = 0;
  uint64_t num_sequences_ = 0;
  uint64_t num_documents_ = 0;
  uint64_t offsets_at_ = 0;    // byte in .idx where the sequences' byte offsets start
  uint64_t documents_at_ = 0;  // byte in .idx where the document boundaries start
};

}  // namespace megaswitch
