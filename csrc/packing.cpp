#include "packing.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>
#include <set>
#include <stdexcept>
#include <tuple>

#include "bus_guard.h"

namespace megaswitch {

namespace {

// Position, in values of eight bytes, of the fields of a file of rows.
constexpr uint64_t kKeyAt = 1;
constexpr uint64_t kPiecesAt = 5;
constexpr uint64_t kClassesAt = 6;
constexpr uint64_t kCountsAt = 7;

// Scrambles a value (the finaliser of SplitMix64), so that sums tell sets apart.
uint64_t scramble(uint64_t x) {
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
  x = (x ^ x >> 27) * 0x94D049BB133111EBu;
  return x ^ x >> 31;
}

// Calls f with every piece in the corpus's order.
template <typename Function>
void for_each_piece(const Pieces& pieces, Function f) {
  const uint64_t documents = pieces.documents();
  if (documents > uint64_t{1} << (64 - Piece::kPartBits)) {
    throw DataError("a corpus of " + std::to_string(documents) +
                    " documents is more than rows can name (2^40). Split it.");
  }
  for (uint64_t document = 0; document < documents; ++document) {
    const uint64_t parts = pieces.parts(document);
    if (parts > uint64_t{1} << Piece::kPartBits) {
      throw DataError("document " + std::to_string(document) + " fills " + std::to_string(parts) +
                      " rows, more than rows can name (2^24). Split it.");
    }
    for (uint64_t part = 0; part < parts; ++part) f(Piece{document, part});
  }
}

// The pieces waiting to be packed together.
class Window {
 public:
  explicit Window(const RowShape& shape) : shape_(shape) {}

  bool full() const { return pieces_.size() == kPackWindow; }
  void add(uint64_t piece, Room room) {
    pieces_.push_back(piece);
    rooms_.push_back(room);
  }

  void pack(const EmitRow& emit) {
    by_falling_size();
    std::vector<std::vector<uint64_t>> rows;
    // Room left in encoder and decoder, then the row: the first that fits is the fullest.
    std::set<std::tuple<uint32_t, uint32_t, uint64_t>> open;
    for (const uint64_t index : order_) {
      const Room room = rooms_[index];
      auto best = open.lower_bound({room.encoder, 0, 0});
      while (best != open.end() && std::get<1>(*best) < room.decoder) ++best;
      uint32_t encoder_left = shape_.room.encoder;
      uint32_t decoder_left = shape_.room.decoder;
      uint64_t row = rows.size();
      if (best == open.end()) {
        rows.emplace_back();
      } else {
        std::tie(encoder_left, decoder_left, row) = *best;
        open.erase(best);
      }
      rows[row].push_back(pieces_[index]);
      open.insert({encoder_left - room.encoder, decoder_left - room.decoder, row});
    }
    for (auto& row : rows) {
      std::sort(row.begin(), row.end());
      emit(row);
    }
    pieces_.clear();
    rooms_.clear();
  }

 private:
  // By the larger of the shares of encoder and decoder; equals in the corpus's order.
  void by_falling_size() {
    order_.resize(pieces_.size());
    std::iota(order_.begin(), order_.end(), 0u);
    const auto size = [&](uint64_t i) {
      return std::max(uint64_t{rooms_[i].encoder} * shape_.room.decoder,
                      uint64_t{rooms_[i].decoder} * shape_.room.encoder);
    };
    std::stable_sort(order_.begin(), order_.end(),
                     [&](uint64_t a, uint64_t b) { return size(a) > size(b); });
  }

  RowShape shape_;
  std::vector<uint64_t> pieces_;
  std::vector<Room> rooms_;
  std::vector<uint64_t> order_;
};

}  // namespace

void for_each_row(const Pieces& pieces, const RowShape& shape, const EmitRow& emit) {
  claim_bus_errors();
  Window window(shape);
  std::vector<uint64_t> single(1);
  for_each_piece(pieces, [&](const Piece& piece) {
    const Room room = pieces.room(piece);
    if (room.encoder > shape.room.encoder || room.decoder > shape.room.decoder) {
      throw std::invalid_argument("a piece that is larger than a row");
    }
    if (!shape.packed) {
      single[0] = piece.packed();
      emit(single);
      return;
    }
    window.add(piece.packed(), room);
    if (window.full()) window.pack(emit);
  });
  window.pack(emit);
  pieces.check_not_cut();
}

std::vector<uint64_t> count_rows(const Pieces& pieces, const RowShape& shape) {
  std::vector<uint64_t> counts;
  for_each_row(pieces, shape, [&](const std::vector<uint64_t>& row) {
    if (row.size() > counts.size()) counts.resize(row.size());
    ++counts[row.size() - 1];
  });
  return counts;
}

void write_rows(const Pieces& pieces, const RowShape& shape, const std::vector<uint64_t>& counts,
                uint64_t* out, uint64_t size) {
  std::vector<uint64_t> at(counts.size() + 1);  // where the next row of each class goes
  for (uint64_t k = 0; k < counts.size(); ++k) at[k + 1] = at[k] + counts[k] * (k + 1);
  std::vector<uint64_t> end(at.begin() + 1, at.end());
  if (at.back() != size) throw std::invalid_argument("counts that do not fit the buffer");
  for_each_row(pieces, shape, [&](const std::vector<uint64_t>& row) {
    const uint64_t k = row.size() - 1;
    if (k >= end.size() || end[k] - at[k] < row.size()) {
      throw DataError("the corpus changed while its rows were made. Start again.");
    }
    std::copy(row.begin(), row.end(), out + at[k]);
    at[k] += row.size();
  });
  at.pop_back();
  if (at != end) throw DataError("the corpus changed while its rows were made. Start again.");
}

RowIndex::RowIndex(const std::string& path, const std::string& key, const Pieces& pieces,
                   const RowShape& shape)
    : path_(path), file_(path) {
  claim_bus_errors();
  read_header(key);
  check_rows(pieces, shape);
  check_not_cut();
  file_.expect_random_access(true);
}

void RowIndex::refuse(const std::string& why) const {
  throw DataError("'" + path_ + "' cannot be used: " + why + ". It is damaged; delete it.");
}

uint64_t RowIndex::value(uint64_t position) const {
  uint64_t value;
  file_.copy(8 * position, sizeof value, &value);
  return value;
}

void RowIndex::read_header(const std::string& key) {
  const uint64_t values = file_.size() / 8;
  if (file_.size() % 8 != 0 || values < kCountsAt) {
    refuse("it has " + std::to_string(file_.size()) + " bytes, which no file of rows has");
  }
  std::array<char, 8 * kKeyAt + kKeyBytes> head;
  file_.copy(0, head.size(), head.data());
  if (std::memcmp(head.data(), kMagic, 8) != 0) refuse("it does not begin with MSROWS01");
  if (key.size() != kKeyBytes) throw std::invalid_argument("a key must have 32 bytes");
  if (std::memcmp(head.data() + 8 * kKeyAt, key.data(), kKeyBytes) != 0) {
    refuse("it was made for another corpus or other settings");
  }
  pieces_ = value(kPiecesAt);
  const uint64_t classes = value(kClassesAt);
  const uint64_t rest = values - kCountsAt;
  if (classes > rest || pieces_ != rest - classes) {
    refuse("its size does not fit " + std::to_string(pieces_) + " pieces in rows of up to " +
           std::to_string(classes));
  }
  body_ = kCountsAt + classes;
  uint64_t left = pieces_;
  for (uint64_t k = 0; k < classes; ++k) {
    const uint64_t rows = value(kCountsAt + k);
    classes_.push_back({rows_, pieces_ - left});
    // Dividing what is left instead of multiplying the count keeps forged counts from overflowing.
    if (rows > left / (k + 1)) {
      refuse("it names " + std::to_string(rows) + " rows of " + std::to_string(k + 1) +
             " pieces, more than it holds");
    }
    left -= rows * (k + 1);
    rows_ += rows;
  }
  if (left != 0) refuse(std::to_string(left) + " of its pieces belong to no row");
}

void RowIndex::check_rows(const Pieces& pieces, const RowShape& shape) {
  file_.expect_random_access(false);
  uint64_t found = 0;
  std::vector<Piece> row;
  for (uint64_t index = 0; index < rows_; ++index) {
    this->row(index, row);
    const std::string name = "row " + std::to_string(index);
    if (!shape.packed && row.size() > 1) refuse(name + " holds several documents");
    Room left = shape.room;
    for (const Piece& piece : row) {
      if (piece.document >= pieces.documents() || piece.part >= pieces.parts(piece.document)) {
        refuse(name + " names part " + std::to_string(piece.part) + " of document " +
               std::to_string(piece.document) + ", which the corpus has not");
      }
      const Room room = pieces.room(piece);
      if (room.encoder > left.encoder || room.decoder > left.decoder) {
        refuse(name + " is longer than the rows of this run");
      }
      left.encoder -= room.encoder;
      left.decoder -= room.decoder;
      found += scramble(piece.packed());
    }
    encoder_tokens_ += shape.room.encoder - left.encoder;
    decoder_tokens_ += shape.room.decoder - left.decoder;
  }
  uint64_t expected = 0;
  uint64_t count = 0;
  for_each_piece(pieces, [&](const Piece& piece) {
    expected += scramble(piece.packed());
    ++count;
  });
  if (count != pieces_ || found != expected) {
    refuse("not every part of every document is in one of its rows");
  }
  pieces.check_not_cut();
}

void RowIndex::row(uint64_t index, std::vector<Piece>& out) const {
  if (index >= rows_) throw std::out_of_range("no row " + std::to_string(index));
  // The last class that begins at or before the row; empty classes begin where the next one does.
  const auto after =
      std::upper_bound(classes_.begin(), classes_.end(), index,
                       [](uint64_t row, const Class& c) { return row < c.first_row; });
  const Class& own = *(after - 1);
  const uint64_t size = static_cast<uint64_t>(after - classes_.begin());
  const uint64_t first = own.first_piece + (index - own.first_row) * size;
  thread_local std::vector<uint64_t> packed;
  packed.resize(size);
  file_.copy(8 * (body_ + first), 8 * size, packed.data());
  out.clear();
  for (const uint64_t piece : packed) out.push_back(Piece::unpack(piece));
}

}  // namespace megaswitch
