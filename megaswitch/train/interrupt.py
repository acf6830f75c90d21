"""A signal that asks a run to save and stop, and the time that it has for that."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType

# A terminal's, a scheduler's, and the one that `sbatch --signal` is usually told to send.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interrupt:
    """Turns the first signal into a request; one after `grace` seconds acts as usual.

    The grace is for torchrun, which sends its workers the Ctrl-C that they got already.

    Args:
        limit: seconds after the signal at which the process ends without having saved; None: never.
    """

    asked = False
    grace = 5.0

    def __init__(self, limit: float | None = None) -> None:
        self._limit = limit
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Interrupt:
        self._before = {s: signal.signal(s, self._ask) for s in _SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        if self._timer:
            self._timer.cancel()
        self._restore()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if not self.asked:
            self.asked, self._since = True, time.monotonic()
            if self._limit is not None:
                self._timer = threading.Timer(self._limit, self._give_up)
                self._timer.daemon = True
                self._timer.start()
        elif time.monotonic() - self._since > self.grace:
            self._restore()
            signal.raise_signal(number)

    def _give_up(self) -> None:
        """End at once: whoever sent the signal is about to end this process anyway, unheard."""
        print(
            f"error: no checkpoint within fault.stop_seconds={self._limit:g} of the signal; the "
            "run ends without one, and goes on from the newest before. Ask earlier (sbatch "
            "--signal), or give it more seconds",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
