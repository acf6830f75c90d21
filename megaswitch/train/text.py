"""Text-to-text around `generate`: prompts are encoded, batched, decoded, and blanks filled in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from megaswitch.checkpoint.manager import find_checkpoint, read_config
from megaswitch.data.prompts import fill, has_blanks
from megaswitch.data.span_corruption import EOS_ID, PAD_ID
from megaswitch.data.tokenizer import Tokenizer
from megaswitch.log import UserError
from megaswitch.model.switch_transformer import SwitchTransformer
from megaswitch.train.generate import Decoding, accompany, generate, stream
from megaswitch.train.memory import enough_memory

_REMEDY = "use a smaller --max-tokens, --beams or --batch-size, or shorter prompts"


@dataclass(frozen=True)
class Completion:
    """A prompt and what the model made of it.

    Attributes:
        prompt: as given.
        output: the model's text, sentinels in it as `<extra_id_n>`.
        score: log-probability of the output; see `Generated`.
    """

    prompt: str
    output: str
    score: float

    @property
    def text(self) -> str:
        """The prompt with its blanks filled in; of a prompt without blanks, the output."""
        return fill(self.prompt, self.output) if has_blanks(self.prompt) else self.output


def checkpoint_tokenizer(path: Path, given: Path | None) -> Tokenizer:
    """The tokenizer of the checkpoint or run `path`, or the one `given` instead.

    Raises:
        UserError: there is none, or it is not the model's.
    """
    checkpoint = find_checkpoint(path)
    kept = checkpoint / "tokenizer.model"
    if given is None and not kept.is_file():
        raise UserError(
            f"{checkpoint} holds no tokenizer: it was trained without data.tokenizer. Give the "
            "SentencePiece model that made its data with --tokenizer FILE"
        )
    tokenizer = Tokenizer(given or kept)
    vocab_size = read_config(checkpoint).model.vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer.path} has {tokenizer.vocab_size} ids and the model of "
            f"{checkpoint} {vocab_size}: give the tokenizer that it was trained with"
        )
    if kept.is_file() and (own := Tokenizer(kept).sha256) != tokenizer.sha256:
        raise UserError(
            f"the tokenizer {tokenizer.path} (sha256 {tokenizer.sha256[:12]}…) is not the one that "
            f"the model of {checkpoint} was trained with ({own[:12]}…), so its ids mean other text "
            "to the model: leave --tokenizer out"
        )
    return tokenizer


class TextGenerator:
    """A model that answers text.

    Args:
        model: on its device.
        tokenizer: the one that made its data.
        decoding: how to decode.
        precision: to compute in.
    """

    def __init__(
        self,
        model: SwitchTransformer,
        tokenizer: Tokenizer,
        decoding: Decoding,
        precision: torch.dtype = torch.float32,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.precision = precision
        self.device = model.embedding.weight.device
        self.can_stream = decoding.beams == 1
        self._settings = asdict(decoding)
        self._alone = model.ep.size == model.tp.size == 1

    def complete(self, prompts: Sequence[str], first: int = 0) -> list[Completion]:
        """Answer a batch of prompts; `first` is the first one's number, which decides its draws."""
        tokens, mask = self._encode(prompts)
        with self._passes():
            result = generate(
                self.model,
                tokens,
                encoder_mask=mask,
                sample_index=torch.arange(first, first + len(prompts), device=self.device),
                **self._settings,
            )
        outputs = [self.tokenizer.decode(row) for row in result.tokens.tolist()]
        return [
            Completion(*parts)
            for parts in zip(prompts, outputs, result.scores.tolist(), strict=True)
        ]

    def stream(self, prompt: str, index: int = 0) -> Iterator[str]:
        """The growing output to prompt number `index`, whole each time; no beams."""
        tokens, mask = self._encode([prompt])
        row: list[int] = []
        with self._passes():
            for step in stream(
                self.model,
                tokens,
                encoder_mask=mask,
                sample_index=torch.tensor([index], device=self.device),
                **self._settings,
            ):
                row.append(int(step))
                yield self.tokenizer.decode(row)

    def accompany(self) -> None:
        """Take part where ranks that share experts with this one `complete` or `stream`."""
        if self.model.ep.size == 1:
            return
        with self._passes():
            accompany(self.model, self.device, **self._settings)

    def _encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Tokens [B, L], each row closed by EOS and padded, and their mask if any is padded."""
        rows = [[*self.tokenizer.encode(prompt), EOS_ID] for prompt in prompts]
        length = max(map(len, rows))
        padded = [row + [PAD_ID] * (length - len(row)) for row in rows]
        tokens = torch.tensor(padded, device=self.device)
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        mask = torch.arange(length, device=self.device) < lengths[:, None]
        return tokens, None if all(len(row) == length for row in rows) else mask

    @contextmanager
    def _passes(self) -> Iterator[None]:
        enabled = self.precision != torch.float32
        with (
            torch.autocast(self.device.type, self.precision, enabled=enabled),
            enough_memory(_REMEDY, alone=self._alone),
        ):
            yield
