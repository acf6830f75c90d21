"""A checkpoint on held-out corpora and texts: what `megaswitch evaluate` does."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from megaswitch.config import RunConfig
from megaswitch.data.indexed import CorpusMeta
from megaswitch.data.sources import DataFile, Source, parse_data, tokenize_sources
from megaswitch.data.span_corruption import span_shape
from megaswitch.data.tokenizer import Tokenizer
from megaswitch.log import UserError, info
from megaswitch.model.count import count
from megaswitch.model.switch_transformer import rows_per_group
from megaswitch.parallel.mesh import Mesh
from megaswitch.parallel.table import layout_lines
from megaswitch.parallel.watchdog import Watchdog
from megaswitch.train.display import SampleProgress
from megaswitch.train.runner import Runner
from megaswitch.train.trained import Measuring, changed, check_same, load_trained
from megaswitch.train.validation import Figures, Validation, measure, open_corpus


@dataclass(frozen=True, kw_only=True)
class Request(Measuring):
    """What to evaluate. None takes the value that the checkpoint was trained with.

    Attributes:
        data: text files or prefixes of `.bin`/`.idx` pairs, each as PATH or NAME=PATH.
        by: field of JSON lines by whose values the sources are told apart.
        encoder_length: tokens per encoder row.
        noise_density: share of tokens masked.
        mean_span_length: mean tokens per masked span.
        seed: of the choice of spans.
    """

    data: Sequence[str]
    by: str | None = None
    encoder_length: int | None = None
    noise_density: float | None = None
    mean_span_length: float | None = None
    seed: int | None = None

    def plan(self, world_size: int) -> Plan:
        """What that comes to on so many ranks. Needs no process group.

        Raises:
            UserError: there is no checkpoint, its model cannot be laid out so, or a value is one
                that no configuration may have.
        """
        checkpoint, config = self.find(world_size)
        keys = ("encoder_length", "noise_density", "mean_span_length")
        shape = {key: getattr(self, key) for key in keys}
        asked = any(value is not None for value in shape.values())
        if asked and config.data.objective != "text-to-text":
            # The length that was set may be too short for other samples.
            config = replace(config, data=replace(config.data, decoder_length=None))
        return Plan(self, checkpoint, changed(config, data=shape, train={"seed": self.seed}))


@dataclass(frozen=True)
class Plan:
    """A request that can be met.

    Attributes:
        request: as it was.
        checkpoint: to evaluate.
        config: its configuration, with what is asked for otherwise, and with the layout.
    """

    request: Request
    checkpoint: Path
    config: RunConfig


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        checkpoint: that was evaluated.
        step: it was written at.
        config: its configuration, with lengths, corruption, seed and precision as evaluated.
        decoder_length: positions per decoder row.
        batch_size: sequences per forward and rank.
        available: samples that each source holds.
        sources: figures of each source.
        total: figures of all samples together, whatever their source.
    """

    checkpoint: Path
    step: int
    config: RunConfig
    decoder_length: int
    batch_size: int
    available: dict[str, int]
    sources: dict[str, Figures]
    total: Figures


def evaluate(plan: Plan, mesh: Mesh, watchdog: Watchdog | None = None) -> Evaluation:
    """Evaluate a checkpoint, spread over the ranks.

    Routing groups, capacity and the samples of a corpus are those of the validation in training.

    Args:
        plan: from `Request.plan`.
        mesh: the ranks, laid out as planned.
        watchdog: is told of every batch.

    Raises:
        UserError: on every rank, saying what is wrong with the checkpoint or the data.
    """
    request, checkpoint, config = plan.request, plan.checkpoint, plan.config
    with mesh.together():
        files = parse_data(request.data, request.by)
        _check_kind(files, config)
        batch_size = _whole_groups(request.batch_size, config)
        tokenizer = _tokenizer_of(checkpoint, files)
    parts, step = load_trained(checkpoint, config, mesh)
    with _corpora(files, tokenizer, config, request.by, mesh, watchdog) as sources:
        with mesh.together():
            validations = _open(sources, config, tokenizer, request.samples, batch_size)
        check_same("data", [v.loader.fingerprint for v in validations], mesh)
        samples = sum(v.samples for v in validations)
        info(
            f"{checkpoint} · {count(config.model).total_parameters:,} parameters · "
            f"{config.model.moe.num_experts or 'no'} experts · {mesh.size} × {mesh.device.type} · "
            f"{config.train.precision} · {samples:,} samples of {len(sources)} "
            f"source{'s' if len(sources) > 1 else ''}"
        )
        for line in layout_lines(config, mesh.size) if mesh.exchanges else ():
            info(line)
        with SampleProgress(samples, mesh) as progress:

            def advance(rows: int) -> None:
                progress.advance(rows)
                if watchdog:
                    watchdog.at(0, "evaluation")

            runner = Runner(config, mesh, parts)
            *each, total = measure(runner, validations, total=True, advance=advance)
    names = [source.name for source in sources]
    return Evaluation(
        checkpoint=checkpoint,
        step=step,
        config=config,
        decoder_length=validations[0].loader.decoder_length,
        batch_size=batch_size,
        available={n: v.loader.samples_per_epoch for n, v in zip(names, validations, strict=True)},
        sources=dict(zip(names, each, strict=True)),
        total=total,
    )


def _whole_groups(batch_size: int | None, config: RunConfig) -> int:
    """The batch size asked for, or else the one of training, in whole routing groups."""
    length, moe = config.data.encoder_length, config.model.moe
    rows = rows_per_group(config.model, length) if moe.num_experts else 1
    if batch_size is None:
        return -(-config.train.micro_batch_size // rows) * rows
    if batch_size % rows:
        raise UserError(
            f"the batch size is {batch_size}; it must be a multiple of the {rows} rows of a "
            f"routing group (model.moe.group_size={moe.group_size} / encoder length {length}), "
            f"which is part of the model; use {-(-batch_size // rows) * rows}"
        )
    return batch_size


def _check_kind(files: Sequence[DataFile], config: RunConfig) -> None:
    """Refuse pairs for a model of texts, and texts for a model of pairs."""
    objective = config.data.objective
    wants_pairs = objective == "text-to-text"
    wrong = [f"'{f.path}'" for f in files if (len(f.token_prefixes) == 2) != wants_pairs]
    if not wrong:
        return
    trained = f"the checkpoint was trained with data.objective={objective!r}"
    if wants_pairs:
        raise UserError(
            f"{', '.join(wrong)}: {trained}, on pairs of inputs and targets, and these are none; "
            "make pairs of JSON lines with `megaswitch preprocess --pairs` and give their prefix, "
            "without _inputs and _targets."
        )
    raise UserError(
        f"{', '.join(wrong)}: {trained}, and these are pairs of inputs and targets; give text or a "
        "corpus that `megaswitch preprocess` made without --pairs, or a checkpoint trained with "
        "data.objective='text-to-text'."
    )


def _tokenizer_of(checkpoint: Path, files: Sequence[DataFile]) -> Tokenizer | None:
    """The tokenizer in the checkpoint, which `files` must fit as far as that is known."""
    path = checkpoint / "tokenizer.model"
    texts = [file for file in files if file.is_text]
    if not path.is_file():
        if texts:
            raise UserError(
                f"'{texts[0].path}' is text and checkpoint {checkpoint} has no tokenizer.model to "
                "read it with; give the prefix of a .bin/.idx pair that `megaswitch preprocess` "
                "made with the model's tokenizer (training with data.tokenizer set puts it into "
                "checkpoints)."
            )
        return None
    tokenizer = Tokenizer(path)
    for prefix in (prefix for file in files for prefix in file.token_prefixes):
        meta = CorpusMeta.read(prefix)
        if meta and meta.tokenizer_sha256 != tokenizer.sha256:
            raise UserError(
                f"'{prefix}' was made with another tokenizer (sha256 "
                f"{meta.tokenizer_sha256[:12]}…) than the checkpoint's ({tokenizer.sha256[:12]}…), "
                "so its ids mean other text to the model; give the text itself, or preprocess it "
                f"with --tokenizer {path}."
            )
    return tokenizer


@contextmanager
def _corpora(
    files: Sequence[DataFile],
    tokenizer: Tokenizer | None,
    config: RunConfig,
    by: str | None,
    mesh: Mesh,
    watchdog: Watchdog | None,
) -> Iterator[list[Source]]:
    """All sources as corpora; text is tokenized, once on each machine, while the context lasts."""
    texts = [file for file in files if file.is_text]
    if not texts:
        yield [Source(file.name, file.path) for file in files]
        return
    assert tokenizer
    data = config.data
    least, _ = span_shape(
        data.encoder_length, data.noise_density, data.mean_span_length, data.random_roll
    )
    local_rank = int(os.environ["LOCAL_RANK"]) if mesh.size > 1 else 0
    with TemporaryDirectory(prefix="megaswitch-", ignore_cleanup_errors=True) as folder:
        if watchdog:
            watchdog.before_exit(lambda: shutil.rmtree(folder, ignore_errors=True))
        tokenized: list[Source] = []
        with mesh.together():
            if local_rank == 0:
                tokenized = tokenize_sources(
                    texts, tokenizer, Path(folder),
                    least_tokens=least, by=by, workers=os.cpu_count() or 1,
                )  # fmt: skip
        # torchrun numbers the ranks of a machine one after another.
        tokenized = mesh.gather(tokenized)[mesh.rank - local_rank]
        if by is not None:
            yield tokenized
        else:
            found = {source.name: source for source in tokenized}
            yield [found.get(file.name, Source(file.name, file.path)) for file in files]


def _open(
    sources: Sequence[Source],
    config: RunConfig,
    tokenizer: Tokenizer | None,
    samples: int | None,
    batch_size: int,
) -> list[Validation]:
    """Every source opened.

    Raises:
        UserError: naming all that cannot be.
    """
    validations, problems = [], []
    known = tokenizer.info if tokenizer else None
    for source in sources:
        try:
            loader = open_corpus(config, source.prefix, known, shuffle=False)
        except UserError as error:
            problems.append(str(error))
        else:
            validations.append(Validation(loader, samples=samples, micro_batch_size=batch_size))
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return validations
