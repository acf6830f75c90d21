"""`megaswitch inspect` of token files: a corpus, or both of a corpus of pairs.

Indexes are mapped and read in pieces.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaswitch.cli.show import histogram, print_fields, print_lines, size
from megaswitch.data.indexed import TokenizerInfo, TokenStore, companion
from megaswitch.data.loader import SpanCorruptionLoader
from megaswitch.data.text_to_text import FIELDS
from megaswitch.data.tokenizer import Tokenizer
from megaswitch.files import sha256
from megaswitch.log import UserError

_DOCUMENTS = 1 << 20  # lengths in memory at a time
_ID_BUDGET, _WINDOW = 1 << 24, 1 << 16  # tokens whose ids are looked at, and how many at a time
_SENTINELS = 100
_ENCODER_LENGTH = 512  # T5's; its samples have 114 decoder positions
_SHOWN_LENGTH, _SHOWN_SAMPLES = 64, 2  # of samples that a person reads
_MOST_IDS = 1 << 24  # a larger id is no token's; their counts are not kept
# Duplicates are counted where that costs seconds.
_CHEAP_TOKENS, _CHEAP_DOCUMENTS = 1 << 26, 1 << 20
_SHOWN_DOCUMENTS, _SHOWN_TOKENS = 3, 60


def data_report(
    prefix: Path, *, tokenizer: Path | None, check_sums: bool, num_shown: int = _SHOWN_DOCUMENTS
) -> dict[str, Any]:
    """Everything that a pair of token files says of itself.

    Args:
        prefix: of the files.
        tokenizer: with which the first documents are decoded.
        check_sums: compare the `.bin` with its SHA-256 in the sidecar.
        num_shown: documents to decode.

    Raises:
        UserError: the files are damaged or do not belong together, or to the tokenizer.
    """
    reader = _open_tokenizer(prefix, tokenizer) if tokenizer else None
    store = TokenStore(prefix)
    report = {"kind": "data"} | _files(store, check_sums, reader)
    report["duplicates"] = _duplicates([store])
    report["training"] = _training(store, report["ids"]["max"])
    if reader:
        starts = range(min(num_shown, store.num_documents))
        report["first_documents"] = [_text(store, i, reader) for i in starts]
        report["samples"] = _samples(prefix, reader)
    return report


def pairs_report(
    prefix: Path, *, tokenizer: Path | None, check_sums: bool, num_shown: int = _SHOWN_DOCUMENTS
) -> dict[str, Any]:
    """Everything that the token files of `preprocess --pairs` say of themselves.

    Args:
        prefix: without `_inputs` and `_targets`.
        tokenizer: with which the first pairs are decoded.
        check_sums: compare each `.bin` with its SHA-256 in the sidecar.
        num_shown: pairs to decode.

    Raises:
        UserError: as for `data_report`, or the two are no pairs.
    """
    prefixes = [companion(prefix, f"_{field}") for field in FIELDS]
    readers = [_open_tokenizer(p, tokenizer) if tokenizer else None for p in prefixes]
    stores = [TokenStore(p) for p in prefixes]
    inputs, targets = (store.num_documents for store in stores)
    if inputs != targets:
        raise UserError(
            f"'{prefixes[0]}' has {inputs} documents and '{prefixes[1]}' {targets}, and document k "
            "of one must belong to document k of the other. Write both anew with `megaswitch "
            "preprocess --pairs`"
        )
    report: dict[str, Any] = {"kind": "pairs", "path": str(prefix), "pairs": inputs}
    report["duplicates"] = _duplicates(stores)
    for field, store, reader in zip(FIELDS, stores, readers, strict=True):
        report[field] = _files(store, check_sums, reader)
    reader = readers[0]
    if reader:
        report["first_pairs"] = [
            {f: _text(store, i, reader) for f, store in zip(FIELDS, stores, strict=True)}
            for i in range(min(num_shown, inputs))
        ]
    return report


def _files(store: TokenStore, check_sums: bool, reader: Tokenizer | None) -> dict[str, Any]:
    """What is to be said of any pair of token files."""
    if check_sums:
        _check_sum(store)
    return {
        "path": str(store.prefix),
        "documents": store.num_documents,
        "sequences": store.num_sequences,
        "tokens": store.num_tokens,
        "dtype": store.dtype.name,
        "bytes": {s: companion(store.prefix, s).stat().st_size for s in (".bin", ".idx")},
        "verified": check_sums,
        "sidecar": asdict(store.meta) if store.meta else None,
        "ids": _ids(store, store.meta or (reader.info if reader else None)),
        "lengths": _lengths(store),
    }


def _open_tokenizer(prefix: Path, path: Path) -> Tokenizer:
    tokenizer, meta = Tokenizer(path), TokenStore(prefix).meta
    if meta and meta.tokenizer_sha256 != tokenizer.sha256:
        raise UserError(
            f"--tokenizer {path} (sha256 {tokenizer.sha256[:16]}…) did not make {prefix}; its "
            f"sidecar names {meta.tokenizer_sha256[:16]}…. Give that file"
        )
    return tokenizer


def _check_sum(store: TokenStore) -> None:
    file = companion(store.prefix, ".bin")
    if store.meta is None:
        raise UserError(
            f"{store.prefix} has no .meta.json, so there is no sum to compare {file} with; leave "
            "out --verify, or preprocess the text again with `megaswitch preprocess`"
        )
    found = sha256(file)
    if found != store.meta.content_sha256:
        raise UserError(
            f"{file} has the SHA-256 {found[:16]}…, and its sidecar says "
            f"{store.meta.content_sha256[:16]}…: it has changed; copy or preprocess it again"
        )


def _text(store: TokenStore, index: int, tokenizer: Tokenizer) -> dict[str, Any]:
    start, length = store.native.document(index)
    shown = store.tokens(start, min(length, _SHOWN_TOKENS))
    return {"tokens": length, "text": tokenizer.decode(shown.tolist()), "cut": length > len(shown)}


def _samples(prefix: Path, tokenizer: Tokenizer) -> list[dict[str, str]]:
    """Short samples of span corruption: the text, and what encoder and decoder get of it."""
    try:
        loader = SpanCorruptionLoader(
            prefix,
            seed=0,
            vocab_size=tokenizer.vocab_size,
            encoder_length=_SHOWN_LENGTH,
            tokenizer=tokenizer.info,
        )
    except UserError:  # too little text for one; `training` says so of larger samples
        return []
    count = min(_SHOWN_SAMPLES, loader.samples_per_epoch)
    batch = loader.batch(range(count))
    samples = []
    for row in range(count):
        text = loader.store.tokens(loader.sample_start(row), loader.tokens_per_sample)
        samples.append(
            {
                "text": tokenizer.decode(text.tolist()),
                "inputs": tokenizer.decode(batch.encoder_tokens[row].tolist()),
                "targets": tokenizer.decode(batch.decoder_targets[row].tolist()),
            }
        )
    return samples


def _ids(store: TokenStore, made_with: TokenizerInfo | None) -> dict[str, Any]:
    """Which ids occur: of all tokens, or of evenly spread ones in a large corpus."""
    tokens = store.num_tokens
    all_read = tokens <= _ID_BUDGET
    low, high = store.native.id_range(_ID_BUDGET) if tokens else (0, 0)
    used = unknown = None
    if low >= 0 and high < _MOST_IDS:
        counts = np.zeros(high + 1, dtype=np.int64)
        for start in range(0, tokens, _WINDOW if all_read else tokens * _WINDOW // _ID_BUDGET):
            window = store.tokens(start, min(_WINDOW, tokens - start))
            # A rare id above those that were sampled for `high` is no more than rare.
            counts += np.bincount(window[window <= high], minlength=high + 1)
        used = int(np.count_nonzero(counts))
        unknown = float(counts[2:3].sum() / max(counts.sum(), 1))
    return {
        "min": low,
        "max": high,
        "all_read": all_read,
        "used": used,
        "of": made_with and made_with.vocab_size - made_with.num_extra_ids,
        "unknown_share": unknown,
    }


def document_lengths(store: TokenStore) -> Iterator[NDArray[np.int64]]:
    """Tokens of every document, in pieces of bounded size."""
    for start in range(0, store.num_documents, _DOCUMENTS):
        yield store.document_lengths(start, min(_DOCUMENTS, store.num_documents - start))


def quantile(pieces: Callable[[], Iterator[NDArray[np.int64]]], rank: int) -> int:
    """The value at `rank` (from 0) in sorted order, exact, in constant memory.

    Found 16 bits at a time, from the top, with a pass over the values for each.
    """
    value = 0
    for shift in (32, 16, 0):
        counts = np.zeros(1 << 16, dtype=np.int64)
        for piece in pieces():
            here = piece[piece >> (shift + 16) == value]
            counts += np.bincount(here >> shift & 0xFFFF, minlength=1 << 16)
        ends = np.cumsum(counts)
        digit = int(np.searchsorted(ends, rank, side="right"))
        rank -= int(ends[digit - 1]) if digit else 0
        value = value << 16 | digit
    return value


def _lengths(store: TokenStore) -> dict[str, Any] | None:
    """Tokens per document."""
    documents = store.num_documents
    if not documents:
        return None
    bins = np.zeros(64, dtype=np.int64)  # bin b holds lengths of b bits: [2^(b-1), 2^b)
    empty, low, high = 0, np.iinfo(np.int64).max, 0
    for piece in document_lengths(store):
        empty += int((piece == 0).sum())
        low, high = min(low, int(piece.min())), max(high, int(piece.max()))
        bits = np.frexp(piece.astype(np.float64))[1]
        bins += np.bincount(bits, minlength=64)
    used = np.nonzero(bins)[0]
    return {
        "min": low,
        "median": quantile(lambda: document_lengths(store), (documents - 1) // 2),
        "mean": store.num_tokens / documents,
        "p99": quantile(lambda: document_lengths(store), (documents - 1) * 99 // 100),
        "max": high,
        "empty": empty,
        "histogram": [
            {"from": int(2 ** (b - 1)) if b else 0, "below": int(2**b), "documents": int(bins[b])}
            for b in range(int(used[0]), int(used[-1]) + 1)
        ],
    }


def _duplicates(stores: Sequence[TokenStore]) -> int | None:
    """Documents, or pairs of documents, equal to an earlier one; None where counting is not cheap.

    Empty ones do not count.
    """
    documents = stores[0].num_documents
    if sum(s.num_tokens for s in stores) > _CHEAP_TOKENS or documents > _CHEAP_DOCUMENTS:
        return None
    seen: set[bytes] = set()
    repeated = 0
    for index in range(documents):
        parts = [store.document(index) for store in stores]
        if not any(map(len, parts)):
            continue
        digest = hashlib.blake2b(digest_size=16)
        for part in parts:
            digest.update(len(part).to_bytes(8, "little") + part.astype("<i8").tobytes())
        repeated += digest.digest() in seen
        seen.add(digest.digest())
    return repeated


def _training(store: TokenStore, highest: int) -> dict[str, Any]:
    """Samples of T5's shape that an epoch has, or why there are none."""
    # Without a sidecar the vocabulary is unknown: the samples can be counted, not fingerprinted.
    stand_in = None if store.meta else TokenizerInfo("", highest + 1 + _SENTINELS, _SENTINELS)
    sizes = store.meta or stand_in
    assert sizes
    try:
        loader = SpanCorruptionLoader(
            store.prefix,
            seed=0,
            vocab_size=sizes.vocab_size,
            encoder_length=_ENCODER_LENGTH,
            tokenizer=stand_in,
        )
    except UserError as error:
        return {"samples": 0, "fingerprint": None, "problem": str(error)}
    return {
        "samples": loader.samples_per_epoch,
        "encoder_length": loader.encoder_length,
        "decoder_length": loader.decoder_length,
        "tokens_per_sample": loader.tokens_per_sample,
        "fingerprint": loader.fingerprint if store.meta else None,
    }


def print_data(report: dict[str, Any]) -> None:
    """Show a report of `data_report` to people."""
    more = [
        ("training", _describe_training(report["training"])),
        ("fingerprint", _describe_fingerprint(report["training"])),
        ("repeated documents", _describe_duplicates(report)),
    ]
    _print_files(f"Tokens {report['path']}", report, more)
    for number, document in enumerate(report.get("first_documents", ()), 1):
        print_fields(f"Document {number}, {document['tokens']:,} tokens", [("", _shown(document))])
    for number, sample in enumerate(report.get("samples", ())):
        print_fields(f"Sample {number} of {_SHOWN_LENGTH} encoder tokens", sample.items())


def print_pairs(report: dict[str, Any]) -> None:
    """Show a report of `pairs_report` to people."""
    fields = [("pairs", f"{report['pairs']:,}"), ("repeated pairs", _describe_duplicates(report))]
    print_fields(f"Pairs {report['path']}", fields)
    for field in FIELDS:
        _print_files(f"{field.capitalize()} {report[field]['path']}", report[field], [])
    for number, pair in enumerate(report.get("first_pairs", ()), 1):
        shown = [(f"{f}, {pair[f]['tokens']:,} tokens", _shown(pair[f])) for f in FIELDS]
        print_fields(f"Pair {number}", shown)


def _print_files(
    title: str, report: dict[str, Any], more: Sequence[tuple[str, str | None]]
) -> None:
    files, ids, sidecar = report["bytes"], report["ids"], report["sidecar"]
    lengths = report["lengths"]
    read = "" if ids["all_read"] else f" (of some {_ID_BUDGET:,} tokens)"
    print_fields(
        title,
        [
            ("documents", f"{report['documents']:,} in {report['sequences']:,} sequences"),
            ("tokens", f"{report['tokens']:,} of type {report['dtype']}"),
            ("files", f".bin {size(files['.bin'])}, .idx {size(files['.idx'])}"
                      + ("; the sum of the .bin matches" if report["verified"] else "")),
            ("ids", f"{ids['min']:,} to {ids['max']:,}{read}"),
            ("vocabulary", _describe_coverage(ids)),
            ("tokenizer", _describe_sidecar(sidecar)),
            ("content", sidecar and f"sha256 {sidecar['content_sha256'][:16]}…"),
            ("empty documents", lengths and f"{lengths['empty']:,}"),
            *more,
        ],
    )  # fmt: skip
    if lengths:
        numbers = ", ".join(
            f"{k} {lengths[k]:,.0f}" for k in ("min", "median", "mean", "p99", "max")
        )
        labels = [f"{b['from']:,} – {b['below'] - 1:,}" for b in lengths["histogram"]]
        counts = [b["documents"] for b in lengths["histogram"]]
        print_lines(f"Tokens per document: {numbers}", histogram(labels, counts))


def _shown(document: dict[str, Any]) -> str:
    return document["text"] + (" …" if document["cut"] else "")


def _describe_duplicates(report: dict[str, Any]) -> str:
    found = report["duplicates"]
    return f"{found:,}" if found is not None else "not counted in a corpus this large"


def _describe_coverage(ids: dict[str, Any]) -> str | None:
    if ids["used"] is None:
        return None
    of = f" of {ids['of']:,} ids of text ({ids['used'] / ids['of']:.1%})" if ids["of"] else " ids"
    return f"{ids['used']:,}{of} occur; {ids['unknown_share']:.3%} of tokens are unknown (id 2)"


def _describe_sidecar(sidecar: dict[str, Any] | None) -> str:
    if sidecar is None:
        return "unknown: there is no .meta.json"
    return (
        f"{sidecar['vocab_size']:,} ids, {sidecar['num_extra_ids']} of them sentinels, sha256 "
        f"{sidecar['tokenizer_sha256'][:16]}…, made by {sidecar['created_by']}"
    )


def _describe_training(training: dict[str, Any]) -> str:
    if "problem" in training:
        return f"no sample of T5's shape: {training['problem']}"
    return (
        f"{training['samples']:,} samples an epoch of {training['tokens_per_sample']} tokens "
        f"(encoder {training['encoder_length']}, decoder {training['decoder_length']})"
    )


def _describe_fingerprint(training: dict[str, Any]) -> str | None:
    if training["fingerprint"] is None:
        return None
    return f"{training['fingerprint']} (at this shape and seed 0)"
