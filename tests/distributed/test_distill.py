"""A dense student with a Switch teacher: under every layout as in one process, live or kept."""

from dataclasses import replace

import pytest
import torch

from megaswitch.config import DistillConfig, MoEConfig, ParallelConfig, RunConfig
from megaswitch.layers.soft_targets import TopK, top_k
from megaswitch.parallel.mesh import Mesh
from megaswitch.parallel.tensor_parallel import TensorParallel
from megaswitch.train.distill import Distillation
from megaswitch.train.objectives import MicroBatch, forward
from megaswitch.train.parts import build_parts
from tests.distributed import layouts
from tests.distributed.equality import CPU, Outcome, Training, batch, compare, working_in
from tests.distributed.layouts import Case, config

VOCAB, K = 97, 9
STEPS = 2


def student(case: Case) -> RunConfig:
    """Dense, of the same sizes as its teacher."""
    run = config(case, moe={"num_experts": 8})
    distill = DistillConfig(teacher="teacher", soft_weight=0.4, temperature=1.5)
    return replace(run, model=replace(run.model, moe=MoEConfig()), distill=distill)


def teacher(case: Case) -> RunConfig:
    run = config(case)
    parallel = replace(run.parallel, sequence_parallel=False)
    return replace(run, parallel=parallel, distill=student(case).distill)


class Kept:
    """A cache in memory, from a teacher that runs in this process alone."""

    def __init__(self, run: RunConfig, k: int) -> None:
        alone = Mesh(0, 1, CPU, None)
        run = replace(run, parallel=ParallelConfig())
        parts = build_parts(run, alone, training=False)
        parts.initialize(11)
        parts.train(False)
        micro = MicroBatch.of(batch(range(layouts.ROWS)), CPU, None)
        with torch.no_grad():
            logits = forward(parts.models[0], micro, torch.float32).logits
        assert logits is not None
        self.all = top_k(logits, k, temperature=1.5, vocab_size=VOCAB)

    def read(self, rows: torch.Tensor) -> TopK:
        return TopK(*(t[rows] for t in (self.all.tokens, self.all.probabilities, self.all.rest)))


def distill(case: Case, k: int | None) -> tuple[Outcome, dict[str, float]]:
    """Train a student on this rank; its teacher runs along, or k of its tokens were kept."""
    with working_in(torch.float64):
        training = Training.start(student(case))
        mesh = training.mesh
        tp = TensorParallel(mesh.axis("tp"), training.config.parallel.sequence_parallel)
        parts = cache = None
        if k is None:
            parts = build_parts(teacher(case), mesh, training=False)
            parts.initialize(11)
            parts.train(False)
        else:
            cache = Kept(teacher(case), k)
        distillation = Distillation(training.config, tp, "", parts, cache)
        training.distillation = distillation
        return training.steps(STEPS), distillation.summary(mesh)


ALONE = layouts.case("")
LIVE = [
    layouts.case("tp2", sequence_parallel=True),
    layouts.case("ep2", ep_chunks=2),
    layouts.case("edp2·ep2", zero="full", micro_batches=2),
    layouts.case("ep2·tp2", sequence_parallel=False),
    pytest.param(layouts.case("edp2·ep2·tp2", zero="optimizer"), marks=pytest.mark.long),
]
KEPT = [
    layouts.case("tp2"),
    layouts.case("edp2", zero="full"),
    layouts.case("pp2", schedule="1f1b", micro_batches=2),
    layouts.case("pp2·tp2", schedule="zero-bubble", micro_batches=2),
]


@pytest.fixture(scope="module")
def reference(world):
    return {k: world.run(1, distill, ALONE, k)[0] for k in (None, K)}


def check(world, reference, case: Case, k: int | None) -> None:
    outcomes, summaries = zip(*world.run(case.ranks, distill, case, k), strict=True)
    expected, summary = reference[k]
    assert compare(list(outcomes), expected, 1e-10, 1e-9) == {}
    for one in summaries:
        assert one == pytest.approx(summary, rel=1e-10)


@pytest.mark.parametrize("case", LIVE, ids=lambda case: str(case.grid))
def test_a_teacher_that_runs_along_teaches_the_same_under_any_layout(world, reference, case):
    check(world, reference, case, None)


@pytest.mark.parametrize("case", KEPT, ids=lambda case: str(case.grid))
def test_what_was_kept_of_a_teacher_teaches_the_same_under_any_layout(world, reference, case):
    check(world, reference, case, K)


def test_the_soft_loss_matters_and_a_full_cache_is_the_teacher(world, reference):
    (live, live_summary), (kept, kept_summary) = reference[None], reference[K]
    assert abs(live.loss - kept.loss) > 1e-3
    (full, full_summary), = world.run(1, distill, ALONE, VOCAB)  # fmt: skip
    assert compare([full], live, 1e-10, 1e-9) == {}
    assert full_summary == pytest.approx(live_summary, rel=1e-10)
    assert kept_summary["teacher_divergence"] < live_summary["teacher_divergence"]


def kept_tokens(case: Case) -> list[torch.Tensor]:
    """The likeliest tokens as tensor-parallel ranks find them together."""
    with working_in(torch.float64):
        mesh = Mesh.over_ranks(CPU, teacher(case).parallel)
        parts = build_parts(teacher(case), mesh, training=False)
        parts.initialize(11)
        parts.train(False)
        micro = MicroBatch.of(batch(range(layouts.ROWS)), CPU, None)
        with torch.no_grad():
            logits = forward(parts.models[0], micro, torch.float32).logits
        assert logits is not None
        found = top_k(
            logits, K, temperature=1.5, vocab_size=VOCAB, tp=TensorParallel(mesh.axis("tp"))
        )
        return [found.tokens, found.probabilities, found.rest]


def test_ranks_find_the_likeliest_tokens_together(world):
    with working_in(torch.float64):
        expected = Kept(teacher(ALONE), K).all
    for tokens, probabilities, rest in world.run(4, kept_tokens, layouts.case("tp4")):
        assert torch.equal(tokens, expected.tokens)
        assert torch.allclose(probabilities, expected.probabilities, rtol=0, atol=1e-13)
        assert torch.allclose(rest, expected.rest, rtol=0, atol=1e-13)
