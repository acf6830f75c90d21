// Samples made of whole documents: several in a row or one, span-corrupted, split in two, or pairs
// of texts. The readable twin, equal bit for bit, is `megaswitch/data/documents.py`.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "indexed.h"
#include "packing.h"
#include "permutation.h"
#include "philox.h"
#include "recent.h"
#include "sampler.h"

namespace megaswitch {

// A corpus as its documents' texts. Where all documents end in EOS (`ends_in_eos`), that one is not
// part of the text: every text of a sample gets its own.
class Texts {
 public:
  Texts(std::shared_ptr<const IndexedTokens> tokens, bool ends_in_eos, int64_t vocab_size);

  uint64_t documents() const { return tokens_->num_documents(); }
  uint64_t length(uint64_t document) const;
  // Replace `out` by tokens [start, start + count) of the document. Throws DataError at an id
  // outside the vocabulary, or at the end of a document that does not end as the others do.
  void read(uint64_t document, uint64_t start, uint64_t count, std::vector<int32_t>& out) const;
  void prefetch(uint64_t document, uint64_t start, uint64_t count) const;
  void check_not_cut() const { tokens_->check_not_cut(); }

 private:
  [[noreturn]] void refuse_id(uint64_t position, int64_t id) const;

  std::shared_ptr<const IndexedTokens> tokens_;
  bool ends_in_eos_;
  int64_t vocab_size_;
};

// Documents cut into pieces of at most `longest` tokens: full ones, then the rest. A rest of one
// token, which nothing can be done with, takes one from the piece before it.
class CutDocuments : public Pieces {
 public:
  static constexpr uint64_t kShortest = 2;

  CutDocuments(Texts texts, uint64_t longest);

  uint64_t documents() const override { return texts_.documents(); }
  uint64_t parts(uint64_t document) const override;
  void prefetch(const Piece& piece) const override;
  void check_not_cut() const override { texts_.check_not_cut(); }

 protected:
  TokenSpan span(const Piece& piece) const;  // within the document
  const Texts& texts() const { return texts_; }

 private:
  Texts texts_;
  uint64_t longest_;
};

// Each piece span-corrupted by itself. `noise` and `spans` say, for every length from 0 on, how
// many tokens are masked in how many spans; they are computed in Python, in float32 as T5 does.
class SpanDocuments : public CutDocuments {
 public:
  SpanDocuments(Texts texts, std::vector<uint32_t> noise, std::vector<uint32_t> spans,
                int32_t sentinel_top, bool random_roll);

  Room room(const Piece& piece) const override;
  Room write(const Piece& piece, Random& random, PieceScratch& scratch, int32_t* encoder,
             int32_t* targets) const override;

 private:
  SpanLayout layout(uint32_t length) const;

  std::vector<uint32_t> noise_;
  std::vector<uint32_t> spans_;
  int32_t sentinel_top_;
  bool random_roll_;
};

// Each piece split in two, uniformly between any two of its tokens: the encoder reads the prefix,
// the decoder writes the rest.
class PrefixDocuments : public CutDocuments {
 public:
  using CutDocuments::CutDocuments;

  // Either text may be all but one token, so no two pieces can share a row.
  Room room(const Piece& piece) const override;
  Room write(const Piece& piece, Random& random, PieceScratch& scratch, int32_t* encoder,
             int32_t* targets) const override;
};

// Document k of one corpus as the input, document k of the other as the target. What is too long
// for a row loses its end.
class TextPairs : public Pieces {
 public:
  TextPairs(Texts inputs, Texts targets, Room longest);

  uint64_t documents() const override { return inputs_.documents(); }
  uint64_t parts(uint64_t) const override { return 1; }
  Room room(const Piece& piece) const override;
  Room write(const Piece& piece, Random& random, PieceScratch& scratch, int32_t* encoder,
             int32_t* targets) const override;
  void prefetch(const Piece& piece) const override;
  void check_not_cut() const override;

 private:
  Texts inputs_;
  Texts targets_;
  Room longest_;
};

// Rows of pieces, each a pure function of (seed, global sample index). Sample i is row i mod N, in
// an order keyed by (seed, i div N); without `shuffle` in that of epoch 0, always.
class DocumentSampler : public Sampler {
 public:
  DocumentSampler(std::shared_ptr<const Pieces> pieces, std::shared_ptr<const RowIndex> rows,
                  const RowShape& shape, uint64_t seed, bool shuffle);

  uint64_t encoder_length() const override { return shape_.room.encoder; }
  uint64_t decoder_length() const override { return shape_.room.decoder; }
  bool packs_documents() const override { return shape_.packed; }

  // Row of a sample.
  uint64_t row(uint64_t sample_index) const;
  void fill(const int64_t* sample_indices, uint64_t count, const BatchBuffers& out) const override;
  void prefetch(const int64_t* sample_indices, uint64_t count) const override;

 private:
  uint64_t row_of(uint64_t sample_index, Recent<Permutation>::Last& last) const;
  // Writes the sample whose row is `number`.
  void fill_row(uint64_t sample_index, uint64_t number, PieceScratch& scratch,
                std::vector<Piece>& row, const BatchBuffers& out) const;

  std::shared_ptr<const Pieces> pieces_;
  std::shared_ptr<const RowIndex> rows_;
  RowShape shape_;
  uint64_t seed_;
  bool shuffle_;
  mutable Recent<Permutation> epochs_;  // small corpora keep a table for each
};

}  // namespace megaswitch
