"""What is given to be evaluated: named corpora, and text that becomes one for the time being."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megaswitch import native
from megaswitch.data.blocks import is_json_lines
from megaswitch.data.compression import bare
from megaswitch.data.encode_files import encode_files
from megaswitch.data.encoding import Encoder
from megaswitch.data.indexed import IndexedWriter, TokenStore, companion, token_dtype
from megaswitch.data.text_files import RejectionLog
from megaswitch.data.text_to_text import FIELDS
from megaswitch.data.tokenizer import Tokenizer
from megaswitch.log import UserError, warn

# A field with more values tells documents apart, not languages or sites.
_MOST_VALUES = 10_000
# Rows of a table that a person reads; rarer values share one.
_MOST_SOURCES = 256
_OTHERS = "(other)"
_SHOWN = 5


@dataclass(frozen=True)
class DataFile:
    """One DATA argument.

    Attributes:
        name: of the source, given or taken from the file's name.
        path: of a text file, or the prefix of a `.bin`/`.idx` pair, or of a corpus of text pairs.
        is_text: a text file.
        named: the name was given.
    """

    name: str
    path: Path
    is_text: bool
    named: bool

    @property
    def token_prefixes(self) -> list[Path]:
        """Of its `.bin`/`.idx` pairs: none of a text, two of a corpus of text pairs."""
        if self.is_text:
            return []
        return _text_pairs(self.path) or [self.path]


@dataclass(frozen=True)
class Source:
    """A token corpus with the name that its figures go by."""

    name: str
    prefix: Path


@dataclass
class _Part:
    """Documents, by their places in the spool, that become one source."""

    documents: array[int] = field(default_factory=lambda: array("q"))
    tokens: int = 0


def parse_data(arguments: Sequence[str], by: str | None = None) -> list[DataFile]:
    """Find what each argument, PATH or NAME=PATH, names.

    A name that is not given is the file's without its suffixes for format and compression; files of
    the same name go by their folders too.

    Args:
        arguments: paths of text files, or of `.bin`/`.idx` pairs with or without the suffix.
        by: the field that JSON lines will be split by.

    Raises:
        UserError: naming all that are not there, cannot be told apart or cannot be split.
    """
    files = [_parse(argument) for argument in arguments]
    again = [f"'{path}'" for path, count in Counter(f.path for f in files).items() if count > 1]
    if again:
        raise UserError(f"given more than once: {_listed(again)}; give each file once.")
    twice = {name for name, count in Counter(f.name for f in files).items() if count > 1}
    files = [
        DataFile(f"{f.path.absolute().parent.name}/{f.name}", f.path, f.is_text, False)
        if f.name in twice and not f.named
        else f
        for f in files
    ]
    if by is not None:
        whole = [f"'{f.path}'" for f in files if not (f.is_text and is_json_lines(f.path))]
        if whole:
            raise UserError(
                f"--by {by} splits JSON lines (.jsonl, .ndjson, .json) by a field of theirs, and "
                f"{_listed(whole)} has none; leave --by out, or evaluate the others alone."
            )
        return files
    twice = {name for name, count in Counter(f.name for f in files).items() if count > 1}
    if twice:
        raise UserError(
            f"several sources are called {_listed(sorted(twice))}; give each a name of its own as "
            "NAME=PATH."
        )
    return files


def tokenize_sources(
    files: Sequence[DataFile],
    tokenizer: Tokenizer,
    folder: Path,
    *,
    least_tokens: int,
    by: str | None = None,
    workers: int = 1,
) -> list[Source]:
    """Turn text files into corpora in `folder`, each as `preprocess` would make it.

    Args:
        files: the text files.
        tokenizer: the model's.
        folder: for the corpora and, meanwhile, as much again.
        least_tokens: what a source needs.
        by: field of JSON lines; each of its values, over all files, is a source, sorted by name.
            Documents without it are one too, and so are values too rare to stand alone.
        workers: processes that tokenize.

    Raises:
        UserError: if a file cannot be read, a source is too short, `by` is in no document or has
            too many values, or the folder is full.
    """
    spool = folder / "spool"
    parts = _Parts(files, by)
    try:
        _tokenize(files, Encoder(tokenizer, by=by), spool, parts, workers)
        store = TokenStore(spool)
        sources = []
        for number, (name, part) in enumerate(parts.settled(least_tokens).items()):
            prefix = folder / f"source-{number}"
            _write(store, part, prefix, tokenizer)
            sources.append(Source(name, prefix))
    except OSError as error:
        raise UserError(
            f"the text cannot be tokenized into '{folder}': {error.strerror}. About twice the size "
            "of its tokens is needed there; the environment variable TMPDIR chooses another folder."
        ) from error
    for suffix in (".bin", ".idx"):
        companion(spool, suffix).unlink()
    return sources


class _Parts:
    """Sorts documents into sources as they are tokenized."""

    def __init__(self, files: Sequence[DataFile], by: str | None) -> None:
        self.by = by
        # Without a field every file is a source, also one that turns out to be empty.
        self.parts = {} if by else {file.name: _Part() for file in files}
        self.documents = 0
        self.labelled = False

    def add(self, file: DataFile, label: str | None, tokens: int) -> None:
        """Take in the next document of the spool."""
        part = self.parts.setdefault(self._name(file, label), _Part())
        if self.by and len(self.parts) > _MOST_VALUES:
            raise UserError(
                f"the field {self.by!r} has more than {_MOST_VALUES:,} values; --by wants one that "
                "many documents share, such as a language or a site."
            )
        part.documents.append(self.documents)
        part.tokens += tokens
        self.documents += 1

    def _name(self, file: DataFile, label: str | None) -> str:
        if self.by is None:
            return file.name
        self.labelled |= label is not None
        value = nameless = f"(no {self.by})"
        if label is not None:  # one like a name of ours is told apart by quotes
            ours = label in (_OTHERS, nameless)
            value = json.dumps(label) if ours else label
        return f"{file.name}/{value}" if file.named else value

    def settled(self, least_tokens: int) -> dict[str, _Part]:
        """The sources, every one long enough."""
        if self.by is None:
            short = [f"{name} ({p.tokens})" for name, p in self.parts.items()
                     if p.tokens < least_tokens]  # fmt: skip
            if short:
                raise UserError(
                    f"one sample takes {least_tokens} tokens, and fewer are in {_listed(short)}; "
                    "give more text, leave these out, or choose a smaller --encoder-length."
                )
            return self.parts
        if not self.labelled:
            raise UserError(
                f"no document has a value in the field {self.by!r}; --by wants the name of a field "
                "of the JSON lines."
            )
        return self._with_rare_together(least_tokens)

    def _with_rare_together(self, least_tokens: int) -> dict[str, _Part]:
        by_size = sorted(self.parts, key=lambda name: -self.parts[name].tokens)
        alone = {n for n in by_size[:_MOST_SOURCES] if self.parts[n].tokens >= least_tokens}
        settled = {name: self.parts[name] for name in sorted(alone)}
        rare = [name for name in by_size if name not in alone]
        if not rare:
            return settled
        # In the order of the spool, whatever the order of the values.
        places = sorted(place for name in rare for place in self.parts[name].documents)
        others = _Part(array("q", places), sum(self.parts[name].tokens for name in rare))
        if others.tokens < least_tokens and not settled:
            raise UserError(
                f"one sample takes {least_tokens} tokens, and all documents together have "
                f"{others.tokens}; give more text or choose a smaller --encoder-length."
            )
        fate = f"are together under {_OTHERS}"
        if others.tokens < least_tokens:
            fate = "are left out: together they are too short for one sample"
        else:
            settled[_OTHERS] = others
        warn(
            f"{len(rare)} of {len(self.parts)} values of {self.by!r} have fewer than the "
            f"{least_tokens} tokens of a sample or are beyond the {_MOST_SOURCES} largest, and "
            f"{fate}: {_listed(rare)}"
        )
        return settled


def _tokenize(
    files: Sequence[DataFile], encoder: Encoder, spool: Path, parts: _Parts, workers: int
) -> None:
    """Write all documents as they come, and sort them into parts."""
    rejections = RejectionLog()
    paths = [file.path for file in files]
    with (
        IndexedWriter(spool, token_dtype(encoder.tokenizer.vocab_size)) as writer,
        closing(encode_files(paths, encoder, workers=workers)) as blocks,
    ):
        for encoded in blocks:
            (column,) = encoded.columns
            column.write_to(writer)
            labels = encoded.labels if encoder.by else [None] * encoded.documents
            for label, tokens in zip(labels, column.lengths.tolist(), strict=True):
                parts.add(files[encoded.source], label, tokens)
            rejections.extend(encoded.rejections)
    if parts.documents == 0:
        raise UserError(
            f"the inputs hold no usable document ({rejections.summary()}). Give JSONL with the "
            "text under 'text', or plain text."
        )
    if rejections.count:
        warn(rejections.summary())


def _write(spool: TokenStore, part: _Part, prefix: Path, tokenizer: Tokenizer) -> None:
    """Write a part shuffled as `preprocess` shuffles."""
    count = len(part.documents)
    order = native.permute(np.arange(count), size=count, seed=0, epoch=0)
    with IndexedWriter(prefix, spool.dtype, tokenizer=tokenizer.info) as writer:
        for place in order:
            writer.add_document(spool.document(part.documents[int(place)]))


def _parse(argument: str) -> DataFile:
    found = _find(Path(argument))
    name, equals, rest = argument.partition("=")
    if found is None and equals and name and "/" not in name:
        found = _find(Path(rest))
        if found:
            return DataFile(name, *found, named=True)
    if found is None:
        missing = rest if equals and "/" not in name else argument
        raise UserError(
            f"there is no data '{missing}'; give the prefix of a .bin/.idx pair of `megaswitch "
            "preprocess`, or a text file (.jsonl, .txt, .parquet, plain, .gz, .xz or .zst), or "
            "NAME=PATH of one."
        )
    path, is_text = found
    name = bare(path).stem if is_text else path.name
    return DataFile(name, path, is_text, named=False)


def _find(path: Path) -> tuple[Path, bool] | None:
    """(prefix or text file, whether it is text), or None where there is neither."""
    pair = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    present = [companion(pair, suffix).is_file() for suffix in (".bin", ".idx")]
    if all(present) or (any(present) and not path.is_file()) or (any(present) and pair != path):
        return pair, False
    if path.is_file():
        return path, True
    return (path, False) if _text_pairs(path) else None


def _text_pairs(prefix: Path) -> list[Path]:
    """The prefixes of both corpora of text pairs, if that is what `prefix` names."""
    both = [companion(prefix, f"_{field}") for field in FIELDS]
    is_plain = companion(prefix, ".idx").is_file()
    return [] if is_plain or not all(companion(p, ".idx").is_file() for p in both) else both


def _listed(names: Iterable[str]) -> str:
    """The first few of the names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
