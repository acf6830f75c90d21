"""SentencePiece tokenizers with T5's conventions: pad 0, EOS 1, unknown 2, sentinels on top.

`<extra_id_0>` is the highest id of the vocabulary, `<extra_id_1>` the one below, and so on. A model
file holds the text's pieces only, as T5's does, or ends with the sentinels, as mT5's.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from megaswitch.data.blocks import check_inputs
from megaswitch.data.indexed import TokenizerInfo
from megaswitch.data.special_ids import EOS_ID, PAD_ID, UNK_ID
from megaswitch.data.text_files import TEXT, RejectionLog, read_documents
from megaswitch.log import UserError, warn

SENTINEL = re.compile(r"<extra_id_(\d{1,6})>")
# SentencePiece passes over sentences of more than 4,192 bytes; a character has up to 4.
_MAX_SENTENCE_CHARACTERS = 1_000
_TRAINING_SENTENCES = 10_000_000  # drawn from larger corpora; T5 used as many
_TRAINING_SEED = 1
_CONTROL_AND_BYTES = 3 + 256  # ids that every tokenizer has: pad, EOS, unknown; a piece per byte
MAX_MODEL_BYTES = 1 << 28  # those of a million pieces have 25 MB
# SentencePiece's own limits; beyond them it speaks of lines of its source.
_MIN_COVERAGE = 0.98
_MAX_THREADS = 1024
_NO_TEXT = re.compile(r"sentences_\.empty\(\)|all_chars_count")
_SOURCE_LINE = re.compile(r"^\w+: \S+\(\d+\) \[.*\] ")


def train_tokenizer(
    inputs: Sequence[Path],
    output: Path,
    *,
    vocab_size: int,
    num_sentinels: int = 100,
    character_coverage: float = 0.9995,
    threads: int = 1,
    text_field: str = TEXT,
) -> None:
    """Train a unigram model with byte fallback; same inputs and threads give the same file.

    Args:
        inputs: JSONL, plain text or Parquet, optionally .gz, .xz or .zst; streamed.
        output: the model file to write.
        vocab_size: ids in all, `num_sentinels` of them sentinels, which are not in the file.
        num_sentinels: to be given to `Tokenizer` as `num_extra_ids`.
        character_coverage: share of characters that get pieces, 0.98 to 1; the rest become bytes.
        threads: threads of SentencePiece, 1 to 1024.
        text_field: of JSON objects and of Parquet rows.

    Raises:
        UserError: if a number is out of range, inputs are missing, damaged or without text, or do
            not suit `vocab_size`, or the output cannot be written.
    """
    _check_numbers(vocab_size, num_sentinels, character_coverage, threads)
    check_inputs(inputs, (text_field,))
    failures: list[Exception] = []
    rejections = RejectionLog()
    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(_TRAINING_SEED)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_caught(_sentences(inputs, rejections, text_field), failures),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size - num_sentinels,
            character_coverage=character_coverage,
            byte_fallback=True,
            pad_id=PAD_ID,
            eos_id=EOS_ID,
            unk_id=UNK_ID,
            bos_id=-1,
            input_sentence_size=_TRAINING_SENTENCES,
            shuffle_input_sentence=True,
            num_threads=threads,
            minloglevel=2,
        )
    except (RuntimeError, ValueError, OSError) as error:
        failures.append(error)
    if failures and isinstance(failures[0], UserError):
        raise failures[0]
    if failures:
        sizes = f"vocab_size {vocab_size}, of which {num_sentinels} sentinels"
        raise UserError(_explained(failures[0], sizes, rejections)) from failures[0]
    if rejections.count:
        warn(rejections.summary())
    _write_model(output, model.getvalue())


def _explained(failure: Exception, sizes: str, rejections: RejectionLog) -> str:
    """SentencePiece's failure in words for the user."""
    if _NO_TEXT.search(str(failure)):
        return (
            f"the inputs hold no usable text ({rejections.summary()}). Give JSONL with the text "
            "under 'text', or plain text, in UTF-8."
        )
    reason = _SOURCE_LINE.sub("", str(failure)).rstrip(". ")
    return (
        f"no tokenizer of {sizes}, can be trained on these inputs; SentencePiece says: {reason}. "
        "Its sizes do not count the sentinels. Choose a vocab_size within its limits or more text."
    )


def _check_numbers(
    vocab_size: int, num_sentinels: int, character_coverage: float, threads: int
) -> None:
    if vocab_size - num_sentinels <= _CONTROL_AND_BYTES:
        raise UserError(
            f"vocab_size is {vocab_size}; {num_sentinels} sentinels and {_CONTROL_AND_BYTES} ids "
            "for pad, EOS, unknown and the bytes come first, and text needs some as well. Choose "
            f"{num_sentinels + _CONTROL_AND_BYTES + 1} or more (T5: 32100)."
        )
    if not _MIN_COVERAGE <= character_coverage <= 1.0:
        raise UserError(
            f"character_coverage is {character_coverage}; SentencePiece takes [{_MIN_COVERAGE}, 1]."
            " Use 0.9995, or 1 for a small alphabet."
        )
    if not 1 <= threads <= _MAX_THREADS:
        raise UserError(f"threads is {threads}; it must lie in [1, {_MAX_THREADS}].")


def _write_model(output: Path, content: bytes) -> None:
    aside = output.with_name(output.name + ".partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            aside.write_bytes(content)
            aside.replace(output)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write the tokenizer '{output}': {error.strerror}. Choose a file in a folder "
            "that you may write to and that has room."
        ) from error


def _caught(sentences: Iterator[str], failures: list[Exception]) -> Iterator[str]:
    """The same sentences; an error ends them and is kept, as SentencePiece would swallow it."""
    try:
        yield from sentences
    except Exception as error:
        failures.append(error)


def _sentences(inputs: Iterable[Path], rejections: RejectionLog, text_field: str) -> Iterator[str]:
    for path in inputs:
        for document in read_documents(path, reject=rejections, text_field=text_field):
            for line in document.text.splitlines():
                yield from _pieces(line)


def _pieces(line: str) -> Iterator[str]:
    """The line in parts short enough for SentencePiece, cut at spaces where there are any."""
    while len(line) > _MAX_SENTENCE_CHARACTERS:
        cut = line.rfind(" ", 1, _MAX_SENTENCE_CHARACTERS)
        cut = cut if cut > 0 else _MAX_SENTENCE_CHARACTERS
        yield line[:cut]
        line = line[cut:]
    if line.strip():
        yield line


class Tokenizer:
    """Text to ids and back.

    Args:
        path: a SentencePiece model file.
        num_extra_ids: sentinels to put on top of the model's own ids (T5: 100); those that the
            model ends with count instead.

    Raises:
        UserError: if the file is missing, no model, or does not follow T5's conventions.
    """

    def __init__(self, path: str | Path, num_extra_ids: int = 100) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                content = file.read(MAX_MODEL_BYTES + 1)
        except OSError as error:
            raise UserError(
                f"cannot read the tokenizer '{path}': {error.strerror}. Give the path of a "
                "SentencePiece model, e.g. one written by `megaswitch tokenizer train`."
            ) from error
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            if len(content) > MAX_MODEL_BYTES:
                raise RuntimeError("the file is too large")
            self._model.LoadFromSerializedProto(content)
        except (RuntimeError, UnicodeDecodeError) as error:  # its messages quote the damaged bytes
            raise UserError(
                f"'{path}' is not a SentencePiece model, or is damaged. Copy or train it again."
            ) from error
        ids = (self._model.pad_id(), self._model.eos_id(), self._model.unk_id())
        if ids != (PAD_ID, EOS_ID, UNK_ID):
            raise UserError(
                f"'{path}' has the ids {ids} for pad, EOS and unknown, and must have "
                f"{(PAD_ID, EOS_ID, UNK_ID)} as T5 has. Train one with `megaswitch tokenizer "
                "train`."
            )
        self.pad_id, self.eos_id, self.unk_id = ids
        own = self._sentinels_in_file()
        self._text_size = self._model.get_piece_size() - own
        self.num_extra_ids = own or num_extra_ids
        self.sha256 = hashlib.sha256(content).hexdigest()

    def _sentinels_in_file(self) -> int:
        """How many of the model's last pieces are `<extra_id_n>`, with number 0 on top."""
        size = self._model.get_piece_size()
        for number in range(size):
            piece = self._model.id_to_piece(size - 1 - number)
            if piece.removeprefix("▁") != f"<extra_id_{number}>":
                return number
        return size

    @property
    def vocab_size(self) -> int:
        """Ids in all, sentinels included."""
        return self._text_size + self.num_extra_ids

    @property
    def info(self) -> TokenizerInfo:
        """What a corpus made with this tokenizer remembers of it."""
        return TokenizerInfo(self.sha256, self.vocab_size, self.num_extra_ids)

    def sentinel_id(self, number: int) -> int:
        """Id of `<extra_id_number>`; number 0 is the top of the vocabulary."""
        assert 0 <= number < self.num_extra_ids, (number, self.num_extra_ids)
        return self.vocab_size - 1 - number

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without EOS; `<extra_id_n>` in it becomes that sentinel."""
        ids: list[int] = []
        end = 0
        for match in SENTINEL.finditer(text):
            if int(match[1]) < self.num_extra_ids:
                ids += self._model.encode(text[end : match.start()])
                ids.append(self.sentinel_id(int(match[1])))
                end = match.end()
        return ids + self._model.encode(text[end:])

    def encode_batch(self, texts: Sequence[str], *, eos: bool = False) -> list[NDArray[np.int32]]:
        """Ids of many texts, for corpora: `<extra_id_n>` is text like any other.

        A corpus that could write sentinels would teach the model to take them for text.

        Args:
            texts: to encode.
            eos: end each with EOS.
        """
        return self._model.encode(list(texts), out_type="numpy", add_eos=eos, num_threads=1)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, sentinels as `<extra_id_n>`; pad and EOS vanish.

        Ids beyond the vocabulary, which a model of padded vocabulary can produce, are unknown.
        """
        parts: list[str] = []
        run: list[int] = []
        size = self._text_size
        for token in ids:
            if size <= token < self.vocab_size:
                parts += [self._model.decode(run), f"<extra_id_{self.vocab_size - 1 - token}>"]
                run = []
            else:
                run.append(token if 0 <= token < size else self.unk_id)
        parts.append(self._model.decode(run))
        return " ".join(part for part in parts if part)
