"""Prompts in, filled-in blanks out: the texts around generation."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from re import Match

from megaswitch.data.blocks import check_inputs, is_json_lines
from megaswitch.data.text_files import read_lines
from megaswitch.data.tokenizer import SENTINEL
from megaswitch.log import UserError


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, one a line, in order; empty lines of plain text are prompts too.

    Args:
        path: plain text, or JSON lines with a field "inputs" or "text"; plain, .gz, .xz or .zst.

    Raises:
        UserError: the file is missing or damaged, or a line holds no prompt. Nothing is passed
            over, so that answers and lines stay side by side.
    """
    check_inputs([path])
    return parse_prompts(read_lines(path), str(path), json_lines=is_json_lines(path))


def parse_prompts(lines: Iterable[bytes | None], name: str, *, json_lines: bool) -> list[str]:
    """The prompts in `lines`, None where one is too long; `name` is for errors."""
    prompts: list[str] = []
    problems: list[str] = []
    for number, line in enumerate(lines, 1):
        try:
            if line is None:
                raise ValueError("the line is too long")
            text = line.decode("utf-8").rstrip("\r\n")
            prompts.append(_of_record(text) if json_lines else text)
        except (ValueError, RecursionError) as error:
            problems.append(f"line {number}: {error}")
    if problems:
        more = f" (and {len(problems) - 3:,} more)" if len(problems) > 3 else ""
        raise UserError(
            f"'{name}' has {len(problems):,} lines without a prompt: {'; '.join(problems[:3])}"
            f"{more}. Each line must be UTF-8 text, or in .jsonl an object with a string under "
            "'inputs' or 'text'"
        )
    return prompts


def _of_record(line: str) -> str:
    record = json.loads(line)
    if isinstance(record, dict):
        for field in ("inputs", "text"):
            if isinstance(record.get(field), str):
                return str(record[field])
    raise ValueError("no string under 'inputs' or 'text'")


def check_prompts(prompts: Sequence[str], num_sentinels: int) -> None:
    """Refuse prompts that a tokenizer of so many sentinels cannot read.

    Raises:
        UserError: naming the first few of them.
    """
    problems: list[str] = []
    for number, prompt in enumerate(prompts, 1):
        beyond = [m[0] for m in SENTINEL.finditer(prompt) if int(m[1]) >= num_sentinels]
        if beyond:
            problems.append(
                f"prompt {number} has the blank {beyond[0]}, and the tokenizer's end at "
                f"<extra_id_{num_sentinels - 1}>; number blanks from 0 in each prompt"
            )
        elif any("\ud800" <= character <= "\udfff" for character in prompt):
            problems.append(f"prompt {number} is not UTF-8 text; convert or mend it")
    if problems:
        more = f" (and {len(problems) - 3:,} more)" if len(problems) > 3 else ""
        raise UserError("; ".join(problems[:3]) + more)


def has_blanks(prompt: str) -> bool:
    """True if there is an `<extra_id_n>` to fill."""
    return SENTINEL.search(prompt) is not None


def spans(output: str) -> dict[int, str]:
    """The text behind each sentinel of a model's output; of a repeated one the first counts."""
    parts = SENTINEL.split(output)
    found: dict[int, str] = {}
    for number, text in zip(parts[1::2], parts[2::2], strict=True):
        found.setdefault(int(number), text.strip())
    return found


def fill(prompt: str, output: str, style: str = "{}") -> str:
    """`prompt` with its blanks filled from `output`; one without an answer stays as it is.

    Args:
        prompt: with `<extra_id_n>`.
        output: sentinels, each followed by its text, as the model writes it.
        style: how to show a filling, `{}` in its place.
    """
    answers = spans(output)

    def answer(blank: Match[str]) -> str:
        text = answers.get(int(blank[1]))
        return blank[0] if text is None else style.replace("{}", text)

    return SENTINEL.sub(answer, prompt)


def fill_so_far(prompt: str, output: str, style: str = "{}") -> str:
    """The beginning of `fill(prompt, output, style)` that is settled while `output` still grows.

    That is all up to the blank that `output` is at, and what it has for it.
    """
    at = list(SENTINEL.finditer(output))
    blanks = {int(blank[1]): blank.start() for blank in SENTINEL.finditer(prompt)}
    if not at:
        return prompt[: min(blanks.values(), default=len(prompt))]
    number = int(at[-1][1])
    if number not in blanks:
        return ""
    before, _ = style.split("{}")
    return fill(prompt[: blanks[number]], output, style) + before + spans(output)[number]
