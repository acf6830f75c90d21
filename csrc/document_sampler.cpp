#include "document_sampler.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#include "bus_guard.h"

namespace megaswitch {

Texts::Texts(std::shared_ptr<const IndexedTokens> tokens, bool ends_in_eos, int64_t vocab_size)
    : tokens_(std::move(tokens)), ends_in_eos_(ends_in_eos), vocab_size_(vocab_size) {
  if (vocab_size < 1 || vocab_size > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument("a vocabulary that 32 bits cannot number");
  }
}

uint64_t Texts::length(uint64_t document) const {
  const uint64_t count = tokens_->document(document).count;
  return ends_in_eos_ && count > 0 ? count - 1 : count;
}

void Texts::read(uint64_t document, uint64_t start, uint64_t count,
                 std::vector<int32_t>& out) const {
  const TokenSpan whole = tokens_->document(document);
  const uint64_t length = this->length(document);
  if (start > length || count > length - start) throw std::out_of_range("tokens of no document");
  const uint64_t first = whole.start + start;
  const bool last = ends_in_eos_ && start + count == length && whole.count > 0;
  out.resize(count);
  tokens_->visit(first, count + last, [&](const auto* raw) {
    bool good = true;
    for (uint64_t i = 0; i < count; ++i) {
      const auto id = static_cast<int64_t>(raw[i]);
      good &= id >= 0 && id < vocab_size_;
      out[i] = static_cast<int32_t>(id);
    }
    for (uint64_t i = 0; !good && i < count; ++i) {
      const auto id = static_cast<int64_t>(raw[i]);
      if (id < 0 || id >= vocab_size_) refuse_id(first + i, id);
    }
    if (last && static_cast<int64_t>(raw[count]) != kEosId) {
      tokens_->check_not_cut();  // behind a cut there are zeros
      throw DataError("document " + std::to_string(document) + " of '" + tokens_->prefix() +
                      "' ends in id " + std::to_string(raw[count]) +
                      ", while others end in EOS (1). Preprocess the corpus again, with EOS behind "
                      "every document or behind none.");
    }
  });
}

void Texts::refuse_id(uint64_t position, int64_t id) const {
  throw DataError("token " + std::to_string(position) + " of '" + tokens_->prefix() +
                  ".bin' is id " + std::to_string(id) + ", outside the model's vocabulary of " +
                  std::to_string(vocab_size_) +
                  ". Use the tokenizer the corpus was made with, or preprocess it again.");
}

void Texts::prefetch(uint64_t document, uint64_t start, uint64_t count) const {
  const TokenSpan whole = tokens_->document(document);
  if (start <= whole.count && count > 0 && count <= whole.count - start) {
    tokens_->prefetch(whole.start + start, count);
  }
}

CutDocuments::CutDocuments(Texts texts, uint64_t longest)
    : texts_(std::move(texts)), longest_(longest) {
  if (longest <= kShortest || longest > std::numeric_limits<uint32_t>::max()) {
    throw std::invalid_argument("pieces must be able to hold 3 tokens, and below 2^32");
  }
}

uint64_t CutDocuments::parts(uint64_t document) const {
  const uint64_t length = texts_.length(document);
  return length < kShortest ? 0 : length / longest_ + (length % longest_ != 0);
}

TokenSpan CutDocuments::span(const Piece& piece) const {
  const uint64_t length = texts_.length(piece.document);
  if (length < kShortest || piece.part > (length - 1) / longest_) {
    throw std::out_of_range("a piece of no document");
  }
  const auto start = [&](uint64_t part) {
    const uint64_t at = part * longest_;
    if (at >= length) return length;
    return length - at < kShortest ? length - kShortest : at;
  };
  const uint64_t first = start(piece.part);
  return {first, start(piece.part + 1) - first};
}

void CutDocuments::prefetch(const Piece& piece) const {
  const TokenSpan own = span(piece);
  texts_.prefetch(piece.document, own.start, own.count);
}

SpanDocuments::SpanDocuments(Texts texts, std::vector<uint32_t> noise, std::vector<uint32_t> spans,
                             int32_t sentinel_top, bool random_roll)
    : CutDocuments(std::move(texts), noise.empty() ? 0 : noise.size() - 1),
      noise_(std::move(noise)),
      spans_(std::move(spans)),
      sentinel_top_(sentinel_top),
      random_roll_(random_roll) {
  if (noise_.size() != spans_.size()) throw std::invalid_argument("tables of different lengths");
  for (uint32_t length = kShortest; length < noise_.size(); ++length) layout(length).check();
}

SpanLayout SpanDocuments::layout(uint32_t length) const {
  SpanLayout layout{length, noise_[length], spans_[length], 0, 0, sentinel_top_, random_roll_};
  layout.encoder_length = layout.encoder_text();
  layout.decoder_length = layout.decoder_text();
  return layout;
}

Room SpanDocuments::room(const Piece& piece) const {
  const SpanLayout layout = this->layout(static_cast<uint32_t>(span(piece).count));
  return {static_cast<uint32_t>(layout.encoder_length),
          static_cast<uint32_t>(layout.decoder_length)};
}

Room SpanDocuments::write(const Piece& piece, Random& random, PieceScratch& scratch,
                          int32_t* encoder, int32_t* targets) const {
  const TokenSpan own = span(piece);
  texts().read(piece.document, own.start, own.count, scratch.ids);
  const SpanEnds ends = write_spans(scratch.ids.data(), layout(static_cast<uint32_t>(own.count)),
                                    random, scratch.spans, encoder, targets);
  return {static_cast<uint32_t>(ends.encoder - encoder),
          static_cast<uint32_t>(ends.targets - targets)};
}

Room PrefixDocuments::room(const Piece& piece) const {
  const auto length = static_cast<uint32_t>(span(piece).count);
  return {length, length};
}

Room PrefixDocuments::write(const Piece& piece, Random& random, PieceScratch& scratch,
                            int32_t* encoder, int32_t* targets) const {
  const TokenSpan own = span(piece);
  texts().read(piece.document, own.start, own.count, scratch.ids);
  const auto& ids = scratch.ids;
  const uint32_t split = 1 + random.below(static_cast<uint32_t>(ids.size()) - 1);
  *std::copy(ids.begin(), ids.begin() + split, encoder) = kEosId;
  *std::copy(ids.begin() + split, ids.end(), targets) = kEosId;
  return {split + 1, static_cast<uint32_t>(ids.size()) - split + 1};
}

TextPairs::TextPairs(Texts inputs, Texts targets, Room longest)
    : inputs_(std::move(inputs)), targets_(std::move(targets)), longest_(longest) {
  if (inputs_.documents() != targets_.documents() || longest.encoder < 1 || longest.decoder < 1) {
    throw std::invalid_argument("inputs and targets that are no pairs, or rows without room");
  }
}

Room TextPairs::room(const Piece& piece) const {
  const auto limited = [&](const Texts& texts, uint32_t most) {
    return static_cast<uint32_t>(std::min<uint64_t>(texts.length(piece.document), most - 1) + 1);
  };
  return {limited(inputs_, longest_.encoder), limited(targets_, longest_.decoder)};
}

Room TextPairs::write(const Piece& piece, Random&, PieceScratch& scratch, int32_t* encoder,
                      int32_t* targets) const {
  const Room room = this->room(piece);
  const auto copy = [&](const Texts& texts, uint32_t count, int32_t* out) {
    texts.read(piece.document, 0, count, scratch.ids);
    *std::copy(scratch.ids.begin(), scratch.ids.end(), out) = kEosId;
  };
  copy(inputs_, room.encoder - 1, encoder);
  copy(targets_, room.decoder - 1, targets);
  return room;
}

void TextPairs::prefetch(const Piece& piece) const {
  const Room room = this->room(piece);
  inputs_.prefetch(piece.document, 0, room.encoder - 1);
  targets_.prefetch(piece.document, 0, room.decoder - 1);
}

void TextPairs::check_not_cut() const {
  inputs_.check_not_cut();
  targets_.check_not_cut();
}

DocumentSampler::DocumentSampler(std::shared_ptr<const Pieces> pieces,
                                 std::shared_ptr<const RowIndex> rows, const RowShape& shape,
                                 uint64_t seed, bool shuffle)
    : pieces_(std::move(pieces)),
      rows_(std::move(rows)),
      shape_(shape),
      seed_(seed),
      shuffle_(shuffle) {
  if (rows_->rows() == 0) throw std::invalid_argument("a corpus without rows");
}

uint64_t DocumentSampler::row(uint64_t sample_index) const {
  Recent<Permutation>::Last last;
  return row_of(sample_index, last);
}

uint64_t DocumentSampler::row_of(uint64_t sample_index, Recent<Permutation>::Last& last) const {
  const uint64_t epoch = shuffle_ ? sample_index / rows_->rows() : 0;
  const Permutation& order = last.get(epochs_, epoch, [this](uint64_t number) {
    return Permutation(rows_->rows(), seed_, number);
  });
  return order(sample_index % rows_->rows());
}

void DocumentSampler::fill(const int64_t* sample_indices, uint64_t count,
                           const BatchBuffers& out) const {
  claim_bus_errors();
  PieceScratch scratch;
  std::vector<Piece> row;
  Recent<Permutation>::Last last;
  const uint64_t encoder = shape_.room.encoder;
  const uint64_t decoder = shape_.room.decoder;
  for (uint64_t i = 0; i < count; ++i) {
    if (sample_indices[i] < 0) throw std::invalid_argument("negative sample index");
    BatchBuffers own{out.encoder + i * encoder, out.decoder + i * decoder,
                     out.targets + i * decoder, nullptr, nullptr};
    if (shape_.packed) {
      own.encoder_segments = out.encoder_segments + i * encoder;
      own.decoder_segments = out.decoder_segments + i * decoder;
    }
    const auto index = static_cast<uint64_t>(sample_indices[i]);
    fill_row(index, row_of(index, last), scratch, row, own);
  }
  pieces_->check_not_cut();
  rows_->check_not_cut();
}

void DocumentSampler::fill_row(uint64_t sample_index, uint64_t number, PieceScratch& scratch,
                               std::vector<Piece>& row, const BatchBuffers& out) const {
  rows_->row(number, row);
  Random random(seed_, sample_index, Stream::kSpans);
  const Room size = shape_.room;
  Room at{0, 0};
  int32_t segment = 0;
  for (const Piece& piece : row) {
    // The file was checked when it was opened; memory is not written on its word alone.
    const Room most = pieces_->room(piece);
    if (most.encoder > size.encoder - at.encoder || most.decoder > size.decoder - at.decoder) {
      rows_->check_not_cut();
      throw DataError("the rows of the corpus changed while they were in use. Start again.");
    }
    int32_t* const targets = out.targets + at.decoder;
    const Room took = pieces_->write(piece, random, scratch, out.encoder + at.encoder, targets);
    int32_t* const decoder = out.decoder + at.decoder;
    decoder[0] = kPadId;  // T5 starts the decoder with the pad id
    std::copy(targets, targets + took.decoder - 1, decoder + 1);
    if (shape_.packed) {
      ++segment;
      std::fill_n(out.encoder_segments + at.encoder, took.encoder, segment);
      std::fill_n(out.decoder_segments + at.decoder, took.decoder, segment);
    }
    at.encoder += took.encoder;
    at.decoder += took.decoder;
  }
  const uint32_t encoder_rest = size.encoder - at.encoder;
  const uint32_t decoder_rest = size.decoder - at.decoder;
  std::fill_n(out.encoder + at.encoder, encoder_rest, kPadId);
  std::fill_n(out.decoder + at.decoder, decoder_rest, kPadId);
  std::fill_n(out.targets + at.decoder, decoder_rest, kPadId);
  if (shape_.packed) {
    std::fill_n(out.encoder_segments + at.encoder, encoder_rest, 0);
    std::fill_n(out.decoder_segments + at.decoder, decoder_rest, 0);
  }
}

void DocumentSampler::prefetch(const int64_t* sample_indices, uint64_t count) const {
  claim_bus_errors();
  std::vector<Piece> row;
  Recent<Permutation>::Last last;
  for (uint64_t i = 0; i < count; ++i) {
    if (sample_indices[i] < 0) throw std::invalid_argument("negative sample index");
    rows_->row(row_of(static_cast<uint64_t>(sample_indices[i]), last), row);
    for (const Piece& piece : row) pieces_->prefetch(piece);
  }
}

}  // namespace megaswitch
