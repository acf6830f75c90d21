// T5 span corruption: raw tokens to encoder text, decoder input and decoder targets. The readable
// twin, equal bit for bit, is `megaswitch/data/span_corruption.py`.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "indexed.h"
#include "permutation.h"
#include "philox.h"
#include "recent.h"
#include "sampler.h"

namespace megaswitch {

// What all samples of a run have in common. Counts are computed in Python, in float32 as T5 does.
struct SpanLayout {
  uint32_t raw_length;
  uint32_t noise_tokens;  // 1 .. raw_length - 1
  uint32_t spans;         // 1 .. min(noise_tokens, raw_length - noise_tokens)
  uint64_t encoder_length;
  uint64_t decoder_length;
  int64_t sentinel_top;  // the first sentinel is sentinel_top - 1, the next one below, ...
  bool random_roll;      // rotate the mask, so that any position may be masked: t5's option

  // A rotation may cut a masked span in two, which takes one sentinel more.
  uint64_t most_spans() const { return uint64_t{spans} + (random_roll ? 1 : 0); }
  // The longest texts, EOS included. Only with `random_roll` are there shorter ones, by 1.
  uint64_t encoder_text() const { return raw_length - noise_tokens + most_spans() + 1; }
  uint64_t decoder_text() const { return noise_tokens + most_spans() + 1; }
  // Throws std::invalid_argument where the fields contradict each other.
  void check() const;
};

// A split of `tokens` into non-empty segments, uniform over all such splits.
class Composition {
 public:
  void draw(Random& random, uint32_t tokens, uint32_t segments);
  // Where the next segment ends; the last one ends at `tokens`.
  uint32_t next_end();

 private:
  std::vector<uint64_t> ends_;  // bit p set: a segment ends after token p
  std::size_t word_ = 0;
};

// Scratch space of one thread.
struct SpanScratch {
  Composition noise;
  Composition text;
  std::vector<uint32_t> runs;
};

// Where the texts of a sample end.
struct SpanEnds {
  int32_t* encoder;
  int32_t* targets;
};

// Both texts of a sample, each with its EOS and nothing behind it.
template <typename Token>
SpanEnds write_spans(const Token* raw, const SpanLayout& layout, Random& random,
                     SpanScratch& scratch, int32_t* encoder, int32_t* targets);

template <typename Token>
void corrupt(const Token* raw, const SpanLayout& layout, uint64_t seed, uint64_t sample_index,
             SpanScratch& scratch, int32_t* encoder, int32_t* decoder, int32_t* targets);

// Samples of a corpus, each a pure function of (seed, global sample index).
class SpanSampler : public Sampler {
 public:
  // `offset_choices`: an epoch starts at one of the first so many tokens. With `shuffle` false it
  // starts at token 0 and keeps the corpus's order. Ids must be in [0, vocab_size).
  SpanSampler(std::shared_ptr<const IndexedTokens> tokens, const SpanLayout& layout, uint64_t seed,
              int64_t vocab_size, uint64_t samples_per_epoch, uint32_t offset_choices,
              bool shuffle);

  uint64_t encoder_length() const override { return layout_.encoder_length; }
  uint64_t decoder_length() const override { return layout_.decoder_length; }

  // First raw token of a sample.
  uint64_t sample_start(uint64_t sample_index) const;
  // Throws DataError at a token id outside the vocabulary, or if the .bin was cut meanwhile.
  void fill(const int64_t* sample_indices, uint64_t count,
            const BatchBuffers& out) const override;
  void prefetch(const int64_t* sample_indices, uint64_t count) const override;

 private:
  // The order of one epoch and where it starts.
  struct Epoch {
    uint64_t offset;
    Permutation order;
  };

  uint64_t start_of(uint64_t sample_index, Recent<Epoch>::Last& last) const;

  std::shared_ptr<const IndexedTokens> tokens_;
  SpanLayout layout_;
  uint64_t seed_;
  int64_t vocab_size_;
  uint64_t samples_per_epoch_;
  uint32_t offset_choices_;
  bool shuffle_;
  // Small corpora keep a table for each, and a mixture goes through several of theirs at a time.
  mutable Recent<Epoch> epochs_;
};

}  // namespace megaswitch
