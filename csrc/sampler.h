// What every source of training samples offers: rows by global sample index, nothing else. A row is
// a pure function of its index, so any thread of any rank may make it, at any time, in any batch.
#pragma once

#include <cstdint>

namespace megaswitch {

constexpr int32_t kPadId = 0;
constexpr int32_t kEosId = 1;

// Where a batch goes: row-major matrices of the caller's, one row for each sample. Ids fit in 32
// bits; a device widens them after the transfer. Segments number the documents packed into a row
// from 1, padding is 0; both are null unless the sampler packs documents.
struct BatchBuffers {
  int32_t* encoder;           // [rows, encoder_length]
  int32_t* decoder;           // [rows, decoder_length]
  int32_t* targets;           // [rows, decoder_length]
  int32_t* encoder_segments;  // [rows, encoder_length]
  int32_t* decoder_segments;  // [rows, decoder_length]
};

class Sampler {
 public:
  virtual ~Sampler() = default;

  virtual uint64_t encoder_length() const = 0;
  virtual uint64_t decoder_length() const = 0;
  virtual bool packs_documents() const { return false; }

  // Write the samples of `count` indices, each >= 0. Every element of every buffer is written; a
  // text ends in EOS, and padding is all that may follow. Safe to call from several threads.
  // Throws DataError where the data turn out to be unusable.
  virtual void fill(const int64_t* sample_indices, uint64_t count,
                    const BatchBuffers& out) const = 0;

  // Say that these samples will be asked for soon, so that their bytes can be on their way.
  virtual void prefetch(const int64_t* sample_indices, uint64_t count) const = 0;
};

}  // namespace megaswitch
