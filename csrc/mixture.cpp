#include "mixture.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <utility>

namespace megaswitch {

namespace {

constexpr uint64_t kMostSamples = uint64_t{1} << 62;  // far from where 64 bits would overflow

uint64_t checked(int64_t sample_index) {
  if (sample_index < 0 || static_cast<uint64_t>(sample_index) >= kMostSamples) {
    throw std::invalid_argument("a sample index outside [0, 2^62)");
  }
  return static_cast<uint64_t>(sample_index);
}

BatchBuffers from_row(const BatchBuffers& all, uint64_t row, const Sampler& sampler) {
  const uint64_t le = row * sampler.encoder_length();
  const uint64_t ld = row * sampler.decoder_length();
  BatchBuffers out{all.encoder + le, all.decoder + ld, all.targets + ld, nullptr, nullptr};
  if (sampler.packs_documents()) {
    out.encoder_segments = all.encoder_segments + le;
    out.decoder_segments = all.decoder_segments + ld;
  }
  return out;
}

}  // namespace

MixtureOrder::MixtureOrder(uint64_t seed, uint64_t block,
                           const std::vector<MixtureSegment>& segments)
    : seed_(seed), block_(block) {
  if (block < 1 || block > uint64_t{1} << 32 || segments.empty() || segments[0].start != 0 ||
      segments[0].quotas.empty()) {
    throw std::invalid_argument("a mixture needs a block of 1 to 2^32 and a segment from sample 0");
  }
  for (const MixtureSegment& segment : segments) append(segment);
}

void MixtureOrder::append(const MixtureSegment& added) {
  uint64_t total = 0;
  for (const uint64_t quota : added.quotas) {
    if (quota > block_ - total) throw std::invalid_argument("quotas that exceed the block");
    total += quota;
  }
  const std::size_t sources = added.quotas.size();
  if (total != block_ || added.start >= kMostSamples ||
      (!segments_.empty() &&
       (sources != num_sources() || added.start <= segments_.back().start))) {
    throw std::invalid_argument("a segment that does not fit the mixture");
  }
  Segment segment{added.start, added.quotas, std::vector<uint64_t>(sources),
                  std::vector<uint64_t>(sources), std::vector<uint64_t>(sources)};
  std::partial_sum(added.quotas.begin(), added.quotas.end(), segment.ends.begin());
  if (!segments_.empty()) {
    const Segment& last = segments_.back();
    // A block that the new segment interrupts counts in full: no sample is seen twice, and what
    // it had left comes with the source's next epoch.
    const uint64_t blocks = (added.start - last.start + block_ - 1) / block_;
    for (std::size_t d = 0; d < sources; ++d) {
      segment.first[d] = last.first[d] + blocks * last.quotas[d];
    }
    segment.seen = seen_until(last, added.start);
  }
  segments_.push_back(std::move(segment));
}

const MixtureOrder::Segment& MixtureOrder::segment_of(uint64_t sample_index) const {
  const auto after =
      std::upper_bound(segments_.begin(), segments_.end(), sample_index,
                       [](uint64_t index, const Segment& s) { return index < s.start; });
  return *(after - 1);
}

MixturePlace MixtureOrder::locate(uint64_t sample_index) const {
  const Segment& segment = segment_of(sample_index);
  const uint64_t block = (sample_index - segment.start) / block_;
  const uint64_t begin = segment.start + block * block_;
  const auto order = blocks_.get(begin, [this](uint64_t first) {
    return Permutation(block_, seed_, first, Stream::kMixture);
  });
  const uint64_t rank = (*order)(sample_index - begin);
  const auto end = std::upper_bound(segment.ends.begin(), segment.ends.end(), rank);
  const auto source = static_cast<uint64_t>(end - segment.ends.begin());
  const uint64_t quota = segment.quotas[source];
  return {source, segment.first[source] + block * quota + (rank - (*end - quota))};
}

std::vector<uint64_t> MixtureOrder::seen_until(const Segment& segment, uint64_t count) const {
  std::vector<uint64_t> seen = segment.seen;
  const uint64_t blocks = (count - segment.start) / block_;
  for (std::size_t d = 0; d < seen.size(); ++d) seen[d] += blocks * segment.quotas[d];
  const uint64_t begin = segment.start + blocks * block_;
  if (begin == count) return seen;
  const Permutation order(block_, seed_, begin, Stream::kMixture);
  for (uint64_t at = 0; at < count - begin; ++at) {
    const auto end = std::upper_bound(segment.ends.begin(), segment.ends.end(), order(at));
    ++seen[static_cast<std::size_t>(end - segment.ends.begin())];
  }
  return seen;
}

std::vector<uint64_t> MixtureOrder::seen(uint64_t count) const {
  if (count >= kMostSamples) throw std::invalid_argument("more samples than there can be");
  return seen_until(segment_of(count), count);
}

MixtureSampler::MixtureSampler(std::vector<std::shared_ptr<const Sampler>> sources,
                               std::shared_ptr<const MixtureOrder> order)
    : sources_(std::move(sources)), order_(std::move(order)) {
  if (sources_.empty() || sources_.size() != order_->num_sources()) {
    throw std::invalid_argument("as many sources as quotas are needed");
  }
  for (const auto& source : sources_) {
    if (source->encoder_length() != encoder_length() ||
        source->decoder_length() != decoder_length() ||
        source->packs_documents() != packs_documents()) {
      throw std::invalid_argument("sources of different shapes cannot be mixed");
    }
  }
}

void MixtureSampler::fill(const int64_t* sample_indices, uint64_t count,
                          const BatchBuffers& out) const {
  for (uint64_t row = 0; row < count; ++row) {
    const MixturePlace place = order_->locate(checked(sample_indices[row]));
    const auto position = static_cast<int64_t>(place.position);
    sources_[place.source]->fill(&position, 1, from_row(out, row, *this));
  }
}

void MixtureSampler::prefetch(const int64_t* sample_indices, uint64_t count) const {
  for (uint64_t row = 0; row < count; ++row) {
    const MixturePlace place = order_->locate(checked(sample_indices[row]));
    const auto position = static_cast<int64_t>(place.position);
    sources_[place.source]->prefetch(&position, 1);
  }
}

}  // namespace megaswitch
