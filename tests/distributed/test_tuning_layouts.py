"""Adapters, frozen parameters and scored tasks in layouts: as one process does."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megaswitch.config import LoRAConfig
from megaswitch.layers.parameter import stable_hash
from megaswitch.log import UserError
from megaswitch.metrics_file import read_metrics
from megaswitch.parallel.mesh import Mesh
from megaswitch.train.evaluate_tasks import TaskRequest, evaluate_tasks
from megaswitch.train.finetune import finetune_config
from megaswitch.train.trainer import Trainer
from tests.distributed.equality import CPU, Training, compare, working_in
from tests.distributed.layouts import Case, Grid, Structure, case, config
from tests.unit.train.conftest import tasks, tuning  # noqa: F401  fixtures

LAYOUTS = [
    case("tp2", sequence_parallel=True),
    case("tp2", sequence_parallel=False),
    case("edp2", zero="full", optimizer="adafactor"),
    case("edp2", zero="optimizer"),
    case("ep2", zero="none", ep_chunks=2, optimizer="adafactor"),
    case("pp2", schedule="1f1b"),
    case("pp2", schedule="zero-bubble", stages_per_rank=2, optimizer="adafactor"),
    case("ep2·tp2", sequence_parallel=True, zero="none", optimizer="adafactor"),
    case("ep2·tp2", sequence_parallel=False, zero="none"),
    case("edp2·tp2", sequence_parallel=True, zero="full"),
    case("pp2·tp2", sequence_parallel=False),
]
ADAPTERS = {"model": {"lora": LoRAConfig(rank=4, targets=["*"])}, "optim": {}}
FROZEN = {"model": {}, "optim": {"freeze": ["*.experts.*", "*_attention.q.*", "embedding.*"]}}
BOTH = {"model": ADAPTERS["model"], "optim": {"train_only": ["*.adapter.*", "*.router.*"]}}


def fill_adapters(parts):
    """Away from zero, where the gradients of one factor would be nothing."""
    for name, w in parts.weights.items():
        if name.endswith("adapter.b"):
            draw = torch.Generator().manual_seed(stable_hash(name))
            whole = torch.randn(w.block.shape, generator=draw, dtype=torch.float64) * 0.1
            with torch.no_grad():
                w.local.copy_(whole[w.block.slices])


def tuned(one: Case, changes):
    run = config(one, **changes["model"])
    run = replace(run, optim=replace(run.optim, **changes["optim"]))
    with working_in(torch.float64):
        return Training.start(run, prepare=fill_adapters).steps(3)


def check(world, changes, some):
    for one in some:
        single = Case(Grid(), Structure(), one.free)
        (expected,) = world.run(1, tuned, single, changes)
        outcomes = world.run(one.ranks, tuned, one, changes)
        assert compare(outcomes, expected, 1e-10, 1e-9) == {}, str(one)


def test_layouts_tune_as_one_process_does(world):
    check(world, BOTH, [LAYOUTS[i] for i in (1, 2, 6, 7)])


@pytest.mark.long
@pytest.mark.parametrize("changes", [ADAPTERS, FROZEN, BOTH], ids=["adapters", "frozen", "both"])
def test_all_layouts_tune_as_one_process_does(world, changes):
    check(world, changes, LAYOUTS)


def refused(one: Case, patterns):
    run = config(one)
    run = replace(run, optim=replace(run.optim, train_only=patterns))
    mesh = Mesh.over_ranks(CPU, run.parallel)
    try:
        with mesh.together():
            Training.start(run)
    except UserError as error:
        return str(error)
    return ""


def test_a_stage_with_nothing_to_train_is_refused_on_all_ranks(world):
    messages = world.run(2, refused, case("pp2"), ["decoder.*"])
    assert all("pipeline stage 0" in message for message in messages)


def scores(checkpoint, arguments, layout, folder):
    grid = case(layout).grid
    with working_in(torch.float64):
        request = TaskRequest(
            checkpoint=checkpoint, tasks=arguments, ep=grid.ep, tp=grid.tp, batch_size=4,
            output=folder / layout, samples=14,
        )  # fmt: skip
        plan = request.plan(grid.ranks)
        grouped = torch.distributed.is_initialized()
        mesh = Mesh.over_ranks(CPU, plan.config.parallel) if grouped else Mesh(0, 1, CPU, None)
        return [(r.name, dict(r.figures)) for r in evaluate_tasks(plan, mesh)]


def test_scores_and_predictions_are_the_same_in_any_layout(world, text_run, tasks, tmp_path):  # noqa: F811
    arguments = [
        f"{tasks}/lang.toml={tasks}/lang_valid.jsonl",
        f"pairs={tasks}/first_valid.jsonl",
    ]
    rest = (text_run / "run", arguments)
    (one,) = world.run(1, scores, *rest, "alone", tmp_path)
    written = [(tmp_path / "alone" / f"{n}.jsonl").read_text().splitlines() for n, _ in one]
    assert [len(lines) for lines in written] == [14, 14]
    for layout in ("edp2", "tp2", "ep2·tp2"):
        for found in world.run(case(layout).ranks, scores, *rest, layout, tmp_path):
            assert found == one, layout
        for (name, _), lines in zip(one, written, strict=True):
            again = (tmp_path / layout / f"{name}.jsonl").read_text().splitlines()
            assert [cut(line) for line in again] == [cut(line) for line in lines], layout


def cut(line):
    """A line without its last digits."""
    import json

    record = json.loads(line)
    return record["inputs"], record["prediction"], round(record["score"], 6)


def leg(options, ranks):
    with working_in(torch.float64):
        run = finetune_config(None, options, world_size=ranks)
        grouped = torch.distributed.is_initialized()
        mesh = Mesh.over_ranks(CPU, run.parallel) if grouped else Mesh(0, 1, CPU, None)
        return Trainer.build(run, mesh).fit()


def test_a_tuning_scores_itself_and_goes_on_in_any_layout(world, tuning, tmp_path):  # noqa: F811
    """The weights come from one process's run; tasks are scored while weights are sharded."""
    options = [*tuning, "--model.moe.group_size=32"]
    assert world.run(1, leg, [*options, f"--train.run_dir={tmp_path}/one"], 1) == [True]
    for number, layout in enumerate(
        (["parallel.zero=full"], ["parallel.tp=2"], ["parallel.ep=2", "parallel.zero=optimizer"]), 1
    ):
        more = [f"--{key}" for key in layout]
        steps = [f"--train.steps={2 * number}", "--train.micro_batch_size=2"]
        ranks = 4 if number == 3 else 2
        assert all(world.run(ranks, leg, [*options, *more, *steps], ranks)), layout
    one, many = (read_metrics(Path(tmp_path) / d / "metrics.jsonl") for d in ("one", "tuned"))
    assert [m["step"] for m in one] == [m["step"] for m in many]
    compared = 0
    for a, b in zip(one, many, strict=True):
        for key in a.keys() & b.keys():
            if key == "loss" or key.startswith(("valid/loss", "valid/task", "valid/score")):
                assert b[key] == pytest.approx(a[key], rel=1e-8), (a["step"], key)
                compared += 1
    assert compared > 20
