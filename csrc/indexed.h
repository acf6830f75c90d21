// Reader of Megatron's `.bin/.idx` token files. Everything a file says is checked at open; every
// later access is checked against the mapped sizes once more.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

namespace megaswitch {

// A file that cannot be used, in words for the user.
class DataError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A whole file mapped read-only.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const unsigned char* data() const { return data_; }
  uint64_t size() const { return size_; }

  // Tell the kernel that [start, start + bytes) is needed soon.
  void prefetch(uint64_t start, uint64_t bytes) const;
  // Switch the kernel's read-ahead of the whole file: scattered samples or one long scan.
  void expect_random_access(bool random) const;
  // Throws DataError if the file is now shorter than it was when it was mapped.
  void check_not_cut() const;

 private:
  std::string path_;
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
  explicit IndexedTokens(const std::string& prefix);

  const std::string& prefix() const { return prefix_; }
  TokenType type() const { return type_; }
  uint64_t num_tokens() const { return num_tokens_; }
  uint64_t num_documents() const { return num_documents_; }

  TokenSpan document(uint64_t index) const;

  // Widen tokens [start, start + count) into `out`.
  void read(uint64_t start, uint64_t count, int64_t* out) const;
  void prefetch(uint64_t start, uint64_t count) const;
  // Throws DataError if the .bin was cut since it was opened.
  void check_not_cut() const { bin_.check_not_cut(); }

  // Smallest and largest id: of all tokens when there are at most `budget`, otherwise of evenly
  // spaced windows holding about that many. Requires a token.
  std::pair<int64_t, int64_t> id_range(uint64_t budget) const;

  // Calls f with a typed pointer to token `start`, of which `count` may be read.
  template <typename Function>
  auto visit(uint64_t start, uint64_t count, Function f) const {
    check_range(start, count);
    const unsigned char* at = bin_.data() + start * token_bytes_;
    switch (type_) {
      case TokenType::kUint8: return f(at);
      case TokenType::kInt16: return f(reinterpret_cast<const int16_t*>(at));
      case TokenType::kInt32: return f(reinterpret_cast<const int32_t*>(at));
      case TokenType::kInt64: return f(reinterpret_cast<const int64_t*>(at));
      case TokenType::kUint16: return f(reinterpret_cast<const uint16_t*>(at));
    }
    throw std::logic_error("a token type that open() did not let through");
  }

 private:
  // The arrays of an .idx start at odd addresses, so every value is copied out.
  template <typename Value>
  Value index_value(uint64_t byte) const {
    Value value;
    std::memcpy(&value, idx_.data() + byte, sizeof value);
    return value;
  }

  void read_header();
  void check_sequences();
  void check_documents() const;
  void check_range(uint64_t start, uint64_t count) const;
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
