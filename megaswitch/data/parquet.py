"""Columns of texts out of Parquet files, a few rows at a time.

pyarrow is an optional extra, and this the only module that imports it. What a file claims about
itself is not believed: values are read as indices into their dictionary, as one large value that
thousands of rows repeat would fill the memory out of a small file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megaswitch.log import UserError

_BATCH_ROWS = 1 << 12
_MAX_COLUMN_BYTES = 1 << 31  # of a row group, packed or not; pyarrow holds one at a time

# The texts of a row, in UTF-8; None where there is none.
Row = tuple[bytes | None, ...]


def check(path: Path, fields: Sequence[str]) -> None:
    """Refuse a file that has no such columns of texts.

    Raises:
        UserError: if pyarrow is missing, or the file is damaged or has other columns.
    """
    with _explained(path):
        _open(path, fields).close()


def read_rows(
    path: Path,
    fields: Sequence[str],
    *,
    skip: int = 0,
    longest: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Iterator[Row | None]:
    """Stream the rows of a file.

    Args:
        path: the file.
        fields: names of the columns, in the order of the texts of a row.
        skip: rows to leave out at the beginning.
        longest: bytes of a text; None stands for a row with a longer one.
        advance: called with the number of bytes passed on disk since the last call, roughly.

    Raises:
        UserError: as `check`.
    """
    with _explained(path), _open(path, fields) as file:
        size = path.stat().st_size
        total, seen, told = max(1, file.metadata.num_rows), 0, 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if seen + rows <= skip:  # skipped without being read
                seen += rows
                continue
            _check_size(path, file.metadata.row_group(group), fields)
            batches = file.iter_batches(
                _BATCH_ROWS, row_groups=[group], columns=list(dict.fromkeys(fields)),
                use_threads=False,
            )  # fmt: skip
            for batch in batches:
                yield from _rows(batch, fields, max(0, skip - seen), longest)
                seen += len(batch)
                advance(min(size, size * seen // total) - told)
                told = min(size, size * seen // total)
        if seen != file.metadata.num_rows:
            raise UserError(
                f"'{path}' is corrupt: it speaks of {file.metadata.num_rows} rows and has {seen}. "
                "Download or write it again."
            )
        advance(size - told)


def _rows(batch: Any, fields: Sequence[str], skip: int, longest: int) -> Iterator[Row | None]:
    columns = [_texts(batch.column(field), longest) for field in fields]
    for row in range(skip, len(batch)):
        texts = tuple(column(row) for column in columns)
        yield None if any(text is ... for text in texts) else texts


def _texts(column: Any, longest: int) -> Callable[[int], Any]:
    """The text of each row of a dictionary-encoded column; Ellipsis where it is too long."""
    values = column.dictionary
    indices = column.indices.to_pylist()
    kept: dict[int, Any] = {}

    def text(row: int) -> Any:
        index = indices[row]
        if index is None:
            return None
        if index not in kept:
            if not 0 <= index < len(values):
                raise ValueError(f"there is no value {index} in the dictionary")
            buffer = values[index].as_buffer()
            if buffer is None:
                kept[index] = None
            else:
                kept[index] = ... if buffer.size > longest else buffer.to_pybytes()
        return kept[index]

    return text


def _check_size(path: Path, group: Any, fields: Sequence[str]) -> None:
    for number in range(group.num_columns):
        column = group.column(number)
        largest = max(column.total_compressed_size, column.total_uncompressed_size)
        if column.path_in_schema in fields and largest > _MAX_COLUMN_BYTES:
            raise UserError(
                f"'{path}' has a row group of {largest:,} bytes under '{column.path_in_schema}', "
                f"and {_MAX_COLUMN_BYTES:,} are the most that is read at a time. Write it again "
                "with smaller row groups."
            )


def _open(path: Path, fields: Sequence[str]) -> Any:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(
            f"'{path}' is a Parquet file, and pyarrow is not installed. Install it with "
            '`pip install "megaswitch[parquet]"`.'
        ) from error
    metadata = parquet.read_metadata(path)
    schema = metadata.schema.to_arrow_schema()
    for field in fields:
        if field not in schema.names:
            known = ", ".join(f"'{name}'" for name in schema.names[:10])
            raise UserError(
                f"'{path}' has no column '{field}'; its columns are {known or 'none'}. Name the "
                "one with the text with --text-field."
            )
        kind = schema.field(field).type
        text = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not any(
            test(text)
            for test in (
                pa.types.is_string, pa.types.is_large_string,
                pa.types.is_binary, pa.types.is_large_binary,
            )
        ):  # fmt: skip
            raise UserError(f"the column '{field}' of '{path}' is of type {kind}; it must be text.")
    return parquet.ParquetFile(
        path, metadata=metadata, read_dictionary=list(fields), pre_buffer=False
    )


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Errors of pyarrow, whose classes are subclasses of these, in words for the user."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError, NotImplementedError, MemoryError, OverflowError,
            TypeError) as error:  # fmt: skip
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"'{path}' cannot be read as Parquet ({reason}). Download or write it again."
        ) from error
