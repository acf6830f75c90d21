#include "span_corruption.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace megaswitch {

namespace {

// Position of the first id outside [0, vocab_size), or `count`. A plain reduction comes first, as
// it vectorises and nearly always settles the question.
template <typename Token>
uint64_t find_bad_id(const Token* tokens, uint64_t count, int64_t vocab_size) {
  Token low = 0;
  Token high = 0;
  for (uint64_t i = 0; i < count; ++i) {
    low = std::min(low, tokens[i]);
    high = std::max(high, tokens[i]);
  }
  if (low >= 0 && static_cast<int64_t>(high) < vocab_size) return count;
  return std::find_if(tokens, tokens + count,
                      [&](Token id) { return id < 0 || static_cast<int64_t>(id) >= vocab_size; }) -
         tokens;
}

}  // namespace

void SpanLayout::check() const {
  const bool counts_fit = raw_length >= 2 && noise_tokens >= 1 && noise_tokens < raw_length &&
                          spans >= 1 && spans <= noise_tokens &&
                          spans <= raw_length - noise_tokens;
  if (!counts_fit || encoder_length < encoder_text() || decoder_length < decoder_text() ||
      sentinel_top < static_cast<int64_t>(spans)) {
    throw std::invalid_argument("contradictory span layout");
  }
}

void Composition::draw(Random& random, uint32_t tokens, uint32_t segments) {
  ends_.assign((tokens + 63) / 64, 0);
  word_ = 0;
  const auto taken = [&](uint32_t at) { return ends_[at / 64] >> (at % 64) & 1; };
  const auto take = [&](uint32_t at) { ends_[at / 64] |= uint64_t{1} << (at % 64); };
  // Floyd's subset: segments - 1 distinct cuts among the tokens - 1 places between two tokens.
  for (uint32_t newest = tokens - segments; newest < tokens - 1; ++newest) {
    const uint32_t cut = random.below(newest + 1);
    take(taken(cut) ? newest : cut);
  }
  take(tokens - 1);
}

uint32_t Composition::next_end() {
  while (ends_[word_] == 0) ++word_;
  const uint32_t end = static_cast<uint32_t>(word_ * 64) + __builtin_ctzll(ends_[word_]) + 1;
  ends_[word_] &= ends_[word_] - 1;
  return end;
}

template <typename Token>
void corrupt(const Token* raw, const SpanLayout& layout, uint64_t seed, uint64_t sample_index,
             SpanScratch& scratch, int64_t* encoder, int64_t* decoder, int64_t* targets) {
  Random random(seed, sample_index, Stream::kSpans);
  scratch.noise.draw(random, layout.noise_tokens, layout.spans);
  scratch.text.draw(random, layout.raw_length - layout.noise_tokens, layout.spans);

  int64_t* const encoder_end = encoder + layout.encoder_length;
  int64_t* const targets_begin = targets;
  int64_t* const targets_end = targets + layout.decoder_length;
  uint32_t text_end = 0;
  uint32_t noise_end = 0;
  for (uint32_t span = 0; span < layout.spans; ++span) {
    const int64_t sentinel = layout.sentinel_top - 1 - span;
    const uint32_t next_text = scratch.text.next_end();
    for (; text_end < next_text; ++text_end) *encoder++ = *raw++;
    *encoder++ = sentinel;
    *targets++ = sentinel;
    const uint32_t next_noise = scratch.noise.next_end();
    for (; noise_end < next_noise; ++noise_end) *targets++ = *raw++;
  }
  *encoder++ = kEosId;
  *targets++ = kEosId;
  std::fill(encoder, encoder_end, kPadId);
  std::fill(targets, targets_end, kPadId);
  decoder[0] = kPadId;  // T5 starts the decoder with the pad id
  std::copy(targets_begin, targets_end - 1, decoder + 1);
}

template void corrupt<int64_t>(const int64_t*, const SpanLayout&, uint64_t, uint64_t, SpanScratch&,
                               int64_t*, int64_t*, int64_t*);

SpanSampler::SpanSampler(std::shared_ptr<const IndexedTokens> tokens, const SpanLayout& layout,
                         uint64_t seed, int64_t vocab_size, uint64_t samples_per_epoch,
                         uint32_t offset_choices, bool shuffle)
    : tokens_(std::move(tokens)),
      layout_(layout),
      seed_(seed),
      vocab_size_(vocab_size),
      samples_per_epoch_(samples_per_epoch),
      offset_choices_(offset_choices),
      shuffle_(shuffle) {
  layout.check();
  const uint64_t total = tokens_->num_tokens();
  if (samples_per_epoch == 0 || samples_per_epoch > total / layout.raw_length ||
      offset_choices == 0 || offset_choices - 1 > total - samples_per_epoch * layout.raw_length) {
    throw std::invalid_argument("an epoch that does not fit the corpus");
  }
}

std::shared_ptr<const SpanSampler::Epoch> SpanSampler::epoch(uint64_t number) const {
  const std::lock_guard<std::mutex> lock(epoch_mutex_);
  if (last_epoch_ == nullptr || last_epoch_->number != number) {
    Random random(seed_, number, Stream::kEpochOffset);
    last_epoch_ = std::make_shared<const Epoch>(Epoch{
        number, random.below(offset_choices_), Permutation(samples_per_epoch_, seed_, number)});
  }
  return last_epoch_;
}

uint64_t SpanSampler::sample_start(uint64_t sample_index) const {
  const uint64_t position = sample_index % samples_per_epoch_;
  if (!shuffle_) return position * layout_.raw_length;
  const auto now = epoch(sample_index / samples_per_epoch_);
  return now->offset + now->order(position) * layout_.raw_length;
}

void SpanSampler::fill(const int64_t* sample_indices, uint64_t count,
                       const BatchBuffers& out) const {
  // Behind a cut the mapping reads as zeros to the end of the page and kills the process (SIGBUS)
  // beyond, so every batch looks first. A cut between this line and the reads below stays fatal.
  tokens_->check_not_cut();
  std::vector<uint64_t> starts(count);
  for (uint64_t row = 0; row < count; ++row) {
    if (sample_indices[row] < 0) throw std::invalid_argument("negative sample index");
    starts[row] = sample_start(static_cast<uint64_t>(sample_indices[row]));
    tokens_->prefetch(starts[row], layout_.raw_length);  // all rows' reads are under way at once
  }
  SpanScratch scratch;
  for (uint64_t row = 0; row < count; ++row) {
    tokens_->visit(starts[row], layout_.raw_length, [&](const auto* raw) {
      const uint64_t bad = find_bad_id(raw, layout_.raw_length, vocab_size_);
      if (bad < layout_.raw_length) {
        throw DataError("token " + std::to_string(starts[row] + bad) + " of '" +
                        tokens_->prefix() + ".bin' is id " + std::to_string(raw[bad]) +
                        ", outside the model's vocabulary of " + std::to_string(vocab_size_) +
                        ". Use the tokenizer the corpus was made with, or preprocess it again.");
      }
      corrupt(raw, layout_, seed_, static_cast<uint64_t>(sample_indices[row]), scratch,
              out.encoder + row * layout_.encoder_length,
              out.decoder + row * layout_.decoder_length,
              out.targets + row * layout_.decoder_length);
    });
  }
}

}  // namespace megaswitch
