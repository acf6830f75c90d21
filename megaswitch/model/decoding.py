"""Decoding token by token, with the keys and values of the past kept or computed again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megaswitch.layers.attention import KeyValues, padding_bias
from megaswitch.layers.vocab import join_logits
from megaswitch.log import UserError
from megaswitch.model.switch_transformer import RouterLosses, SwitchTransformer


class KeyValueCache:
    """Keys and values of the tokens decoded so far, in one layer; kept once where they are one.

    Args:
        capacity: most tokens that it will hold.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._buffers: list[Tensor] = []

    def extend(self, new: KeyValues) -> KeyValues:
        """Append `new`, [B, heads, L, d_kv] each; returns all, [B, heads, length, d_kv] each."""
        distinct = new[:1] if new.keys is new.values else new
        if not self._buffers:
            rows, heads, _, size = new.keys.shape
            shape = (len(distinct), rows, heads, self.capacity, size)
            self._buffers = list(new.keys.new_empty(shape))
        end = self.length + new.keys.shape[2]
        for buffer, part in zip(self._buffers, distinct, strict=True):
            buffer[:, :, self.length : end] = part
        self.length = end
        held = [buffer[:, :, :end] for buffer in self._buffers]
        return KeyValues(held[0], held[-1])

    def select(self, rows: Tensor) -> None:
        """Row i becomes what row rows[i] was."""
        for buffer in self._buffers:
            held = buffer[:, :, : self.length]
            held.copy_(held.index_select(0, rows))


@dataclass(frozen=True)
class Source:
    """The encoder's side of a batch.

    Attributes:
        memory: [B, Le, d_model].
        mask: [B, Le] bool, or None.
        rows_per_group: for the decoder's Switch layers too.
    """

    memory: Tensor
    mask: Tensor | None
    rows_per_group: int | None


def encode(model: SwitchTransformer, tokens: Tensor, mask: Tensor | None) -> Source:
    """Run the encoder over `tokens` [B, Le] int64; `mask` [B, Le] bool is True on real tokens.

    Raises:
        UserError: the decoder cannot decode token by token.
    """
    if model.config.moe.router == "expert-choice" and model.config.moe.decoder_sparse_step:
        raise UserError(
            "model.moe.router='expert-choice' lets the decoder's experts choose among all tokens "
            "of a text, those not yet written too, so it cannot generate; train with "
            "model.moe.decoder_sparse_step=0, or another router"
        )
    # Dropless, so that a text depends on its own prompt alone; HF's capacity is per row anyway, and
    # experts that choose have no other.
    moe = model.config.moe
    rows = 1 if moe.capacity_mode == "hf" or moe.router == "expert-choice" else None
    x = model.embedding(tokens)
    memory = model.encoder(x, tokens.shape, mask, rows, None, RouterLosses())
    return Source(memory, mask, rows)


class CachedDecoder:
    """Decodes a batch by one token a step; each step costs one position.

    A step routes its tokens alone: nothing is dropped in any capacity mode (in HF's, a row of one
    token always finds room).

    Args:
        model: whose encoder gave `source`.
        source: of B rows.
        beams: rows that are decoded for each row of the encoder, side by side.
        max_tokens: most steps.
    """

    def __init__(
        self, model: SwitchTransformer, source: Source, *, beams: int, max_tokens: int
    ) -> None:
        blocks = model.decoder.blocks
        self._model = model
        self._rows_per_group = source.rows_per_group
        self._memory = [block.cross_attention.keys_values(source.memory) for block in blocks]
        self._past = [KeyValueCache(max_tokens) for _ in blocks]
        # The last query's bias; an earlier query sees the same distances, but fewer of them.
        self._bias = model.decoder.relative_bias(1, max_tokens, first_query=max_tokens - 1)
        self._memory_bias = (
            None if source.mask is None else padding_bias(source.mask, self._bias.dtype)
        )
        rows = len(source.memory) * beams
        self._real = torch.ones(rows, 1, dtype=torch.bool, device=source.memory.device)

    def step(self, tokens: Tensor) -> Tensor:
        """Logits [B·beams, V] of what follows `tokens` [B·beams] int64."""
        model = self._model
        x = model.embedding(tokens[:, None])
        length = self._past[0].length + 1
        bias = self._bias[..., -length:]
        for block, memory, past in zip(model.decoder.blocks, self._memory, self._past, strict=True):
            x, _ = block(
                x,
                self._real,
                bias,
                self._rows_per_group,
                None,
                memory,
                self._memory_bias,
                past,
            )
        return _all_logits(model, model.decoder.final_norm(x))

    def select(self, rows: Tensor) -> None:
        """Go on with row rows[i], [B·beams] int64, of the same encoder row, as row i."""
        for past in self._past:
            past.select(rows)


class PrefixDecoder:
    """The same without a cache: each step runs the decoder over all tokens so far.

    It holds nothing but tokens, is slow, and shows that `CachedDecoder` is right. In HF capacity
    mode a row's tokens compete for the experts' slots as they do in a training step, so there the
    two differ when experts overflow, as HF's do.
    """

    def __init__(
        self, model: SwitchTransformer, source: Source, *, beams: int, max_tokens: int
    ) -> None:
        self._model = model
        self._source = source
        shape = (len(source.memory) * beams, 0)
        self._tokens = torch.empty(shape, dtype=torch.int64, device=source.memory.device)

    def step(self, tokens: Tensor) -> Tensor:
        """Logits [B·beams, V] of what follows `tokens` [B·beams] int64."""
        self._tokens = torch.cat([self._tokens, tokens[:, None]], 1)
        model, source = self._model, self._source
        hidden = model.decoder(
            model.embedding(self._tokens),
            self._tokens.shape,
            None,
            source.rows_per_group,
            None,
            RouterLosses(),
            source.memory,
            source.mask,
        )
        return _all_logits(model, hidden[:, -1:])

    def select(self, rows: Tensor) -> None:
        """Go on with row rows[i], [B·beams] int64, as row i."""
        self._tokens = self._tokens[rows]


def _all_logits(model: SwitchTransformer, hidden: Tensor) -> Tensor:
    """[B, V] of hidden [B, 1, d_model]."""
    logits = model.logits(hidden, hidden.shape[:2])[:, 0]
    return join_logits(logits, model.config.vocab_size, model.tp)
