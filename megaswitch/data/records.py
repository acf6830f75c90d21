"""Records out of task files: JSON lines, JSON documents, TSV and CSV, bare or compressed."""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from megaswitch.data.compression import bare
from megaswitch.data.text_files import read_lines
from megaswitch.log import UserError

Record = dict[str, Any]
_MAX_BYTES = 1 << 30  # of a JSON document, which is parsed whole
_TABLES = {".tsv": "\t", ".txt": "\t", ".csv": ","}
_LINES = {".jsonl", ".ndjson"}


def read_records(
    path: Path, *, columns: Collection[str] = (), fields: Collection[str] = ()
) -> Iterator[tuple[int, Record]]:
    """The records of a file, each with its line, counted from 1.

    `.jsonl` and `.ndjson` hold an object a line; `.json` likewise, or one object, or a list of
    them; `.tsv` (and `.txt`) has tabs and no quotes, `.csv` commas and quotes, both a header. A
    further suffix .gz or .zst means compressed.

    Args:
        path: the file.
        columns: names of a table's columns where its first line is no header.
        fields: names of which a header has at least one; only read if there are `columns`.

    Raises:
        UserError: the file is of another kind, damaged, or a line is not what it must be.
    """
    suffix = bare(path).suffix
    if suffix in _TABLES:
        return _table(path, _TABLES[suffix], columns, fields)
    if suffix in _LINES:
        return _json_lines(path)
    if suffix == ".json":
        return _json_document(path)
    raise UserError(
        f"'{path}' is no kind of file that examples are read from; give .jsonl, .json, .tsv or "
        ".csv, plain, .gz or .zst"
    )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(read_lines(path), 1):
        if line is None:
            raise UserError(f"line {number} of '{path}' is too long; split the file into lines")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"line {number} of '{path}' is not UTF-8; convert the file") from error
        yield number, text.rstrip("\r")


def _json_lines(path: Path) -> Iterator[tuple[int, Record]]:
    for number, line in _lines(path):
        if line.strip():
            yield number, _object(line, path, number)


def _object(line: str, path: Path, number: int) -> Record:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"line {number} of '{path}' is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise UserError(f"line {number} of '{path}' is not a JSON object; give one object a line")
    return record


def _json_document(path: Path) -> Iterator[tuple[int, Record]]:
    pieces, size = [], 0
    for _, line in _lines(path):
        pieces.append(line)
        size += len(line)
        if size > _MAX_BYTES:
            raise UserError(f"'{path}' is a JSON document of more than 1 GiB; give JSON lines")
    try:
        whole = json.loads("\n".join(pieces))
    except (ValueError, RecursionError):
        yield from _json_lines(path)
        return
    records = whole if isinstance(whole, list) else [whole]
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise UserError(f"entry {number} of '{path}' is not a JSON object")
        yield number, record


def _table(
    path: Path, separator: str, columns: Collection[str], fields: Collection[str]
) -> Iterator[tuple[int, Record]]:
    header: list[str] | None = None
    for number, cells in _rows(path, separator):
        if header is None:
            if not columns or set(cells) & set(fields):
                header = cells
                continue
            header = list(columns)
        if len(cells) != len(header):
            raise UserError(
                f"line {number} of '{path}' has {len(cells)} columns and the header "
                f"{len(header)}; remove or mend the line"
            )
        yield number, dict(zip(header, cells, strict=True))


def _rows(path: Path, separator: str) -> Iterator[tuple[int, list[str]]]:
    if separator == "\t":
        yield from ((n, line.split("\t")) for n, line in _lines(path) if line)
        return
    before = csv.field_size_limit(1 << 28)
    try:
        reader = csv.reader((f"{line}\n" for _, line in _lines(path)), strict=True)
        yield from ((reader.line_num, cells) for cells in reader if cells)
    except csv.Error as error:
        raise UserError(f"'{path}' is not CSV: {error}; give JSON lines instead") from error
    finally:
        csv.field_size_limit(before)
