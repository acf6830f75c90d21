"""Messages and errors: rank-aware logging, and the one error type shown to users as a paragraph."""

from __future__ import annotations

import os
import sys

from rich.console import Console


class UserError(ValueError):
    """Something the user can mend. Shown without a traceback; the process exits with code 2.

    The text states the value, the rule and the remedy.
    """


class ConfigError(UserError):
    """All problems of a configuration, reported together.

    Args:
        problems: one sentence each, in the order found.
    """

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(
            f"{count} in the configuration:\n" + "\n".join(f"  - {p}" for p in problems)
        )


def is_rank_zero() -> bool:
    """True on the process that may print: rank 0 of a launch, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def console() -> Console:
    """A rich console on stderr that stays silent on every rank but 0."""
    return Console(stderr=True, quiet=not is_rank_zero(), highlight=False)


def info(message: str) -> None:
    """Print one line on rank 0."""
    if is_rank_zero():
        print(message, file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """Print one warning on rank 0."""
    info(f"warning: {message}")
