"""Answers of a model to the examples of a task: written, or chosen by how likely they are.

Both are independent of the batch: experts take every token. Batches are dealt out to data-parallel
ranks, a round at a time; ranks that exchange tokens go in step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from megaswitch.data.span_corruption import EOS_ID, PAD_ID
from megaswitch.data.tasks import Example, Task
from megaswitch.data.tokenizer import Tokenizer
from megaswitch.layers.vocab import token_losses
from megaswitch.model.decoding import Source, encode
from megaswitch.model.switch_transformer import RouterLosses, SwitchTransformer
from megaswitch.parallel.mesh import Mesh
from megaswitch.train.generate import accompany, generate
from megaswitch.train.memory import enough_memory

# Rows that the decoder scores at a time, unless a single choice for each example is more.
_MOST_ROWS = 256
_NEVER = float("-inf")


@dataclass(frozen=True)
class Answer:
    """What a model answers.

    Attributes:
        prediction: the text.
        score: its log-probability, nats, EOS included.
        scores: of each choice, where it was one.
    """

    prediction: str
    score: float
    scores: tuple[float, ...] = ()


@dataclass(frozen=True)
class Answerer:
    """A model that answers, with what it takes to give it texts.

    Attributes:
        model: this rank's part of it.
        mesh: the ranks, without a pipeline.
        tokenizer: of its data.
        encoder_length: longest input, EOS included; what is longer loses its end, as in training.
        decoder_length: longest answer likewise.
        precision: to compute in.
        batch_size: examples of a rank at a time.
    """

    model: SwitchTransformer
    mesh: Mesh
    tokenizer: Tokenizer
    encoder_length: int
    decoder_length: int
    precision: torch.dtype
    batch_size: int

    def answers(
        self,
        task: Task,
        examples: Sequence[Example],
        advance: Callable[[int], None] = lambda _: None,
    ) -> list[Answer]:
        """Answers to all examples, in their order, on every rank; the model is in evaluation mode.

        Args:
            task: of the examples.
            examples: the same on all ranks.
            advance: called with the number of examples of each round.

        Raises:
            UserError: on every rank, if logits are not finite or there is too little memory.
        """
        most = max((len(e.choices) for e in examples), default=0)
        found: list[Answer] = []
        everyone = self.batch_size * self.mesh.dp.size
        for start in range(0, len(examples), everyone):
            first = start + self.mesh.dp.rank * self.batch_size
            batch = examples[first : first + self.batch_size]
            mine: list[Answer] = []
            with self.mesh.together(), self._passes():
                mine = self._rank(batch, most) if task.ranks else self._write(task, batch)
            # Tensor-parallel ranks have the same ones.
            for part in self.mesh.gather(mine if self.mesh.axis("tp").rank == 0 else []):
                found += part
            advance(min(everyone, len(examples) - start))
        return found

    @contextmanager
    def _passes(self) -> Iterator[None]:
        kind = self.mesh.device.type
        remedy = f"{self.batch_size} examples are too many for {kind}; use a smaller batch"
        with (
            torch.no_grad(),
            torch.autocast(kind, self.precision, enabled=self.precision != torch.float32),
            enough_memory(remedy, alone=not self.mesh.exchanges),
            _gathered(self.model),
        ):
            yield

    def _write(self, task: Task, batch: Sequence[Example]) -> list[Answer]:
        settings: dict[str, Any] = {
            "max_tokens": task.max_tokens or self.decoder_length,
            "beams": task.beams,
        }
        if not batch:
            if self.model.ep.size > 1:
                accompany(self.model, self.mesh.device, **settings)
            return []
        tokens, mask = self._inputs(batch)
        result = generate(self.model, tokens, encoder_mask=mask, **settings)
        texts = [self.tokenizer.decode(row) for row in result.tokens.tolist()]
        return [Answer(*pair) for pair in zip(texts, result.scores.tolist(), strict=True)]

    def _rank(self, batch: Sequence[Example], most: int) -> list[Answer]:
        """Score every choice by teacher forcing; each example is encoded once.

        Ranks that exchange tokens make as many passes, whatever the number of their examples.
        """
        if not batch and self.model.ep.size == 1:
            return []
        if batch:
            tokens, mask = self._inputs(batch)
        else:
            tokens, mask = torch.full((1, 1), EOS_ID, device=self.mesh.device), None
        source = encode(self.model, tokens, mask)
        at_a_time = max(1, _MOST_ROWS // self.batch_size)
        scores = [
            self._score(source, [self._choices(e, slice(s, s + at_a_time), most) for e in batch])
            for s in range(0, most, at_a_time)
        ]
        if not batch:
            return []
        table = torch.cat(scores, 1).tolist()
        answers = []
        for example, row in zip(batch, table, strict=True):
            row = row[: len(example.choices)]
            best = max(range(len(row)), key=row.__getitem__)  # the first of equals
            answers.append(Answer(example.choices[best], row[best], tuple(row)))
        return answers

    def _choices(self, example: Example, some: slice, most: int) -> list[list[int] | None]:
        """Tokens of some of the choices; None in the place of those that others have more."""
        rows = [self._cut(text, self.decoder_length) for text in example.choices[some]]
        places = len(range(*some.indices(most)))
        return rows + [None] * (places - len(rows))

    def _score(self, source: Source, choices: list[list[list[int] | None]]) -> Tensor:
        """Log-probabilities [B, C] of C choices for each row of the encoder."""
        rows = [row or [EOS_ID] for of_example in choices for row in of_example] or [[EOS_ID]]
        targets, mask = self._padded(rows)
        tokens = torch.nn.functional.pad(targets[:, :-1], (1, 0), value=PAD_ID)
        model, real = self.model, None if mask.all() else mask
        hidden = model.decoder(
            model.embedding(tokens), tokens.shape, real, source.rows_per_group, None,
            RouterLosses(), source.memory, source.mask,
        )  # fmt: skip
        logits = model.logits(hidden, tokens.shape)
        losses = token_losses(
            logits, targets, mask, tp=model.tp, vocab_size=model.config.vocab_size
        )
        scores = -losses.by_row.view(len(source.memory), -1)
        absent = [[row is None for row in of_example] for of_example in choices]
        if not absent:
            return scores
        return scores.masked_fill(torch.tensor(absent, device=scores.device), _NEVER)

    def _inputs(self, batch: Sequence[Example]) -> tuple[Tensor, Tensor | None]:
        tokens, mask = self._padded([self._cut(e.inputs, self.encoder_length) for e in batch])
        return tokens, None if mask.all() else mask

    def _cut(self, text: str, length: int) -> list[int]:
        return [*self.tokenizer.encode(text)[: length - 1], EOS_ID]

    def _padded(self, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        length = max(map(len, rows))
        tokens = torch.tensor([row + [PAD_ID] * (length - len(row)) for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(length) < lengths[:, None]
        return tokens.to(self.mesh.device), mask.to(self.mesh.device)


@contextmanager
def _gathered(model: SwitchTransformer) -> Iterator[None]:
    """All weights on each rank: decoding calls layers by themselves, which FSDP2 does not see."""
    sharded = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()
