"""A few training steps under a layout, and what of them differs from one process.

Ranks report the blocks they hold; blocks are put together by their declared places, and must leave
no hole. A place that several ranks hold must be the same on all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megaswitch.config import RunConfig
from megaswitch.data.span_corruption import Seq2SeqBatch
from megaswitch.layers.noise import Noise
from megaswitch.model.router import Router, Routing
from megaswitch.optim.build import build_optimizer, clip_gradients
from megaswitch.parallel.mesh import Mesh
from megaswitch.train.objectives import BatchSize, MicroBatch
from megaswitch.train.parts import Parts, build_parts
from megaswitch.train.runner import Runner
from tests.distributed.layouts import CLIP, DECODER, ENCODER

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Held:
    """A rank's block of a global tensor."""

    shape: tuple[int, ...]
    place: tuple[slice, ...]
    block: Tensor


@dataclass
class Outcome:
    """What a rank saw.

    Attributes:
        loss: of the first step, of all ranks.
        auxiliary: the load-balancing loss of the first step, of all ranks.
        norm: of the first step's gradients, before clipping.
        gradients: of the first step, by parameter.
        parameters: after the last step.
        dropped: real tokens that found no place (one process only).
        margin: least distance of any token's two best experts (one process only).
    """

    loss: float = math.nan
    auxiliary: float = math.nan
    norm: float = math.nan
    gradients: dict[str, Held] = field(default_factory=dict)
    parameters: dict[str, Held] = field(default_factory=dict)
    dropped: int = 0
    margin: float = math.inf


def batch(rows: Iterable[int], lengths: tuple[int, int] = (ENCODER, DECODER)) -> Seq2SeqBatch:
    """Rows of an endless batch, each by its number: padded in both streams, differently."""

    def row(number: int) -> list[Tensor]:
        draw = torch.Generator().manual_seed(number)
        tokens = [torch.randint(3, 97, (n,), generator=draw) for n in (*lengths, lengths[1])]
        real = (torch.arange(n) < n - number % 3 for n in lengths)
        return [*tokens, *real]

    indices = list(rows)
    columns = [torch.stack(column) for column in zip(*map(row, indices), strict=True)]
    encoder, decoder, targets, encoder_mask, decoder_mask = columns
    return Seq2SeqBatch(
        encoder_tokens=encoder,
        decoder_tokens=decoder,
        decoder_targets=targets,
        encoder_mask=encoder_mask,
        decoder_mask=decoder_mask,
        sample_index=torch.tensor(indices),
    )


@dataclass
class Training:
    """A rank's model and what trains it. `steps` may be made to fail by patching what it uses."""

    config: RunConfig
    mesh: Mesh
    parts: Parts
    lengths: tuple[int, int] = (ENCODER, DECODER)
    distillation: Any = None  # as of the runner

    @classmethod
    def start(
        cls,
        config: RunConfig,
        lengths: tuple[int, int] = (ENCODER, DECODER),
        prepare: Callable[[Parts], None] | None = None,
    ) -> Training:
        """Of this rank; alone where no group was formed."""
        grouped = torch.distributed.is_initialized()
        mesh = Mesh.over_ranks(CPU, config.parallel) if grouped else Mesh(0, 1, CPU, None)
        parts = build_parts(config, mesh, lengths=lengths)
        parts.initialize(3)
        parts.train()
        if prepare:
            prepare(parts)
        return cls(config, mesh, parts, lengths)

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """This rank's share of a step."""
        train, dp = self.config.train, self.mesh.dp
        share = train.batch_size // dp.size
        starts = range(dp.rank * share, (dp.rank + 1) * share, train.micro_batch_size)
        batches = [batch(range(s, s + train.micro_batch_size), self.lengths) for s in starts]
        known = self.distillation.known if self.distillation else lambda _: None
        return [MicroBatch.of(b, CPU, Noise(1, step, b.sample_index), known(b)) for b in batches]

    def steps(self, number: int) -> Outcome:
        """Train, and tell."""
        outcome = Outcome()
        whole = batch(range(self.config.train.batch_size), self.lengths)
        size = BatchSize(len(whole.encoder_tokens), int(whole.decoder_mask.sum()))
        optimizer = build_optimizer(self.parts.parameters(), self.config.optim)
        runner = Runner(self.config, self.mesh, self.parts)
        runner.distillation = self.distillation
        auxiliary = torch.zeros((), dtype=torch.float64)

        def record(output: Any, sums: Any, micro: MicroBatch) -> None:
            auxiliary.add_(output.aux_loss.detach() * micro.rows / size.rows)

        for step in range(number):
            loss = runner.backward(self.micro_batches(step), size, record)
            self.parts.gradients.finish()
            self.parts.backend.finish_step()
            loss = self.mesh.sum_(loss)
            if step == 0:
                outcome.gradients = self._held("gradients")
            norm = clip_gradients(self.parts.parameters(), CLIP, self.mesh)
            if step == 0:
                outcome.loss, outcome.norm = loss.item(), norm.item()
                outcome.auxiliary = self.mesh.sum_(auxiliary.clone()).item()
            optimizer.step()
            self.parts.gradients.clear()
        outcome.parameters = self._held("parameters")
        return outcome

    def _held(self, what: str) -> dict[str, Held]:
        held = {}
        for name, w in self.parts.weights.items():
            tensor = w.local.grad if what == "gradients" else w.local.detach()
            if what == "gradients" and not w.parameter.requires_grad:
                assert w.parameter.grad is None, f"{name} is frozen and has a gradient"
                assert tensor is None
                continue
            assert tensor is not None
            held[name] = Held(w.block.shape, w.block.slices, tensor.clone())
        return held


@contextmanager
def working_in(dtype: torch.dtype) -> Iterator[None]:
    """New floating tensors have this type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def train(config: RunConfig, dtype: torch.dtype, steps: int) -> Outcome:
    """Train on this rank; runs in the processes of a `World`."""
    with working_in(dtype):
        return Training.start(config).steps(steps)


def train_alone(config: RunConfig, dtype: torch.dtype, steps: int) -> Outcome:
    """Likewise in one process, and look at how tokens were routed."""
    with working_in(dtype):
        training = Training.start(config)
        routings = Routings(training.parts)
        outcome = training.steps(steps)
    outcome.dropped, outcome.margin = routings.dropped, routings.margin
    return outcome


class Routings:
    """What the Switch layers of a whole model do from now on.

    Attributes:
        dropped: real tokens that found no place.
        margin: least distance between the probabilities of a token's two best experts; with
            routers that send a token to several, see `margin_of_all_pairs`.
        tokens: by expert, of each forward pass of a layer, before any is dropped.
    """

    def __init__(self, parts: Parts) -> None:
        self.dropped = 0
        self.margin = math.inf
        self.tokens: list[list[int]] = []
        for module in parts.models[0].modules():
            if isinstance(module, Router):
                module.register_forward_hook(self._look)

    def _look(self, router: Any, arguments: Any, routing: Routing) -> None:
        groups = arguments[1]
        margin = margin_of_experts if routing.token is None else margin_of_all_pairs
        self.margin = min(self.margin, margin(routing.probabilities.detach(), groups.exists))
        kept = routing.by_token(routing.kept, groups.real.numel()).view(*groups.real.shape, -1)
        self.dropped += int((groups.real & ~kept.any(-1)).sum())
        experts = routing.by_token(routing.expert, groups.real.numel())[groups.exists.flatten()]
        chosen = experts[experts >= 0]
        self.tokens.append(torch.bincount(chosen, minlength=len(router.weight)).tolist())


def margin_of_experts(probabilities: Tensor, exists: Tensor) -> float:
    """Least distance of a token's two best experts, of probabilities [G, S, E]."""
    first, second = probabilities[exists].topk(2, -1).values.unbind(-1)
    return float((first - second).min())


def margin_of_all_pairs(probabilities: Tensor, exists: Tensor) -> float:
    """Least relative distance of any two experts of a token, or two tokens of an expert's group."""
    least = math.inf
    for group, there in zip(probabilities, exists, strict=True):
        for ranked in (group[there].sort(-1).values, group[there].t().sort(-1).values):
            least = min(least, float((ranked.diff(dim=-1) / ranked[..., 1:]).min()))
    return least


def assemble(parts: Iterable[dict[str, Held]]) -> tuple[dict[str, Tensor], set[str]]:
    """Global tensors, NaN where no rank holds anything, and the names that holders disagree on.

    Holders may differ in the last bits, as one's sum may have been taken in another order.
    """
    whole: dict[str, Tensor] = {}
    disputed: set[str] = set()
    for part in parts:
        for name, held in part.items():
            empty = torch.full(held.shape, torch.nan, dtype=held.block.dtype)
            place = whole.setdefault(name, empty)[held.place]
            seen = ~place.isnan()
            difference = (place - held.block)[seen].abs()
            scale = torch.finfo(place.dtype).eps * 1e5 * held.block[seen].abs()
            if difference.numel() and not difference.max() <= scale.max():
                disputed.add(name)
            place.copy_(held.block)
    return whole, disputed


def differences(
    ours: Iterable[dict[str, Held]], reference: dict[str, Held], bound: float
) -> dict[str, str]:
    """By name, what is wrong with tensors: relative to each one's largest element."""
    whole, disputed = assemble(ours)
    expected, _ = assemble([reference])
    wrong = dict.fromkeys(whole.keys() ^ expected.keys(), "missing or not known")
    for name in whole.keys() & expected.keys():
        largest = expected[name].abs().max().clamp(min=torch.finfo(torch.float64).tiny)
        error = float((whole[name] - expected[name]).abs().max() / largest)
        if not error <= bound:
            wrong[name] = f"off by {error:.1e} of its largest element"
        elif name in disputed:
            wrong[name] = "not the same on all ranks that hold it"
    return wrong


def compare(
    outcomes: list[Outcome], alone: Outcome, bound: float, parameter_bound: float
) -> dict[str, dict[str, str]]:
    """Everything that is wrong: by kind ("numbers", "gradients", "parameters") and name."""
    numbers = {}
    for name in ("loss", "auxiliary", "norm"):
        expected = getattr(alone, name)
        errors = [abs(getattr(o, name) - expected) / (abs(expected) or 1.0) for o in outcomes]
        if not max(errors) <= bound or any(math.isnan(e) for e in errors):
            numbers[name] = f"off by {max(errors):.1e}"
    wrong = {
        "numbers": numbers,
        "gradients": differences([o.gradients for o in outcomes], alone.gradients, bound),
        "parameters": differences(
            [o.parameters for o in outcomes], alone.parameters, parameter_bound
        ),
    }
    return {kind: found for kind, found in wrong.items() if found}
