"""Text from a trained model: greedy, sampled, or by beams.

Beam search scores, finishes and stops as Hugging Face's does, so that both find the same texts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megaswitch.data.span_corruption import EOS_ID, PAD_ID
from megaswitch.layers.noise import Noise
from megaswitch.log import UserError
from megaswitch.model.decoding import encode
from megaswitch.model.switch_transformer import SwitchTransformer
from megaswitch.train.lockstep import Lockstep

# The score of what must never be chosen; finite, so that sums and products of it stay numbers.
_NEVER = -1e9
# Tokens or beams; beyond, memory is gone before it is known to be too little.
_MOST = 1 << 20


@dataclass(frozen=True)
class Generated:
    """What was generated.

    Attributes:
        tokens: [B, ≤ max_tokens] int64, without the start token; up to and with EOS, then padding.
        scores: [B], Σ log-probability of a row's tokens, nats; of beams, that over
            (number of tokens)^length_penalty.
    """

    tokens: Tensor
    scores: Tensor


@dataclass(frozen=True)
class Decoding:
    """How to decode. Greedy, unless there are beams or a temperature.

    Attributes:
        max_tokens: most tokens to generate, EOS included.
        beams: texts kept under consideration.
        length_penalty: with beams, a text's score is divided by its length to this power; above 0
            favours long texts, below 0 short ones.
        early_stopping: with beams, stop at as many finished texts as there are beams; else when
            those still open cannot win at their present length.
        temperature: sample from the softmax of logits / temperature; 0 takes the best token.
        top_k: sample from the k best tokens only.
        top_p: sample from the fewest best tokens that together have this probability.
        seed: of sampling. A row's draws depend on it, the row's sample index and the position.
        cache: keep keys and values; False computes them again for each token. Slow, for checks.

    Raises:
        UserError: settings that make no sense, alone or together; all at once.
    """

    max_tokens: int = 64
    beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool = False
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    cache: bool = True

    def __post_init__(self) -> None:
        sampled = self.temperature > 0
        rules = (
            (
                1 <= self.max_tokens <= _MOST,
                f"max_tokens is {self.max_tokens}: it must be 1 to {_MOST:,}",
            ),
            (1 <= self.beams <= _MOST, f"beams is {self.beams}: it must be 1 to {_MOST:,}"),
            (
                math.isfinite(self.temperature)
                and (self.temperature == 0 or self.temperature >= 1e-4),
                f"temperature is {self.temperature}: it must be 0 (no sampling) or at least 0.0001",
            ),
            (
                abs(self.length_penalty) <= 4,  # beyond, powers of long lengths leave fp32
                f"length_penalty is {self.length_penalty}: it must lie in [-4, 4]",
            ),
            (self.top_k is None or self.top_k >= 1, f"top_k is {self.top_k}: at least 1 is needed"),
            (self.top_p is None or 0 < self.top_p <= 1, f"top_p is {self.top_p}: use (0, 1]"),
            (
                sampled or (self.top_k is None and self.top_p is None),
                "top_k and top_p cut down what is sampled from: set a temperature, e.g. 1.0",
            ),
            (
                not (sampled and self.beams > 1),
                f"beams is {self.beams} and temperature {self.temperature}: beams are not sampled; "
                "choose one of the two",
            ),
            (
                self.beams > 1 or (self.length_penalty == 1.0 and not self.early_stopping),
                "length_penalty and early_stopping are of beam search: set beams to 2 or more",
            ),
        )
        problems = [problem for holds, problem in rules if not holds]
        if problems:
            raise UserError("; ".join(problems))


def generate(
    model: SwitchTransformer,
    encoder_tokens: Tensor,
    *,
    encoder_mask: Tensor | None = None,
    sample_index: Tensor | None = None,
    **settings: Any,
) -> Generated:
    """Decode a batch. Each row's text depends on that row alone.

    Experts take every token (`moe.capacity_mode` "hf" keeps HF's slots per row in the encoder and,
    without a cache, in the decoder). Dropout and jitter are off whatever the model's mode.

    Of a model that lies on several ranks, all call this together: tensor-parallel ranks with the
    same rows, expert-parallel ones each with its own, or `accompany` where there are none.

    Args:
        model: with its parameters; wrap the call in `torch.autocast` for bf16.
        encoder_tokens: [B, Le] int64.
        encoder_mask: [B, Le] bool, True on real tokens, wherever the padding is; None: all are.
        sample_index: [B] int64, decides a row's draws in sampling; None numbers the rows.
        **settings: fields of `Decoding`.

    Raises:
        UserError: `settings` make no sense.
    """
    decoding = Decoding(**settings)
    if decoding.beams > 1:
        return _search(model, encoder_tokens, encoder_mask, decoding)
    steps = list(_steps(model, encoder_tokens, encoder_mask, sample_index, decoding))
    tokens, log_probabilities = zip(*steps, strict=True)
    return Generated(torch.stack(tokens, 1), torch.stack(log_probabilities).sum(0))


def stream(
    model: SwitchTransformer,
    encoder_tokens: Tensor,
    *,
    encoder_mask: Tensor | None = None,
    sample_index: Tensor | None = None,
    **settings: Any,
) -> Iterator[Tensor]:
    """`generate`, as it goes: yields each step's tokens [B] int64. Beams cannot be streamed.

    Iterate to the end, as other ranks may wait for this one.
    """
    decoding = Decoding(**settings)
    if decoding.beams > 1:
        raise UserError(
            f"beams is {decoding.beams}: a beam search has no text before its end, so it cannot be "
            "streamed; use generate"
        )
    return (
        tokens for tokens, _ in _steps(model, encoder_tokens, encoder_mask, sample_index, decoding)
    )


@torch.no_grad()
def accompany(model: SwitchTransformer, device: torch.device, **settings: Any) -> None:
    """Take part where ranks that share experts with this one, which has no texts, `generate`.

    Args:
        model: this rank's part.
        device: where it is.
        **settings: the same as theirs.
    """
    nothing = torch.full((1, 1), PAD_ID, device=device)
    _decoder(model, nothing, nothing != PAD_ID, Decoding(**settings)).finish()


def _decoder(
    model: SwitchTransformer, tokens: Tensor, mask: Tensor | None, decoding: Decoding
) -> Lockstep:
    return Lockstep(
        model,
        encode(model, tokens, mask),
        beams=decoding.beams,
        max_tokens=decoding.max_tokens,
        cache=decoding.cache,
    )


@torch.no_grad()
def _steps(
    model: SwitchTransformer,
    encoder_tokens: Tensor,
    encoder_mask: Tensor | None,
    sample_index: Tensor | None,
    decoding: Decoding,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each step's tokens [B] and their log-probabilities [B], 0 behind a row's EOS."""
    decoder = _decoder(model, encoder_tokens, encoder_mask, decoding)
    rows = len(encoder_tokens)
    if sample_index is None:
        sample_index = torch.arange(rows, device=encoder_tokens.device)
    tokens = encoder_tokens.new_full((rows,), PAD_ID)  # starts the decoder
    finished = torch.zeros_like(tokens, dtype=torch.bool)
    for position in range(decoding.max_tokens):
        logits = decoder.step(tokens).float()
        if decoding.temperature > 0:
            noise = Noise(decoding.seed, position, sample_index)
            tokens = _draw(logits, noise, decoding)
        else:
            tokens = logits.argmax(-1)
        chosen = torch.log_softmax(logits, -1).gather(1, tokens[:, None])[:, 0]
        decoder.check_finite(chosen)
        tokens = tokens.masked_fill(finished, PAD_ID)
        yield tokens, chosen.masked_fill(finished, 0.0)
        finished = finished | (tokens == EOS_ID)
        if finished.all():
            break
    decoder.finish()


def _draw(logits: Tensor, noise: Noise, decoding: Decoding) -> Tensor:
    """Tokens [B] sampled from logits [B, V] as `decoding` says, one uniform number for each row."""
    ordered, order = torch.sort(logits / decoding.temperature, descending=True, stable=True)
    if decoding.top_k is not None:
        ordered, order = ordered[:, : decoding.top_k], order[:, : decoding.top_k]
    probabilities = torch.softmax(ordered, -1)
    if decoding.top_p is not None:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities * (before < decoding.top_p)
    up_to = probabilities.double().cumsum(-1)
    draw = noise.uniform("generate", (len(logits), 1)).double() * up_to[:, -1:]
    place = torch.searchsorted(up_to, draw, right=True).clamp(max=order.shape[1] - 1)
    return order.gather(1, place)[:, 0]


@torch.no_grad()
def _search(
    model: SwitchTransformer,
    encoder_tokens: Tensor,
    encoder_mask: Tensor | None,
    decoding: Decoding,
) -> Generated:
    """Beam search over B rows with K beams each."""
    decoder = _decoder(model, encoder_tokens, encoder_mask, decoding)
    rows, beams, length = len(encoder_tokens), decoding.beams, decoding.max_tokens
    device = encoder_tokens.device
    live = encoder_tokens.new_full((rows, beams, length), PAD_ID)
    scores = torch.full((rows, beams), _NEVER, device=device)
    finished = _Finished(live.clone(), scores.clone(), scores < 0, decoding)
    scores[:, 0] = 0.0  # all beams are alike at first: only one may continue
    tokens = live[:, :, 0]
    first = torch.arange(rows, device=device)[:, None] * beams
    # As many spare candidates as beams, in case all of the best end at once.
    in_reach = torch.arange(2 * beams, device=device) < beams
    for position in range(length):
        log_p = torch.log_softmax(decoder.step(tokens.flatten()).float(), -1)
        vocab = log_p.shape[-1]
        totals, index = (
            (log_p.view(rows, beams, vocab) + scores[..., None]).flatten(1).topk(2 * beams)
        )
        decoder.check_finite(totals[:, 0])  # NaN counts as the largest
        parent, token = index // vocab, index % vocab
        texts = _take(live, parent)
        texts[:, :, position] = token
        ended = (token == EOS_ID) | (position == length - 1)
        finished.offer(texts, totals, ended & in_reach, position + 1)
        scores, order = (totals + ended * _NEVER).topk(beams)
        live, tokens = _take(texts, order), token.gather(1, order)
        if finished.closed(scores, position + 1):
            break
        decoder.select((parent.gather(1, order) + first).flatten())
    decoder.finish()
    best = finished.texts[:, 0]
    open_after = (best == EOS_ID).cumsum(1) == 0  # no EOS yet, so the text has a next token
    longest = int(open_after[:, :-1].any(0).sum()) + 1
    return Generated(best[:, :longest], finished.scores[:, 0])


@dataclass
class _Finished:
    """The best finished texts of each row.

    Attributes:
        texts: [B, K, T] int64, best first.
        scores: [B, K], after the length penalty.
        empty: [B, K] bool, True where there is no text yet.
        decoding: settings.
        improvable: [B, 1] bool, False for good once the open beams of a row cannot win.
    """

    texts: Tensor
    scores: Tensor
    empty: Tensor
    decoding: Decoding
    improvable: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.improvable = torch.ones_like(self.empty[:, :1])

    def offer(self, texts: Tensor, totals: Tensor, ended: Tensor, length: int) -> None:
        """Take those of `texts` [B, C, T] that `ended` [B, C] if they score better than ours."""
        accepted = ended & self.improvable
        if self.decoding.early_stopping:
            accepted &= self.empty.any(1, keepdim=True)
        scores = (totals / length**self.decoding.length_penalty).masked_fill(~accepted, _NEVER)
        self.scores, order = torch.cat([self.scores, scores], 1).topk(self.decoding.beams)
        self.texts = _take(torch.cat([self.texts, texts], 1), order)
        self.empty = torch.cat([self.empty, ~ended], 1).gather(1, order)

    def closed(self, live: Tensor, length: int) -> bool:
        """True when no row needs to go on; `live` [B, K] are the open beams' sums."""
        possible = live[:, :1] / length**self.decoding.length_penalty
        worst = torch.where(self.empty, _NEVER, self.scores.amin(1, keepdim=True))
        self.improvable &= (possible > worst).any(1, keepdim=True)
        full = self.decoding.early_stopping and not self.empty.any()
        return bool(full or not self.improvable.any())


def _take(texts: Tensor, rows: Tensor) -> Tensor:
    """Texts [B, K, T] at rows [B, C]: [B, C, T]."""
    return texts.gather(1, rows[..., None].expand(-1, -1, texts.shape[-1]))
