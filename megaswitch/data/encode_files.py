"""Tokenizing whole files, in this process or in many, always in their order.

Processes rather than threads: SentencePiece lets go of the interpreter, but reading JSON does not,
and is a tenth of the work.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

from megaswitch.data.blocks import Block, Position, read_blocks
from megaswitch.data.encoding import Encoded, Encoder
from megaswitch.data.progress import progress
from megaswitch.data.workers import encode_in_processes
from megaswitch.log import UserError

_INLINE_BLOCKS = 8  # so few are done before other processes have started


def encode_files(
    inputs: Sequence[Path],
    encoder: Encoder,
    *,
    workers: int,
    begin: Callable[[int], Position | None] = lambda _: Position(),
) -> Generator[Encoded, None, None]:
    """Encode all files, in their order, showing progress.

    Args:
        inputs: JSONL, plain text or Parquet.
        encoder: of the blocks.
        workers: processes that tokenize; few blocks are done in this one. The result does not
            depend on it.
        begin: called with the number of an input before it is read; says where to begin, None to
            pass over it.

    Raises:
        UserError: if `workers` is below 1, or an input is damaged.
    """
    if workers < 1:
        raise UserError(f"workers is {workers}; at least 1 process is needed.")
    with progress("tokenizing", sum(path.stat().st_size for path in inputs)) as advance:
        blocks = _blocks(inputs, encoder.fields, begin, advance)
        if workers == 1:
            yield from (encoder(*block) for block in blocks)
            return
        first = list(islice(blocks, _INLINE_BLOCKS + 1))
        if len(first) <= _INLINE_BLOCKS:
            yield from (encoder(*block) for block in first)
            return
        yield from encode_in_processes(chain(first, blocks), encoder, workers)


def _blocks(
    inputs: Sequence[Path],
    fields: Sequence[str],
    begin: Callable[[int], Position | None],
    advance: Callable[[int], None],
) -> Iterator[tuple[int, Block]]:
    """The blocks of all inputs with the numbers of these."""
    for source, path in enumerate(inputs):
        start = begin(source)
        if start is None:
            advance(path.stat().st_size)
            continue
        for block in read_blocks(path, fields, start=start, advance=advance):
            yield source, block
