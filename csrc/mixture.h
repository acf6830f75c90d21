// Samples of many sources in fixed proportions. Where global sample i comes from is computed, not
// looked up: `MixtureOrder` in `megaswitch/data/mixture.py` is the readable twin.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "permutation.h"
#include "recent.h"
#include "sampler.h"

namespace megaswitch {

// From sample `start` on, each block of consecutive samples holds `quotas[d]` of source d.
struct MixtureSegment {
  uint64_t start;
  std::vector<uint64_t> quotas;
};

// The sample at rank r of its source's share of a block.
struct MixturePlace {
  uint64_t source;
  uint64_t position;  // global sample index within the source
};

// Which source, and which of its samples, every global sample is.
class MixtureOrder {
 public:
  // The first segment starts at 0, later ones after it in order; the quotas of each add up to
  // `block`. Throws std::invalid_argument otherwise.
  MixtureOrder(uint64_t seed, uint64_t block, const std::vector<MixtureSegment>& segments);

  uint64_t num_sources() const { return segments_[0].quotas.size(); }
  MixturePlace locate(uint64_t sample_index) const;
  // Samples of each source among the first `count`.
  std::vector<uint64_t> seen(uint64_t count) const;

 private:
  struct Segment {
    uint64_t start;
    std::vector<uint64_t> quotas;
    std::vector<uint64_t> ends;   // ranks in a block: source d's are [ends[d] - quotas[d], ends[d])
    std::vector<uint64_t> first;  // position in each source of the segment's first block
    std::vector<uint64_t> seen;   // samples of each source before the segment
  };

  const Segment& segment_of(uint64_t sample_index) const;
  std::vector<uint64_t> seen_until(const Segment& segment, uint64_t count) const;
  void append(const MixtureSegment& added);

  uint64_t seed_;
  uint64_t block_;
  std::vector<Segment> segments_;
  mutable Recent<Permutation> blocks_;  // by their first sample
};

class MixtureSampler : public Sampler {
 public:
  // `sources` have equal lengths, and there are as many as `order` knows.
  MixtureSampler(std::vector<std::shared_ptr<const Sampler>> sources,
                 std::shared_ptr<const MixtureOrder> order);

  uint64_t encoder_length() const override { return sources_[0]->encoder_length(); }
  uint64_t decoder_length() const override { return sources_[0]->decoder_length(); }
  bool packs_documents() const override { return sources_[0]->packs_documents(); }

  void fill(const int64_t* sample_indices, uint64_t count,
            const BatchBuffers& out) const override;
  void prefetch(const int64_t* sample_indices, uint64_t count) const override;

 private:
  std::vector<std::shared_ptr<const Sampler>> sources_;
  std::shared_ptr<const MixtureOrder> order_;
};

}  // namespace megaswitch
