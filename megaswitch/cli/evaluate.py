"""`megaswitch evaluate`."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from megaswitch.cli.common import PATH, echo, joined, stdout
from megaswitch.log import is_rank_zero

if TYPE_CHECKING:
    from rich.table import Table

    from megaswitch.train.evaluate import Evaluation
    from megaswitch.train.metrics import LayerLoad

_BARS = " ▁▂▃▄▅▆▇█"
_MOST_BARS = 64
_NAME_LENGTH = 40


@click.command()
@click.argument("checkpoint", type=PATH)
@click.argument("data", nargs=-1)
@click.option("--task", "tasks", multiple=True, metavar="NAME=FILES",
              help="Score answers to examples of a public task, or TASK.toml=FILES.")  # fmt: skip
@click.option("--output", type=PATH, help="Folder for predictions on tasks, NAME.jsonl each.")
@click.option("--by", metavar="FIELD", help="Split JSON lines by this field, one row per value.")
@click.option("--samples", type=click.IntRange(min=1), show_default="all",
              help="The first so many of each source; text is tokenized whole.")  # fmt: skip
@click.option("--batch-size", type=click.IntRange(min=1), show_default="train.micro_batch_size",
              help="Sequences per forward and rank.")  # fmt: skip
@click.option("--encoder-length", type=click.IntRange(min=8), show_default="as trained",
              help="Tokens per encoder row.")  # fmt: skip
@click.option("--noise-density", type=click.FloatRange(0, 1, min_open=True, max_open=True),
              show_default="as trained", help="Share of tokens masked.")  # fmt: skip
@click.option("--mean-span-length", type=click.FloatRange(min=1), show_default="as trained",
              help="Mean tokens per masked span.")  # fmt: skip
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto",
              show_default=True, help="auto: CUDA where there is one.")  # fmt: skip
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), show_default="as trained",
              help="bf16: autocast over fp32 weights.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), show_default="as trained",
              help="Of the choice of spans.")  # fmt: skip
@click.option("--ep", type=click.IntRange(min=1), default=1, show_default=True,
              help="Ranks that the experts lie on.")  # fmt: skip
@click.option("--tp", type=click.IntRange(min=1), default=1, show_default=True,
              help="Ranks that slice each matrix.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Machine-readable figures.")
@click.option("--plot", type=PATH, metavar="FILE", help="Draw losses and expert loads (.png, …).")
def evaluate(
    data: tuple[str, ...],
    tasks: tuple[str, ...],
    output: Path | None,
    device: str,
    as_json: bool,
    plot: Path | None,
    **request: Any,
) -> None:
    """Measure a checkpoint on held-out text: loss, accuracy and the health of its router.

    CHECKPOINT is a checkpoint or a run folder, whose newest is taken. Each DATA is a text file
    (JSON lines with field "text", or plain text; plain, .gz or .zst), read with the checkpoint's
    tokenizer, or the prefix of a .bin/.idx pair, or of the pairs of texts that a text-to-text model
    takes; NAME=DATA names its row. All samples are evaluated unless --samples limits them. Lengths,
    corruption, capacity and routing groups are those of validation in training, so the figures
    agree with it.

    With --task the model answers instead, by choosing the likeliest label or by writing; the table
    has the task's metrics, in percent. FILES is a file, or a pattern in quotes.

    Several processes share the samples, each with the whole model, or with a part of it as --ep and
    --tp say, whatever the layout of the training. The figures do not depend on it.

    \b
    Examples:
      megaswitch evaluate runs/base-8 data/corpus_valid
      megaswitch evaluate runs/base-8 books=b.txt.gz web=w.jsonl.zst --samples 1000 --plot eval.png
      megaswitch evaluate runs/base-8 all.jsonl.zst --by lang --json > eval.json
      megaswitch evaluate runs/sst2/checkpoints/best --task sst2=dev.tsv --output answers
      torchrun --nproc-per-node 8 --no-python megaswitch evaluate runs/base-8 data/corpus_valid
      torchrun --nproc-per-node 8 --no-python megaswitch evaluate runs/xxl data/valid --ep 4 --tp 2
    """
    _check(data, tasks, output, plot, request)
    if tasks:
        _evaluate_tasks(tasks, output, device, as_json, request)
        return
    from megaswitch.parallel.launcher import world_size
    from megaswitch.train.evaluate import Request
    from megaswitch.train.evaluate import evaluate as run
    from megaswitch.train.plots import check_plot, plot_evaluation

    plan = Request(data=data, **request).plan(world_size())
    with joined(device, plan.config.parallel) as (mesh, watchdog):
        with mesh.together():
            if plot and mesh.rank == 0:
                check_plot(plot)
        evaluation = run(plan, mesh, watchdog)
        if as_json:
            text = json.dumps(_as_json(evaluation), indent=2, allow_nan=False)
            # Lists of numbers on one line: thousands of experts would be as many lines.
            echo(re.sub(r"\[[\d,\s]*\]", lambda match: " ".join(match[0].split()), text))
        else:
            _print(evaluation)
        with mesh.together():
            if plot and is_rank_zero():
                title = f"{evaluation.checkpoint.name} · {evaluation.total.samples:,} samples"
                plot_evaluation(plot, evaluation.sources, evaluation.total.router, title)


def _check(
    data: tuple[str, ...],
    tasks: tuple[str, ...],
    output: Path | None,
    plot: Path | None,
    request: dict[str, Any],
) -> None:
    """Refuse text and tasks at once, and what says nothing to the one that is given."""
    if not tasks and not data:
        raise click.UsageError("give DATA, or --task NAME=FILES")
    if not tasks and output:
        raise click.UsageError("--output takes predictions, which only --task makes")
    if not tasks:
        return
    given = [key for key, value in request.items() if key not in _common() and value is not None]
    given += ["plot"] if plot else []
    if data or given:
        what = [*data, *(f"--{key.replace('_', '-')}" for key in given)]
        raise click.UsageError(f"{', '.join(what)}: of text, not of --task; leave out one of them")


def _common() -> list[str]:
    """The options that hold for text and tasks."""
    from megaswitch.train.trained import Measuring

    return [field.name for field in fields(Measuring)]


def _evaluate_tasks(
    tasks: tuple[str, ...], output: Path | None, device: str, as_json: bool, request: dict[str, Any]
) -> None:
    from rich.table import Table

    from megaswitch.parallel.launcher import world_size
    from megaswitch.train.evaluate_tasks import TaskRequest, evaluate_tasks

    kept = {key: request[key] for key in _common()}
    plan = TaskRequest(tasks=tasks, output=output, **kept).plan(world_size())
    with joined(device, plan.config.parallel) as (mesh, watchdog):
        results = evaluate_tasks(plan, mesh, watchdog)
    if as_json:
        listed = [
            {"task": r.name, "examples": r.examples, "figures": dict(r.figures)} for r in results
        ]
        echo(json.dumps({"checkpoint": str(plan.checkpoint), "tasks": listed}, indent=2))
        return
    table = Table("task", "examples", "figures (%)", "score", box=None)
    for r in results:
        figures = ", ".join(f"{k} {v:.2f}" for k, v in r.figures.items() if k != "score")
        table.add_row(r.name, f"{r.examples:,}", figures, f"{r.figures['score']:.2f}")
    stdout().print(table)


def _as_json(evaluation: Evaluation) -> dict[str, Any]:
    """Settings, a list of sources in the order of the table, and the total, alike in form."""
    from megaswitch import __version__

    config = evaluation.config
    settings = {key: getattr(config.data, key) for key in (
        "encoder_length", "noise_density", "mean_span_length")}  # fmt: skip
    sources = [
        {"name": name, "samples_available": evaluation.available[name]} | _figures(figures)
        for name, figures in evaluation.sources.items()
    ]
    return {
        "megaswitch": __version__,
        "checkpoint": str(evaluation.checkpoint),
        "step": evaluation.step,
        **settings,
        "decoder_length": evaluation.decoder_length,
        "batch_size": evaluation.batch_size,
        "precision": config.train.precision,
        "seed": config.train.seed,
        "sources": sources,
        "total": _figures(evaluation.total),
    }


def _figures(figures: Any) -> dict[str, Any]:
    counts = {k: getattr(figures, k) for k in ("samples", "target_tokens", "content_tokens")}
    return counts | {
        **{key: _finite(value) for key, value in figures.metrics.items()},
        "router": {name: _load(load) for name, load in figures.router.items()},
    }


def _load(load: LayerLoad) -> dict[str, Any]:
    derived = ("dropped_fraction", "router_confidence", "router_entropy", "load_imbalance")
    experts = len(load.tokens_per_expert)
    return {"tokens": load.tokens} | {
        **{key: _finite(getattr(load, key)) for key in derived},
        "router_entropy_share": _finite(_share_of_greatest(load.router_entropy, experts)),
        "unused_experts": load.unused_experts,
        "tokens_per_expert": load.tokens_per_expert,
    }


def _finite(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def _share_of_greatest(entropy: float, experts: int) -> float:
    """Entropy ÷ ln E; of a single expert it is 0."""
    return entropy / math.log(experts) if experts > 1 else 0.0


def _print(evaluation: Evaluation) -> None:
    console = stdout()
    tables = [_source_table(evaluation)]
    if evaluation.total.router:
        tables.append(_router_table(evaluation.total.router))
    # A terminal too narrow wraps lines; it must not cost a figure its digits.
    unlimited = console.options.update(max_width=10_000)
    needed = [console.measure(table, options=unlimited).maximum for table in tables]
    console.width = max(console.width, *needed)
    for number, table in enumerate(tables):
        if number:
            console.print()
        console.print(table)


def _source_table(evaluation: Evaluation) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold")
    titles = ["source", "samples", "targets", "loss", "perplexity", "accuracy"]
    titles += ["text tokens", "text loss", "text perplexity", "text accuracy", "unigram entropy"]
    for title in titles:
        table.add_column(title, justify="left" if title == "source" else "right", no_wrap=True)
    rows = list(evaluation.sources.items())
    if len(rows) > 1:
        rows.append(("total", evaluation.total))
    for place, (name, figures) in enumerate(rows):
        values = figures.metrics
        last = len(rows) > 1 and place == len(rows) - 1
        table.add_row(
            Text(name if len(name) <= _NAME_LENGTH else name[: _NAME_LENGTH - 1] + "…"),
            f"{figures.samples:,}",
            f"{figures.target_tokens:,}",
            f"{values['loss']:.4f}",
            _perplexity(values["perplexity"]),
            f"{values['accuracy']:.2%}",
            f"{figures.content_tokens:,}",
            f"{values['content_loss']:.4f}",
            _perplexity(values["content_perplexity"]),
            f"{values['content_accuracy']:.2%}",
            f"{values['content_unigram_entropy']:.4f}",
            style="bold" if last else None,
        )
    return table


def _perplexity(value: float) -> str:
    return f"{value:,.2f}" if value < 1e6 else f"{value:.2e}"


def _router_table(router: dict[str, LayerLoad]) -> Table:
    from rich.table import Table

    experts = len(next(iter(router.values())).tokens_per_expert)
    table = Table(box=None, header_style="bold")
    titles = ["Switch layer", "tokens", "dropped", "confidence", "entropy, nats", "of ln E"]
    titles += ["busiest / even", "unused experts"]
    for title in titles:
        table.add_column(title, justify="left" if title == "Switch layer" else "right",
                         no_wrap=True)  # fmt: skip
    if experts <= _MOST_BARS:
        table.add_column("tokens per expert", no_wrap=True)
    for name, load in router.items():
        busiest = max(range(experts), key=load.tokens_per_expert.__getitem__)
        cells = [
            name,
            f"{load.tokens:,}",
            f"{load.dropped_fraction:.2%}",
            f"{load.router_confidence:.3f}",
            f"{load.router_entropy:.3f}",
            f"{_share_of_greatest(load.router_entropy, experts):.1%}",
            f"{load.load_imbalance:.2f} (#{busiest})",
            _listed(load.unused_experts),
        ]
        if experts <= _MOST_BARS:
            cells.append(_strip(load.tokens_per_expert))
        table.add_row(*cells)
    return table


def _listed(experts: list[int]) -> str:
    """How many experts, and the first few of them."""
    if not experts:
        return "none"
    shown = " ".join(f"#{expert}" for expert in experts[:4])
    return f"{len(experts)}: {shown}{' …' if len(experts) > 4 else ''}"


def _strip(tokens: list[int]) -> str:
    """A bar per expert, the busiest full; blank for none at all."""
    highest = max(max(tokens), 1)
    return "".join(_BARS[math.ceil(count * (len(_BARS) - 1) / highest)] for count in tokens)
