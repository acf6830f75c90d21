"""Decoding by ranks that exchange tokens: while one of them decodes, all take part in each step."""

from __future__ import annotations

import torch
from torch import Tensor

from megaswitch.data.span_corruption import PAD_ID
from megaswitch.log import UserError
from megaswitch.model.decoding import CachedDecoder, PrefixDecoder, Source
from megaswitch.model.switch_transformer import SwitchTransformer

# What a rank says before each step; the largest decides what all do.
_DONE, _OPEN, _FAILED = range(3)


class Lockstep:
    """A decoder on each of the ranks that the experts lie on, all at the same step.

    Tensor-parallel ranks decode the same rows from the same joined logits, so they are in step
    anyway; expert-parallel ranks each have rows of their own, whose texts end when they end. A rank
    whose texts are complete goes on with a single row, to no account, until all are.

    Args:
        model: whose encoder gave `source`.
        source: of this rank's rows.
        beams: rows that are decoded for each row of the encoder.
        max_tokens: most steps; the same on all ranks.
        cache: keep keys and values.
    """

    def __init__(
        self, model: SwitchTransformer, source: Source, *, beams: int, max_tokens: int, cache: bool
    ) -> None:
        self._model = model
        self._source = source
        self._kind = CachedDecoder if cache else PrefixDecoder
        self._decoder = self._kind(model, source, beams=beams, max_tokens=max_tokens)
        self._left = max_tokens

    def step(self, tokens: Tensor) -> Tensor:
        """Logits [B·beams, V] of what follows `tokens` [B·beams] int64."""
        self._say(_OPEN)
        self._left -= 1
        return self._decoder.step(tokens)

    def select(self, rows: Tensor) -> None:
        """Go on with row rows[i], [B·beams] int64, of the same encoder row, as row i."""
        self._decoder.select(rows)

    def check_finite(self, scores: Tensor) -> None:
        """Refuse NaN and infinity on any rank's behalf.

        Raises:
            UserError: on the ranks that exchange tokens with this one too, at their next step.
        """
        if torch.isfinite(scores).all():
            return
        if self._left:
            self._say(_FAILED)
        raise _not_finite()

    def finish(self) -> None:
        """Say that this rank's texts are complete; returns when all ranks' are."""
        if self._model.ep.size == 1 or not self._left:
            return
        source, alone = self._source, slice(0, 1)
        mask = None if source.mask is None else source.mask[alone]
        row = Source(source.memory[alone], mask, source.rows_per_group)
        self._decoder = self._kind(self._model, row, beams=1, max_tokens=self._left)
        token = torch.full((1,), PAD_ID, device=source.memory.device)
        while self._left and self._say(_DONE) == _OPEN:
            self._left -= 1
            self._decoder.step(token)

    def _say(self, state: int) -> int:
        """The state that all ranks together are in."""
        largest = self._model.ep.largest(state, self._source.memory.device)
        if largest == _FAILED:
            raise _not_finite()
        return largest


def _not_finite() -> UserError:
    return UserError(
        "the model's logits are NaN or infinite: look for damaged weights with `megaswitch "
        "inspect CHECKPOINT --stats`, and if it ran in bf16, try fp32"
    )
