"""`megaswitch generate`."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from megaswitch.cli.common import PATH, echo, joined, on_terminal
from megaswitch.log import UserError, console, info, is_rank_zero

if TYPE_CHECKING:
    from megaswitch.parallel.mesh import Mesh
    from megaswitch.train.text import Completion, TextGenerator

_BOLD = "\033[1;36m{}\033[0m"


@click.command()
@click.argument("checkpoint", type=PATH)
@click.argument("prompts", nargs=-1)
@click.option("--input", "source", type=PATH, help="File of prompts, one a line; - is standard "
              "input. Of JSON lines, the field \"inputs\" or \"text\".")  # fmt: skip
@click.option("--output", type=PATH, help="File to write instead of standard output.")
@click.option("--raw", is_flag=True, help="Print what the model wrote, not the prompt filled in.")
@click.option("--json", "as_json", is_flag=True, help="JSON lines: prompt, output, text, score.")
@click.option("--max-tokens", default=64, show_default=True, help="Most tokens to generate.")
@click.option("--beams", default=1, show_default=True, help="Beam search with so many beams.")
@click.option("--length-penalty", default=1.0, show_default=True,
              help="Of beams: above 0 favours long texts, below 0 short ones.")  # fmt: skip
@click.option("--early-stopping", is_flag=True, help="Of beams: stop at as many finished texts.")
@click.option("--temperature", default=0.0, show_default=True, help="Sample; 0 takes the best.")
@click.option("--top-k", type=int, help="Sample from the k best tokens.")
@click.option("--top-p", type=float, help="Sample from the best tokens of this probability.")
@click.option("--seed", default=0, show_default=True, help="Of sampling.")
@click.option("--batch-size", default=16, show_default=True, help="Prompts decoded together.")
@click.option("--tokenizer", type=PATH, help="SentencePiece model; else the checkpoint's own.")
@click.option("--device", default="auto", show_default=True,
              type=click.Choice(["auto", "cpu", "cuda"]))  # fmt: skip
@click.option("--precision", default="fp32", show_default=True,
              type=click.Choice(["fp32", "bf16"]))  # fmt: skip
@click.option("--ep", type=click.IntRange(min=1), default=1, show_default=True,
              help="Ranks that the experts lie on.")  # fmt: skip
@click.option("--tp", type=click.IntRange(min=1), default=1, show_default=True,
              help="Ranks that slice each matrix.")  # fmt: skip
@click.option("--no-cache", is_flag=True, help="Compute all keys and values again for each token.")
def generate(
    checkpoint: Path,
    prompts: tuple[str, ...],
    source: Path | None,
    output: Path | None,
    raw: bool,
    as_json: bool,
    batch_size: int,
    tokenizer: Path | None,
    device: str,
    precision: str,
    no_cache: bool,
    ep: int,
    tp: int,
    **settings: Any,
) -> None:
    """Fill in blanks, or answer text with text.

    CHECKPOINT is a checkpoint, or a run folder, whose newest is taken. PROMPTS with <extra_id_0>,
    <extra_id_1> … come back filled in; any other prompt is answered. Without PROMPTS and --input,
    standard input is read: on a terminal one prompt at a time, answered as you type.

    Experts take every token, and a text depends on its own prompt alone: not on the batch, not on
    the number of processes. These share the prompts, each with the whole model, or with a part of
    it as --ep and --tp say, whatever the layout of the training.

    \b
    Examples:
      megaswitch generate runs/demo "It was a <extra_id_0> day, and the sea was <extra_id_1>."
      megaswitch generate runs/demo --input prompts.txt --beams 4 --output answers.txt
      megaswitch generate runs/demo --temperature 0.8 --top-p 0.9
      torchrun --nproc-per-node 8 --no-python megaswitch generate runs/xxl "A prompt." --ep 4 --tp 2
    """
    from megaswitch.train.generate import Decoding

    decoding = Decoding(cache=not no_cache, **settings)
    _check(batch_size, prompts, source, output, raw=raw, as_json=as_json)
    talk = not (prompts or source or output) and on_terminal(sys.stdin)
    texts = [] if talk else _read(prompts, source)

    from megaswitch.data.prompts import check_prompts
    from megaswitch.parallel.launcher import world_size
    from megaswitch.train.objectives import PRECISIONS
    from megaswitch.train.text import TextGenerator, checkpoint_tokenizer
    from megaswitch.train.trained import find_trained, load_trained

    found, config = find_trained(checkpoint, world_size(), ep=ep, tp=tp)
    with joined(device, config.parallel) as (mesh, watchdog):
        talk, texts = _of_rank_zero(talk, texts, mesh)
        with mesh.together():
            pieces = checkpoint_tokenizer(found, tokenizer)
            check_prompts(texts, pieces.num_extra_ids)
        model = load_trained(found, config, mesh)[0].models[0]
        last = model.decoder.final_norm  # of every step
        last.register_forward_hook(lambda *_: watchdog.at(0, "decoding"))
        writer = TextGenerator(model, pieces, decoding, PRECISIONS[precision])
        shown = _Shown(raw=raw, as_json=as_json)
        _talk(writer, shown) if talk else _answer(writer, texts, batch_size, shown, output, mesh)


def _check(
    batch_size: int,
    prompts: tuple[str, ...],
    source: Path | None,
    output: Path | None,
    *,
    raw: bool,
    as_json: bool,
) -> None:
    """Refuse options that make no sense, before anything is loaded."""
    problems = []
    if batch_size < 1:
        problems.append(f"--batch-size is {batch_size}: it must be at least 1")
    if prompts and source:
        problems.append(f"--input {source} and {len(prompts)} PROMPTS were given: choose one")
    if output and not output.absolute().parent.is_dir():
        problems.append(f"--output {output}: there is no folder {output.absolute().parent}")
    elif output and output.exists() and not output.is_file():  # the file would take its place
        problems.append(f"--output {output} is a folder or device: give a file, or leave it out")
    if raw and as_json:
        problems.append("--raw and --json: JSON lines hold both texts; leave --raw out")
    if problems:
        raise UserError("; ".join(problems))


def _read(prompts: tuple[str, ...], source: Path | None) -> list[str]:
    from megaswitch.data.prompts import parse_prompts, read_prompts

    if prompts:
        return list(prompts)
    if source is None or str(source) == "-":
        if not is_rank_zero():  # the ranks of a machine have one standard input between them
            return []
        lines = sys.stdin.buffer if sys.stdin else ()
        texts = parse_prompts(lines, "standard input", json_lines=False)
    else:
        texts = read_prompts(source)
    if not texts:
        raise UserError(
            f"{source or 'standard input'} holds no prompt: give one a line, or as arguments"
        )
    return texts


def _of_rank_zero(talk: bool, texts: list[str], mesh: Mesh) -> tuple[bool, list[str]]:
    """Whether prompts will be typed, and those that are known, for all ranks."""
    talk, texts = mesh.gather((talk, texts))[0]
    if talk and mesh.size > 1:
        raise UserError(
            f"prompts cannot be typed into {mesh.size} processes: give them as arguments, with "
            "--input FILE, or through a pipe"
        )
    return talk, texts


def _answer(
    writer: TextGenerator,
    texts: list[str],
    batch_size: int,
    shown: _Shown,
    output: Path | None,
    mesh: Mesh,
) -> None:
    """Answer the prompts; a single one on a terminal as the answer grows."""
    watched = mesh.gather(len(texts) == 1 and shown.streams and not output)[0]
    if watched and writer.can_stream:
        _stream(writer, shown, texts[0], mesh)
    else:
        _write(_completions(writer, texts, batch_size, mesh), shown, output, len(texts))


def _completions(
    writer: TextGenerator, texts: list[str], batch_size: int, mesh: Mesh
) -> Iterator[Completion]:
    """Answers in order; batches are dealt out to the data-parallel ranks, a round at a time."""
    for start in range(0, len(texts), batch_size * mesh.dp.size):
        first = start + mesh.dp.rank * batch_size
        batch = texts[first : first + batch_size]
        answers: list[Completion] = []
        with mesh.together():
            if batch:
                answers = writer.complete(batch, first)
            else:
                writer.accompany()
        # Tensor-parallel ranks have the same ones.
        for part in mesh.gather(answers if mesh.axis("tp").rank == 0 else []):
            yield from part


def _stream(writer: TextGenerator, shown: _Shown, prompt: str, mesh: Mesh) -> None:
    """Answer one prompt; rank 0 shows how the answer grows."""
    with mesh.together():
        if mesh.dp.rank:
            writer.accompany()
        elif mesh.rank:
            for _ in writer.stream(prompt):
                pass
        else:
            shown.stream(writer, prompt, 0)


class _Shown:
    """How completions are printed."""

    def __init__(self, *, raw: bool, as_json: bool) -> None:
        self.raw = raw
        self.as_json = as_json
        self.streams = on_terminal(sys.stdout) and is_rank_zero() and not as_json

    def line(self, completion: Completion) -> str:
        """One line of output, so that answers and prompts stay side by side."""
        if self.as_json:
            fields = ("prompt", "output", "text", "score")
            record = {name: getattr(completion, name) for name in fields}
            return json.dumps(record, ensure_ascii=False)
        text = completion.output if self.raw else completion.text
        return " ".join(text.splitlines())

    def stream(self, writer: TextGenerator, prompt: str, index: int) -> None:
        """Print an answer as it grows."""
        from megaswitch.data.prompts import fill, fill_so_far, has_blanks

        filling = has_blanks(prompt) and not self.raw
        shown = text = ""
        for output in writer.stream(prompt, index):
            text = fill(prompt, output, _BOLD) if filling else output
            grown = fill_so_far(prompt, output, _BOLD) if filling else output
            grown = grown.rstrip("\ufffd")  # half a character
            if grown.startswith(shown):
                click.echo(grown[len(shown) :], nl=False)
                shown = grown
        click.echo(text[len(shown) :] if text.startswith(shown) else f"\n{text}")


def _talk(writer: TextGenerator, shown: _Shown) -> None:
    """Answer prompts as they are typed."""
    from megaswitch.data.prompts import check_prompts

    with suppress(ImportError):
        import readline  # noqa: F401  lets `input` edit the line and remember earlier ones
    info("one prompt a line, such as: The sea was <extra_id_0>. Ctrl-D ends.")
    for index in itertools.count():
        try:
            prompt = input("> ")
        except EOFError:
            return
        if not prompt.strip():
            continue
        try:
            check_prompts([prompt], writer.tokenizer.num_extra_ids)
        except UserError as error:
            info(f"error: {error}")
            continue
        if shown.streams and writer.can_stream:
            shown.stream(writer, prompt, index)
        else:
            echo(shown.line(writer.complete([prompt], index)[0]))


def _write(
    completions: Iterator[Completion], shown: _Shown, output: Path | None, total: int
) -> None:
    """Print the answers, or put them into a file that appears when it is whole."""
    from rich.progress import track

    if output is None and on_terminal(sys.stdout):
        for completion in completions:
            echo(shown.line(completion))
        return
    progress = track(completions, "generating", total, console=console(), transient=True)
    if output is None:
        for completion in progress:
            echo(shown.line(completion))
        return
    aside = output.with_name(output.name + ".partial")
    with aside.open("w", encoding="utf-8") if is_rank_zero() else nullcontext() as file:
        for completion in progress:
            if file:
                file.write(shown.line(completion) + "\n")
    if is_rank_zero():
        os.replace(aside, output)
        info(f"wrote {total:,} answers to {output}")
