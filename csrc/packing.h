// Documents as pieces, and pieces as rows: which documents share a row is decided once, from
// lengths alone, and kept in a small file. `megaswitch/data/packing.py` is the readable twin.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "indexed.h"
#include "philox.h"
#include "span_corruption.h"

namespace megaswitch {

// Room in a row, or what a text takes of it: tokens, EOS included.
struct Room {
  uint32_t encoder;
  uint32_t decoder;
};

// A document, or the part of a long one that fills a row.
struct Piece {
  static constexpr unsigned kPartBits = 24;

  uint64_t document;  // below 2^40
  uint64_t part;      // below 2^24

  uint64_t packed() const { return document << kPartBits | part; }
  static Piece unpack(uint64_t value) {
    return {value >> kPartBits, value & ((uint64_t{1} << kPartBits) - 1)};
  }
};

// Scratch space of one thread.
struct PieceScratch {
  SpanScratch spans;
  std::vector<int32_t> ids;
};

// A corpus cut into pieces, and how a piece becomes an encoder and a decoder text.
class Pieces {
 public:
  virtual ~Pieces() = default;

  virtual uint64_t documents() const = 0;
  // Pieces of a document; 0 if it is too short to be of use.
  virtual uint64_t parts(uint64_t document) const = 0;
  // The most room that a piece takes; both at least 1.
  virtual Room room(const Piece& piece) const = 0;
  // Write both texts, each with its EOS; returns what they took. Throws DataError at a bad id.
  virtual Room write(const Piece& piece, Random& random, PieceScratch& scratch, int32_t* encoder,
                     int32_t* targets) const = 0;
  virtual void prefetch(const Piece& piece) const = 0;
  // Throws DataError if a file was cut since it was opened.
  virtual void check_not_cut() const = 0;
};

// Size of the rows, and whether several documents may share one.
struct RowShape {
  Room room;
  bool packed;
};

// Pieces that are packed together; rows never reach over the end of such a window.
constexpr uint64_t kPackWindow = 4096;

using EmitRow = std::function<void(const std::vector<uint64_t>& pieces)>;

// Calls `emit` with the pieces (`Piece::packed`, ascending) of every row. The pieces of a window
// go, by falling size, into the fullest row that they fit. Throws DataError where a document has
// too many parts or there are too many documents.
void for_each_row(const Pieces& pieces, const RowShape& shape, const EmitRow& emit);

// How many rows hold 1, 2, 3, ... pieces.
std::vector<uint64_t> count_rows(const Pieces& pieces, const RowShape& shape);

// Write the pieces of all rows: those of one piece first, then those of two, ... `counts` is what
// `count_rows` gave, `size` how many values `out` has room for.
void write_rows(const Pieces& pieces, const RowShape& shape, const std::vector<uint64_t>& counts,
                uint64_t* out, uint64_t size);

// A file of rows, opened and checked in full: its rows fit, and each piece is in one of them.
//
// Little-endian u64: magic, key[4], pieces P, classes C, rows[C] (rows of 1, 2, ... C pieces), then
// P pieces, row by row. As rows of equally many pieces lie together, none needs to be pointed at.
class RowIndex {
 public:
  static constexpr char kMagic[9] = "MSROWS01";
  static constexpr uint64_t kKeyBytes = 32;

  // Throws DataError saying what is wrong. `key` names content and settings.
  RowIndex(const std::string& path, const std::string& key, const Pieces& pieces,
           const RowShape& shape);

  uint64_t rows() const { return rows_; }
  uint64_t pieces() const { return pieces_; }
  // Tokens in encoder and decoder of all rows, at most: what is not padding.
  uint64_t encoder_tokens() const { return encoder_tokens_; }
  uint64_t decoder_tokens() const { return decoder_tokens_; }

  // Replace `out` by the pieces of a row.
  void row(uint64_t index, std::vector<Piece>& out) const;
  void check_not_cut() const { file_.check_not_cut(); }

 private:
  struct Class {
    uint64_t first_row;
    uint64_t first_piece;
  };

  [[noreturn]] void refuse(const std::string& why) const;
  uint64_t value(uint64_t position) const;
  void read_header(const std::string& key);
  void check_rows(const Pieces& pieces, const RowShape& shape);

  std::string path_;
  MappedFile file_;
  uint64_t rows_ = 0;
  uint64_t pieces_ = 0;
  uint64_t encoder_tokens_ = 0;
  uint64_t decoder_tokens_ = 0;
  uint64_t body_ = 0;            // position, in values, of the first piece
  std::vector<Class> classes_;  // entry k: of rows of k + 1 pieces
};

}  // namespace megaswitch
