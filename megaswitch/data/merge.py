"""Corpora joined into one and cut into parts, document by document, in constant memory."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from fractions import Fraction
from math import ceil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megaswitch.data.indexed import IndexedWriter, TokenizerInfo, TokenStore, companion
from megaswitch.data.progress import progress
from megaswitch.log import UserError, info

_PIECE = 1 << 20  # tokens, or entries of an index, in memory at a time


@dataclass(frozen=True)
class Part:
    """A corpus written, or to be.

    Attributes:
        prefix: of its files.
        first: document of the source that is its first.
        stop: document of the source behind its last.
    """

    prefix: Path
    first: int
    stop: int


def merge(inputs: Sequence[Path], output: Path) -> None:
    """Write the documents of all corpora, one corpus after another, as one.

    Types that differ are widened to one that holds the ids of all. The sidecar counts and sums the
    whole anew; where no input has one, the output has none.

    Args:
        inputs: prefixes.
        output: prefix of the corpus; replaced if it exists.

    Raises:
        UserError: the inputs are damaged, repeated, made by different tokenizers, only some of them
            say by which, or one is the output.
    """
    again = [f"'{path}'" for path, count in Counter(map(_resolved, inputs)).items() if count > 1]
    if again:
        raise UserError(f"given more than once: {', '.join(again)}; give each corpus once.")
    if _resolved(output) in map(_resolved, inputs):
        raise UserError(f"the output '{output}' is an input too; choose another prefix for it.")
    stores = [TokenStore(path) for path in inputs]
    dtype = np.result_type(*(store.dtype for store in stores))
    with (
        progress("merging", sum(store.num_tokens for store in stores)) as advance,
        IndexedWriter(output, dtype, tokenizer=_common_tokenizer(stores)) as writer,
    ):
        for store in stores:
            _copy(store, 0, store.num_documents, writer, advance)
    info(f"wrote {output}: {writer.num_documents:,} documents, {writer.num_tokens:,} tokens "
         f"of type {dtype.name}")  # fmt: skip


def split(
    prefix: Path,
    output: Path,
    *,
    parts: int | None = None,
    documents: int | None = None,
    shares: Sequence[tuple[str, Fraction]] | None = None,
) -> list[Part]:
    """Cut a corpus between documents into parts that follow each other in it.

    All parts appear when the last is written. Exactly one of the keyword arguments says how to cut.

    Args:
        prefix: of the corpus.
        output: the parts are `<output>_00`, `<output>_01`, ..., or `<output>_<name>` by shares.
        parts: so many, of about equally many tokens.
        documents: of every part; the last may have fewer.
        shares: name and share of the tokens of each part, in the order of the corpus.

    Returns:
        the parts.

    Raises:
        UserError: the corpus is damaged or a part would have no document.
    """
    store = TokenStore(prefix)
    if shares is not None:
        names, ends = _cut_by_shares(store, shares)
    elif parts is not None:
        if parts < 1:
            raise UserError(f"--parts is {parts}; there must be at least 1.")
        ends = [_document_at(store, Fraction(i, parts)) for i in range(1, parts + 1)]
        names = _numbers(parts)
    else:
        assert documents is not None
        if documents < 1:
            raise UserError(f"--documents is {documents}; a part must have at least 1.")
        ends = [*range(documents, store.num_documents, documents), store.num_documents]
        names = _numbers(len(ends))
    found = [
        Part(companion(output, f"_{name}"), first, stop)
        for name, first, stop in zip(names, [0, *ends], ends, strict=False)
    ]
    empty = [f"'{part.prefix}'" for part in found if part.first == part.stop]
    if empty:
        raise UserError(
            f"'{prefix}' has {store.num_documents} documents, cut at their ends alone, and none is "
            f"left for {', '.join(empty[:5])}; ask for fewer or larger parts."
        )
    if _resolved(prefix) in (_resolved(part.prefix) for part in found):
        raise UserError(f"a part would replace '{prefix}' itself; choose another output.")
    _write_parts(store, found)
    return found


def parse_shares(words: Sequence[str]) -> list[tuple[str, Fraction]]:
    """Read `NAME=SHARE` words, such as train=0.99 and valid=0.01; the shares are exact.

    Raises:
        UserError: a word is not of this form, a name is repeated, or they do not add up to 1.
    """
    shares = []
    for word in words:
        name, _, number = word.partition("=")
        try:
            share = Fraction(number)
        except (ValueError, ZeroDivisionError):
            share = Fraction(0)
        if not name or "/" in name or share <= 0:
            raise UserError(f"--share {word} must be NAME=SHARE, such as valid=0.01.")
        shares.append((name, share))
    if len({name for name, _ in shares}) < len(shares):
        raise UserError(f"--share names a part twice: {', '.join(name for name, _ in shares)}.")
    total = sum(share for _, share in shares)
    if total != 1:
        raise UserError(f"the shares add up to {float(total):g}; they must to 1.")
    return shares


def _cut_by_shares(
    store: TokenStore, shares: Sequence[tuple[str, Fraction]]
) -> tuple[list[str], list[int]]:
    ends, sum_ = [], Fraction(0)
    for _, share in shares:
        sum_ += share
        ends.append(_document_at(store, sum_))
    return [name for name, _ in shares], ends


def _document_at(store: TokenStore, share: Fraction) -> int:
    """The first document boundary with at least this share of all tokens before it."""
    if share == 1:
        return store.num_documents  # empty ones at the end included
    wanted = ceil(share * store.num_tokens)
    return bisect_left(range(store.num_documents), wanted, key=lambda i: store.span(i, i + 1)[0])


def _numbers(count: int) -> list[str]:
    digits = max(2, len(str(count - 1)))
    return [f"{number:0{digits}}" for number in range(count)]


def _write_parts(store: TokenStore, parts: Sequence[Part]) -> None:
    tokenizer = _common_tokenizer([store])
    with progress("splitting", store.num_tokens) as advance, ExitStack() as all_or_none:
        for part in parts:
            writer = IndexedWriter(part.prefix, store.dtype, tokenizer=tokenizer)
            all_or_none.enter_context(writer)
            _copy(store, part.first, part.stop, writer, advance)
            writer.finish()
    for part in parts:
        tokens = store.span(part.first, part.stop)[1]
        info(f"wrote {part.prefix}: {part.stop - part.first:,} documents, {tokens:,} tokens")


def _copy(
    store: TokenStore,
    first: int,
    stop: int,
    writer: IndexedWriter,
    advance: Callable[[int], None],
) -> None:
    """Add documents [first, stop) of `store` to what `writer` writes."""
    if first == stop:
        return
    begin, end = (int(store.document_starts(at, 1)[0]) for at in (first, stop))
    start, count = store.span(first, stop)
    seen = 0

    def lengths() -> Iterator[NDArray[np.int64]]:
        nonlocal seen
        for at, size in _pieces(begin, end):
            piece = store.sequence_lengths(at, size)
            seen += int(piece.sum())
            yield piece

    def tokens() -> Iterator[NDArray[np.int64]]:
        for at, size in _pieces(start, start + count):
            yield store.tokens(at, size)
            advance(size)

    ends = (store.document_starts(at, size) - begin for at, size in _pieces(first + 1, stop + 1))
    writer.extend(tokens(), lengths(), ends)
    if seen != count:
        raise UserError(
            f"'{companion(store.prefix, '.idx')}' changed while it was read: its sequences had "
            f"{count} tokens and now have {seen}. Start again when nobody writes there."
        )


def _pieces(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """(start, size) of pieces of [start, stop)."""
    for at in range(start, stop, _PIECE):
        yield at, min(_PIECE, stop - at)


def _common_tokenizer(stores: Sequence[TokenStore]) -> TokenizerInfo | None:
    """Of all corpora; None where none of them says."""
    known = [(store.prefix, store.meta) for store in stores if store.meta is not None]
    if not known:
        return None
    first, meta = known[0]
    if len(known) < len(stores):
        unknown = next(store.prefix for store in stores if store.meta is None)
        raise UserError(
            f"'{first}' has a .meta.json and '{unknown}' has none, so nothing says that one "
            "tokenizer made both. Preprocess that one again; or, if you know it, set the "
            ".meta.json files of the others aside and train with data.tokenizer."
        )
    names = [field.name for field in fields(TokenizerInfo)]
    for prefix, other in known[1:]:
        for name in names:
            ours, theirs = getattr(meta, name), getattr(other, name)
            if ours != theirs:
                raise UserError(
                    f"'{first}' and '{prefix}' were made by different tokenizers: {name} is {ours} "
                    f"and {theirs}. Preprocess one of them again with the tokenizer of the other."
                )
    return TokenizerInfo(**{name: getattr(meta, name) for name in names})


def _resolved(prefix: Path) -> Path:
    return prefix.parent.resolve() / prefix.name
