"""Processes that encode blocks, spoken to over pipes.

Not multiprocessing's: those import the caller's script once more, with all that it imports, and
live on when their parent is killed. Here a child ends when its pipe does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue

from megaswitch.data import messages
from megaswitch.data.blocks import Block
from megaswitch.data.encoding import Encoded, Encoder
from megaswitch.log import UserError

_AHEAD_BYTES = 1 << 22  # of text that waits for each process
_PIPE_BYTES = 1 << 20  # of 64 KiB each block would wake both sides many times
_CHILD = (
    "import sys; sys.path[:] = sys.argv[1:]; from megaswitch.data import workers; workers.serve()"
)


def encode_in_processes(
    blocks: Iterator[tuple[int, Block]], encoder: Encoder, workers: int
) -> Iterator[Encoded]:
    """Encode blocks side by side; they come out in their order.

    Args:
        blocks: with the numbers of their inputs.
        encoder: of all.
        workers: processes, started as they are needed.

    Raises:
        UserError: if a process dies, or what `encoder` raises.
    """
    children = [_Child(encoder) for _ in range(workers)]
    idle: SimpleQueue[_Child] = SimpleQueue()
    for child in children:
        idle.put(child)

    def encode(source: int, block: Block) -> Encoded:
        child = idle.get()
        try:
            return child.encode(source, block)
        finally:
            idle.put(child)

    running: deque[tuple[Future[Encoded], int]] = deque()
    threads = ThreadPoolExecutor(workers)
    try:
        for source, block in blocks:
            size = block.size
            # Few blocks, and not much text, wait in memory; a giant alone is always let through.
            while running and (
                len(running) >= 3 * workers
                or size + sum(s for _, s in running) > workers * _AHEAD_BYTES
            ):
                yield running.popleft()[0].result()
            running.append((threads.submit(encode, source, block), size))
        while running:
            yield running.popleft()[0].result()
    finally:
        threads.shutdown(cancel_futures=True)
        for child in children:
            child.end()


class _Child:
    """A process that encodes one block at a time; started by the first."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.process: subprocess.Popen[bytes] | None = None

    def encode(self, source: int, block: Block) -> Encoded:
        """Have a block encoded."""
        try:
            if self.process is None:
                self.process = subprocess.Popen(
                    [sys.executable, "-c", _CHILD, *sys.path],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    pipesize=_PIPE_BYTES,
                )
                self._send(messages.of_encoder(self.encoder))
            self._send(messages.of_block(source, block))
            assert self.process.stdout is not None
            header, parts = messages.receive(self.process.stdout)
        except (BrokenPipeError, EOFError) as error:
            raise UserError(
                "a process that tokenizes was killed, most likely as memory ran out. Use fewer "
                "--workers."
            ) from error
        if "error" in header:
            raise UserError(header["error"])
        return messages.encoded(header, parts)

    def _send(self, message: messages.Message) -> None:
        assert self.process is not None
        assert self.process.stdin is not None
        messages.send(self.process.stdin, message)

    def end(self) -> None:
        """Let the process end, and wait for it."""
        if self.process is not None:
            try:
                self.process.communicate()
            except OSError:
                self.process.kill()
                self.process.wait()


def serve() -> None:
    """Be a child: encode blocks until the parent closes the pipe, or is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    # What a library prints must not get between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    questions = sys.stdin.buffer
    try:
        encoder = None
        while True:
            header, parts = messages.receive(questions)
            try:
                if encoder is None:
                    encoder = messages.encoder(header)
                    continue
                answer: messages.Message = messages.of_encoded(
                    encoder(*messages.block(header, parts))
                )
            except UserError as error:
                answer = {"error": str(error)}, []
            messages.send(answers, answer)
    except (EOFError, BrokenPipeError):
        os._exit(0)
