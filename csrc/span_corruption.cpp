#include "span_corruption.h"

#include <algorithm>
#include <limits>
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
      sentinel_top < static_cast<int64_t>(most_spans()) ||
      sentinel_top > std::numeric_limits<int32_t>::max()) {
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

namespace {

// Lengths of the runs of kept and masked tokens by turns, the first one kept.
void draw_runs(Random& random, const SpanLayout& layout, SpanScratch& scratch) {
  scratch.noise.draw(random, layout.noise_tokens, layout.spans);
  scratch.text.draw(random, layout.raw_length - layout.noise_tokens, layout.spans);
  scratch.runs.clear();
  uint32_t text_end = 0;
  uint32_t noise_end = 0;
  for (uint32_t span = 0; span < layout.spans; ++span) {
    const uint32_t text = scratch.text.next_end();
    scratch.runs.push_back(text - text_end);
    text_end = text;
    const uint32_t noise = scratch.noise.next_end();
    scratch.runs.push_back(noise - noise_end);
    noise_end = noise;
  }
}

// Rotate the mask right by `offset` tokens, less than there are. Returns whether it now begins with
// a masked run; kept and masked ones still alternate.
bool rotate_runs(std::vector<uint32_t>& runs, uint32_t raw_length, uint32_t offset) {
  if (offset == 0) return false;
  uint32_t head = raw_length - offset;  // tokens that the rotation takes to the end
  std::size_t cut = 0;
  while (head >= runs[cut]) head -= runs[cut++];
  std::rotate(runs.begin(), runs.begin() + static_cast<std::ptrdiff_t>(cut), runs.end());
  runs[0] -= head;
  if (head > 0) runs.push_back(head);
  return cut % 2 == 1;
}

// Copies a run of tokens. Most runs are short, and copying eight at a time, beyond the end if need
// be, spares mispredicted branches (a fifth of the time of a sample). What is written later covers
// the surplus, as both texts grow and their rests are padded.
template <typename Token>
void copy_run(const Token* from, const Token* from_end, uint32_t count, int32_t* to,
              const int32_t* to_end) {
  const std::ptrdiff_t rounded = (std::ptrdiff_t{count} + 7) / 8 * 8;
  if (rounded > from_end - from || rounded > to_end - to) {
    for (uint32_t i = 0; i < count; ++i) to[i] = static_cast<int32_t>(from[i]);
    return;
  }
  for (std::ptrdiff_t first = 0; first < rounded; first += 8) {
    for (int i = 0; i < 8; ++i) to[first + i] = static_cast<int32_t>(from[first + i]);
  }
}

}  // namespace

template <typename Token>
SpanEnds write_spans(const Token* raw, const SpanLayout& layout, Random& random,
                     SpanScratch& scratch, int32_t* encoder, int32_t* targets) {
  draw_runs(random, layout, scratch);
  bool masked = layout.random_roll &&
                rotate_runs(scratch.runs, layout.raw_length, random.below(layout.raw_length));
  const Token* const raw_end = raw + layout.raw_length;
  int32_t* const encoder_end = encoder + layout.encoder_length;
  int32_t* const targets_end = targets + layout.decoder_length;
  int32_t sentinel = static_cast<int32_t>(layout.sentinel_top);
  for (const uint32_t run : scratch.runs) {
    if (masked) *encoder++ = *targets++ = --sentinel;
    int32_t*& out = masked ? targets : encoder;
    copy_run(raw, raw_end, run, out, masked ? targets_end : encoder_end);
    out += run;
    raw += run;
    masked = !masked;
  }
  *encoder++ = kEosId;
  *targets++ = kEosId;
  return {encoder, targets};
}

template SpanEnds write_spans<int32_t>(const int32_t*, const SpanLayout&, Random&, SpanScratch&,
                                       int32_t*, int32_t*);

template <typename Token>
void corrupt(const Token* raw, const SpanLayout& layout, uint64_t seed, uint64_t sample_index,
             SpanScratch& scratch, int32_t* encoder, int32_t* decoder, int32_t* targets) {
  Random random(seed, sample_index, Stream::kSpans);
  const SpanEnds ends = write_spans(raw, layout, random, scratch, encoder, targets);
  int32_t* const targets_end = targets + layout.decoder_length;
  std::fill(ends.encoder, encoder + layout.encoder_length, kPadId);
  std::fill(ends.targets, targets_end, kPadId);
  decoder[0] = kPadId;  // T5 starts the decoder with the pad id
  std::copy(targets, targets_end - 1, decoder + 1);
}

template void corrupt<int64_t>(const int64_t*, const SpanLayout&, uint64_t, uint64_t, SpanScratch&,
                               int32_t*, int32_t*, int32_t*);

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
  if (vocab_size < 1 || vocab_size > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument("a vocabulary that 32 bits cannot number");
  }
  const uint64_t total = tokens_->num_tokens();
  if (samples_per_epoch == 0 || samples_per_epoch > total / layout.raw_length ||
      offset_choices == 0 || offset_choices - 1 > total - samples_per_epoch * layout.raw_length) {
    throw std::invalid_argument("an epoch that does not fit the corpus");
  }
}

uint64_t SpanSampler::sample_start(uint64_t sample_index) const {
  Recent<Epoch>::Last last;
  return start_of(sample_index, last);
}

uint64_t SpanSampler::start_of(uint64_t sample_index, Recent<Epoch>::Last& last) const {
  const uint64_t position = sample_index % samples_per_epoch_;
  if (!shuffle_) return position * layout_.raw_length;
  const Epoch& now = last.get(epochs_, sample_index / samples_per_epoch_, [this](uint64_t number) {
    Random random(seed_, number, Stream::kEpochOffset);
    return Epoch{random.below(offset_choices_), Permutation(samples_per_epoch_, seed_, number)};
  });
  return now.offset + now.order(position) * layout_.raw_length;
}

void SpanSampler::fill(const int64_t* sample_indices, uint64_t count,
                       const BatchBuffers& out) const {
  tokens_->begin_visits();
  thread_local SpanScratch scratch;  // a mixture asks for one row at a time
  Recent<Epoch>::Last last;
  for (uint64_t row = 0; row < count; ++row) {
    if (sample_indices[row] < 0) throw std::invalid_argument("negative sample index");
    const uint64_t start = start_of(static_cast<uint64_t>(sample_indices[row]), last);
    tokens_->visit(start, layout_.raw_length, [&](const auto* raw) {
      const uint64_t bad = find_bad_id(raw, layout_.raw_length, vocab_size_);
      if (bad < layout_.raw_length) {
        throw DataError("token " + std::to_string(start + bad) + " of '" +
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
  tokens_->check_not_cut();
}

void SpanSampler::prefetch(const int64_t* sample_indices, uint64_t count) const {
  Recent<Epoch>::Last last;
  for (uint64_t row = 0; row < count; ++row) {
    if (sample_indices[row] < 0) throw std::invalid_argument("negative sample index");
    const uint64_t start = start_of(static_cast<uint64_t>(sample_indices[row]), last);
    tokens_->prefetch(start, layout_.raw_length);
  }
}

}  // namespace megaswitch
