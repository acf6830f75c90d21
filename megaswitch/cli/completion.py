"""`megaswitch completion`, and what shells are offered for overrides of configuration keys.

Completion runs at every press of a key, so nothing here may import torch.
"""

from __future__ import annotations

import os
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    ShellComplete,
    ZshComplete,
    add_completion_class,
)

from megaswitch.cli.common import echo

_PROGRAM, _VARIABLE = "megaswitch", "_MEGASWITCH_COMPLETE"
_KEY = "key"  # a candidate that ends in "=": no space may follow it
# Keys that name files, with what their files end in: a prefix is completed without it.
_FILES = {
    "data.train": ".idx",
    "data.valid": ".idx",
    "data.tokenizer": None,
    "train.run_dir": "/",
    "train.init_from": "/",
}


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script that lets a shell complete commands, options and configuration keys.

    \b
    Examples, each with the line for the file in its comment:
      megaswitch completion bash   # ~/.bashrc: eval "$(megaswitch completion bash)"
      megaswitch completion zsh    # ~/.zshrc, after compinit: eval "$(megaswitch completion zsh)"
      megaswitch completion fish   # ~/.config/fish/config.fish: megaswitch completion fish | source
    """
    program = context.find_root().command
    echo(_SHELLS[shell](program, {}, _PROGRAM, _VARIABLE).source())


class _Whole(ShellComplete):
    """Hands the words before the cursor to the command's own completion, as click does not."""

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem]:
        self.ctx_args["obj"] = Words(args, whole=self.name != "bash")
        return super().get_completions(args, incomplete)

    def format_completion(self, item: CompletionItem) -> str:
        # Of a click whose script is worded otherwise, keys are plain words with a space after them.
        if item.type == _KEY and _KEY not in self.source_template:
            item = CompletionItem(item.value)
        return super().format_completion(item)


class Words:
    """The words before the cursor.

    Args:
        before: complete ones. click moves `--key` of an incomplete `--key=value` to their end.
        whole: the shell replaces the whole word `--key=value`; bash replaces the value alone.
    """

    def __init__(self, before: list[str], *, whole: bool) -> None:
        self.before = before
        self.whole = whole


def _template(base: type[ShellComplete], before: str, branch: str) -> str:
    """click's script with a branch for keys before `before`, if it is worded like that."""
    return base.source_template.replace(before, branch + before)


class _Bash(_Whole, BashComplete):
    source_template = _template(
        BashComplete,
        "elif [[ $type == 'plain' ]]; then",
        "elif [[ $type == 'key' ]]; then\n            COMPREPLY+=($value)\n"
        "            compopt -o nospace\n        ",
    )


class _Zsh(_Whole, ZshComplete):
    source_template = _template(
        ZshComplete,
        'if [[ "$type" == "plain" ]]; then',
        'if [[ "$type" == "key" ]]; then\n            compadd -U -S "" -- "$key"\n        el',
    )


class _Fish(_Whole, FishComplete):  # fish itself puts no space after "="
    source_template = _template(
        FishComplete,
        'else if test $metadata[1] = "plain"',
        'else if test $metadata[1] = "key";\n            echo $metadata[2];\n        ',
    )


_SHELLS: dict[str, type[ShellComplete]] = {"bash": _Bash, "zsh": _Zsh, "fish": _Fish}
for _name, _class in _SHELLS.items():
    add_completion_class(_class, _name)


# Overrides look like options; click must leave them alone.
FREE_FORM = {"ignore_unknown_options": True, "allow_extra_args": True}


class OverridesCommand(click.Command):
    """A command that takes `--section.key=value` beside its options."""

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Options, and configuration keys where the word begins like one."""
        return [*super().shell_complete(ctx, incomplete), *complete_keys(incomplete)]


def complete_keys(incomplete: str) -> list[CompletionItem]:
    """The configuration keys that go on from `incomplete`, as `--section.key=`.

    Before the first dot only sections are offered: 80 keys at once help nobody.
    """
    from megaswitch.config import describe_keys

    if not incomplete.startswith("--"):
        return []
    start = incomplete[2:]
    keys = [row for row in describe_keys() if row[0].startswith(start)]
    if "." not in start and len({key.split(".")[0] for key, _, _ in keys}) > 1:
        return [
            CompletionItem(f"--{s}.", _KEY)
            for s in dict.fromkeys(k.split(".")[0] for k, _, _ in keys)
        ]
    return [CompletionItem(f"--{key}=", _KEY, help=meaning) for key, _, meaning in keys]


def complete_override(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Values of the override that the cursor is in."""
    words = ctx.find_root().obj
    before = [w for w in words.before if w != "="] if isinstance(words, Words) else []
    if not before or not before[-1].startswith("--"):
        return []
    key = before[-1].removeprefix("--")
    prefix = f"{before[-1]}=" if words.whole else ""
    return [
        CompletionItem(prefix + value, _KEY if value.endswith("/") else "plain")
        for value in _values(key, incomplete)
        if value.startswith(incomplete)
    ]


def _values(key: str, incomplete: str) -> Iterator[str]:
    from megaswitch.config import RunConfig
    from megaswitch.presets import PRESETS

    if key == "model.preset":
        yield from PRESETS
        return
    if key in _FILES:
        yield from _paths(incomplete, _FILES[key])
        return
    kind: Any = RunConfig
    for name in key.split("."):
        kind = typing.get_type_hints(kind).get(name) if isinstance(kind, type) else None
    for choice in typing.get_args(kind) or (kind,):
        if isinstance(choice, str):
            yield choice
        elif isinstance(choice, bool):
            yield str(choice).lower()
        elif choice is bool:
            yield from ("true", "false")


def _paths(incomplete: str, suffix: str | None) -> Iterator[str]:
    """Folders, and files that end in `suffix` (None: all; "/": none), which is taken off."""
    folder, _, start = incomplete.rpartition("/")
    root = Path(folder or ("/" if incomplete.startswith("/") else "."))
    if not root.is_dir() or not os.access(root, os.R_OK):
        return
    lead = incomplete[: len(incomplete) - len(start)]
    for path in sorted(root.iterdir()):
        if path.name.startswith(".") and not start.startswith("."):
            continue
        if path.is_dir():
            yield f"{lead}{path.name}/"
        elif suffix is None or path.name.endswith(suffix):
            yield f"{lead}{path.name.removesuffix(suffix or '')}"
