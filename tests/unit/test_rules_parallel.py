"""Layouts: what is refused, with which words, and that each remedy is accepted."""

import dataclasses
import logging
from collections.abc import Iterator

import pytest
import torch
from torch.distributed.pipelining import schedules

from megaswitch.config import ParallelConfig, RunConfig, load_config
from megaswitch.log import ConfigError
from megaswitch.rules import check
from megaswitch.rules_parallel import check_options, check_sequence_parallel

SWITCH = ("--model.preset=switch-tiny",)  # 4 heads, 8 experts, 2 + 2 blocks, d_model 128
TINY = (*SWITCH, "--data.encoder_length=64", "--train.batch_size=96")
SWITCH_C = ("--model.preset=switch-c-2048",)


def problems(world_size: int, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides, world_size=world_size)
    return caught.value.problems


def accepted(world_size: int, *overrides: str) -> RunConfig:
    return load_config(None, overrides, world_size=world_size)


# ranks, overrides, the problem, and remedies: each alone (with the ranks it needs) is accepted.
REFUSED = {
    "heads": (
        8,
        [*SWITCH_C, "--parallel.tp=8"],
        "parallel.tp=8 must divide model.num_heads=30 (switch-c-2048); use 1 or 2",
        [(8, "--parallel.tp=1"), (8, "--parallel.tp=2")],
    ),
    "heads, where the tokens need not be sliced": (
        24,
        [*SWITCH_C, "--parallel.tp=8", "--train.batch_size=192",
         "--parallel.sequence_parallel=false"],
        "parallel.tp=8 must divide model.num_heads=30 (switch-c-2048); use 1, 2, 3 or 6",
        [(24, f"--parallel.tp={tp}") for tp in (1, 2, 3, 6)],
    ),
    "d_ff": (
        4,
        [*TINY, "--model.d_ff=510", "--parallel.tp=4"],
        "parallel.tp=4 must divide model.d_ff=510; use 1 or 2",
        [(4, "--parallel.tp=2"), (4, "--parallel.tp=1")],
    ),
    "d_model": (
        8,
        [*TINY, "--model.d_model=126", "--parallel.tp=4", "--parallel.ep=2"],
        "parallel.tp=4 must divide model.d_model=126 with parallel.ep > 1; use 1 or 2",
        [(8, "--parallel.tp=2"), (8, "--parallel.ep=1")],
    ),
    "vocabulary": (
        4,
        [*TINY, "--model.vocab_size=3", "--parallel.tp=4"],
        "parallel.tp=4 must not exceed model.vocab_size=3, whose rows it slices; use 1 or 2",
        [(4, "--parallel.tp=2"), (4, "--parallel.tp=1")],
    ),
    "ranks": (
        6,
        [*TINY, "--parallel.tp=2", "--parallel.ep=2"],
        "parallel.pp × ep × tp = 1 × 2 × 2 = 4 must divide the number of ranks, 6; start a "
        "multiple of 4 ranks with torchrun, or use values whose product is 1, 2, 3 or 6",
        [(4,), (12,), (6, "--parallel.tp=1"), (6, "--parallel.ep=1")],
    ),
    "ranks without torchrun": (
        1,
        [*TINY, "--parallel.tp=2"],
        "parallel.pp × ep × tp = 1 × 1 × 2 = 2 must divide the number of ranks, 1; start a "
        "multiple of 2 ranks with torchrun, or use values whose product is 1",
        [(2,), (4,), (1, "--parallel.tp=1")],
    ),
    "encoder tokens": (
        2,
        ["--train.micro_batch_size=1", "--data.encoder_length=65", "--parallel.tp=2"],
        "train.micro_batch_size × encoder length = 1 × 65 = 65 must be a multiple of "
        "parallel.tp=2, as sequence parallelism slices these tokens; use a micro_batch_size that "
        "is a multiple of 2, or parallel.sequence_parallel=false",
        [(2, "--train.micro_batch_size=2"), (2, "--parallel.sequence_parallel=false")],
    ),
    "decoder tokens": (
        4,
        ["--train.micro_batch_size=1", "--data.decoder_length=18", "--parallel.tp=4"],
        "train.micro_batch_size × decoder length = 1 × 18 = 18 must be a multiple of "
        "parallel.tp=4, as sequence parallelism slices these tokens; use a micro_batch_size that "
        "is a multiple of 2, or parallel.sequence_parallel=false",
        [(4, "--train.micro_batch_size=2"), (4, "--parallel.sequence_parallel=false")],
    ),
    "experts": (
        24,
        [*TINY, "--train.batch_size=192", "--parallel.ep=3"],
        "parallel.ep=3 must divide model.moe.num_experts=8 (switch-tiny); use 1, 2, 4 or 8",
        [(24, f"--parallel.ep={ep}") for ep in (1, 2, 4, 8)],
    ),
    "more ranks than experts": (
        16,
        [*TINY, "--train.batch_size=128", "--parallel.ep=16"],
        "parallel.ep=16 must divide model.moe.num_experts=8 (switch-tiny); use 1, 2, 4 or 8",
        [(16, f"--parallel.ep={ep}") for ep in (1, 2, 4, 8)],
    ),
    "no experts": (
        2,
        ["--parallel.ep=2"],
        "parallel.ep=2 needs experts to spread, and model.moe.num_experts=0 is a dense model; use "
        "ep=1, or set num_experts to a multiple of 2",
        [(2, "--parallel.ep=1"), (2, "--model.moe.num_experts=6")],
    ),
    "chunks": (
        2,
        [*TINY, "--parallel.ep=2", "--parallel.ep_chunks=3"],
        "parallel.ep_chunks=3 must divide the 4 experts of a rank (model.moe.num_experts / "
        "parallel.ep = 8 / 2); use 1, 2 or 4",
        [(2, f"--parallel.ep_chunks={n}") for n in (1, 2, 4)],
    ),
    "chunks of nothing": (
        2,
        [*TINY, "--parallel.ep_chunks=2"],
        "parallel.ep_chunks=2 splits the exchange with the experts of other ranks, and with "
        "parallel.ep=1 there are none; use ep_chunks=1",
        [(2, "--parallel.ep_chunks=1"), (2, "--parallel.ep=2")],
    ),
    "more stages than blocks": (
        8,
        [*TINY, "--parallel.pp=8"],
        "parallel.pp × stages_per_rank = 8 × 1 = 8 stages must not exceed the 4 blocks of the "
        "model (num_encoder_layers=2, num_decoder_layers=2); use parallel.pp=1, 2 or 4",
        [(8, "--parallel.pp=1", "--train.batch_size=64")]
        + [(8, f"--parallel.pp={pp}", "--train.batch_size=128") for pp in (2, 4)],
    ),
    "more stages per rank than blocks": (
        4,
        [*TINY, "--train.batch_size=128", "--parallel.pp=4", "--parallel.stages_per_rank=2",
         "--parallel.schedule=interleaved"],
        "parallel.pp × stages_per_rank = 4 × 2 = 8 stages must not exceed the 4 blocks of the "
        "model (num_encoder_layers=2, num_decoder_layers=2); use parallel.pp=2 or "
        "parallel.stages_per_rank=1",
        [(4, "--parallel.pp=2"), (4, "--parallel.stages_per_rank=1")],
    ),
    "too few stages listed": (
        2,
        [*TINY, "--parallel.pp=2", "--parallel.layers_per_stage=[4]"],
        "parallel.layers_per_stage=[4] must give each of the 2 stages (parallel.pp × "
        "stages_per_rank) at least one block, 4 in all; leave it unset, or use [2, 2]",
        [(2, "--parallel.layers_per_stage=[2, 2]"), (2, "--parallel.layers_per_stage=[1, 3]")],
    ),
    "an empty stage": (
        3,
        [*TINY, "--parallel.pp=3", "--parallel.layers_per_stage=[4, 0, 0]"],
        "parallel.layers_per_stage=[4, 0, 0] must give each of the 3 stages (parallel.pp × "
        "stages_per_rank) at least one block, 4 in all; leave it unset, or use [2, 1, 1]",
        [(3, "--parallel.layers_per_stage=[2, 1, 1]")],
    ),
    "stages that do not sum up": (
        2,
        [*TINY, "--parallel.pp=2", "--parallel.layers_per_stage=[2, 3]"],
        "parallel.layers_per_stage=[2, 3] must give each of the 2 stages (parallel.pp × "
        "stages_per_rank) at least one block, 4 in all; leave it unset, or use [2, 2]",
        [(2, "--parallel.layers_per_stage=[2, 2]")],
    ),
    "a schedule without a pipeline": (
        1,
        [*TINY, "--parallel.schedule=gpipe"],
        "parallel.schedule='gpipe' would be ignored because parallel.pp=1 makes no pipeline; "
        "remove it, or raise pp",
        [(1, "--parallel.schedule=1f1b"), (2, "--parallel.pp=2")],
    ),
    "stages without a pipeline": (
        1,
        [*TINY, "--parallel.layers_per_stage=[4]"],
        "parallel.layers_per_stage=[4] would be ignored because parallel.pp=1 makes no pipeline; "
        "remove it, or raise pp",
        [(2, "--parallel.pp=2", "--parallel.layers_per_stage=[1,3]")],
    ),
    "too few micro-batches": (
        4,
        [*TINY, "--train.batch_size=16", "--parallel.pp=4"],
        "train.batch_size=16 makes 2 micro-batches (of train.micro_batch_size × data-parallel "
        "ranks = 8 × 1) and parallel.schedule='1f1b' needs at least parallel.pp=4; use "
        "train.batch_size=32, or parallel.schedule='gpipe'",
        [(4, "--train.batch_size=32"), (4, "--parallel.schedule=gpipe")],
    ),
    "uneven rounds": (
        2,
        [*TINY, "--train.batch_size=40", "--parallel.pp=2", "--parallel.stages_per_rank=2",
         "--parallel.schedule=zero-bubble"],
        "train.batch_size=40 makes 5 micro-batches (of train.micro_batch_size × data-parallel "
        "ranks = 8 × 1) and parallel.schedule='zero-bubble' needs equally many in each of 2 "
        "rounds (of parallel.pp=2 or more); use train.batch_size=48",
        [(2, "--train.batch_size=48")],
    ),
    "too few micro-batches at the start": (
        4,
        [*TINY, "--parallel.pp=4", "--train.rampup_batch_size=16",
         "--train.rampup_increment=16", "--train.rampup_samples=99"],
        "a batch of 16 (ramp-up from train.rampup_batch_size=16 by 16) makes 2 micro-batches (of "
        "train.micro_batch_size × data-parallel ranks = 8 × 1) and parallel.schedule='1f1b' needs "
        "at least parallel.pp=4; use multiples of 32 for batch_size, rampup_batch_size and "
        "rampup_increment, or parallel.schedule='gpipe'",
        [(4, "--train.rampup_batch_size=32", "--train.rampup_increment=32"),
         (4, "--parallel.schedule=gpipe")],
    ),
    "uneven rounds on the way": (
        2,
        [*TINY, "--parallel.pp=2", "--parallel.schedule=interleaved",
         "--train.rampup_batch_size=16", "--train.rampup_increment=8", "--train.rampup_samples=99"],
        "a batch of 40 (ramp-up from train.rampup_batch_size=16 by 8) makes 5 micro-batches (of "
        "train.micro_batch_size × data-parallel ranks = 8 × 1) and parallel.schedule='interleaved' "
        "needs equally many in each of 2 rounds (of parallel.pp=2 or more); use multiples of 16 "
        "for batch_size, rampup_batch_size and rampup_increment, or parallel.schedule='gpipe'",
        [(2, "--train.rampup_increment=16"), (2, "--parallel.schedule=gpipe")],
    ),
    "replicas": (
        8,
        [*TINY, "--train.batch_size=64", "--parallel.ep=2", "--parallel.zero=full",
         "--parallel.replicas=3"],
        "parallel.replicas=3 must divide the 4 ranks that hold the same experts (edp = ranks / (pp "
        "× ep × tp) = 8 / 2); use 1, 2 or 4",
        [(8, f"--parallel.replicas={n}") for n in (1, 2, 4)],
    ),
    "a batch that data-parallel ranks cannot share": (
        8,
        [*TINY, "--train.batch_size=40", "--parallel.tp=2", "--parallel.pp=2",
         "--parallel.schedule=gpipe"],
        "train.batch_size=40 must be a multiple of train.micro_batch_size × data-parallel ranks = "
        "8 × 2 = 16; use 32",
        [(8, "--train.batch_size=32")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_states_value_rule_and_remedy(name):
    ranks, overrides, problem, _ = REFUSED[name]
    assert problems(ranks, *overrides) == [problem]


@pytest.mark.parametrize("name", REFUSED)
def test_every_remedy_is_accepted(name):
    _, overrides, _, remedies = REFUSED[name]
    for ranks, *changes in remedies:
        accepted(ranks, *overrides, *changes)


def test_all_problems_of_a_layout_come_at_once():
    overrides = ["--parallel.tp=4", "--parallel.ep=3", "--parallel.pp=8", "--model.num_heads=6"]
    overrides += ["--parallel.ep_chunks=2", "--data.decoder_length=3", "--train.batch_size=7"]
    overrides += [
        "--parallel.layers_per_stage=[1]",
        "--parallel.cp=2",
        "--train.micro_batch_size=1",
    ]
    overrides += ["--model.moe.group_size=64"]
    found = problems(10, *TINY, *overrides)
    for start in (
        "parallel.cp is not a known key; context parallelism is not supported",
        "parallel.pp × ep × tp = 8 × 3 × 4 = 96 must divide the number of ranks, 10",
        "parallel.tp=4 must divide model.num_heads=6; use 1",
        "train.micro_batch_size × decoder length = 1 × 3 = 3 must be",
        "parallel.ep=3 must divide model.moe.num_experts=8 (switch-tiny); use 1, 2, 4 or 8",
        "parallel.pp × stages_per_rank = 8 × 1 = 8 stages must not exceed",
        "parallel.layers_per_stage=[1] must give each",
    ):
        assert sum(problem.startswith(start) for problem in found) == 1, (start, found)
    assert len(found) == 7


@pytest.mark.parametrize(
    "override",
    [
        "--parallel.replicas=2",
        "--parallel.prefetch=2",
        "--parallel.stages_per_rank=2",
        "--parallel.zero=optimizer --parallel.overlap_gradients=false",
    ],
)
def test_keys_that_a_layout_would_ignore_are_refused(override):
    (problem,) = problems(2, "--parallel.pp=2", *override.split())
    assert "would be ignored because" in problem


def test_a_preset_is_named_only_where_the_value_is_its_own():
    found = problems(8, *SWITCH_C, "--model.num_heads=6", "--parallel.tp=8")
    assert found == ["parallel.tp=8 must divide model.num_heads=6; use 1 or 2"]


def test_layouts_of_every_kind_are_accepted():
    everything = ["--parallel.pp=2", "--parallel.ep=2", "--parallel.tp=2"]
    accepted(8, *TINY, *everything)
    accepted(16, *TINY, *everything, "--parallel.zero=full", "--parallel.replicas=2")
    accepted(8, *TINY, "--parallel.ep=8", "--train.batch_size=64")
    accepted(2, *TINY, "--parallel.tp=2", "--model.vocab_size=2047")


def test_the_decoder_can_be_checked_when_its_length_is_known():
    config = accepted(4, "--parallel.tp=4", "--train.micro_batch_size=1")
    assert not list(check_sequence_parallel(config, "decoder", 20))
    (problem,) = check_sequence_parallel(config, "decoder", 18)
    assert "a micro_batch_size that is a multiple of 2, or" in problem


class Stage(schedules._PipelineStageBase):
    """As much of a stage as the constructors of torch's schedules look at."""

    __abstractmethods__ = frozenset()

    def __init__(self, ranks: int, index: int) -> None:
        self.submod, self.device, self.group = None, torch.device("cpu"), None
        self.group_size, self.group_rank, self.num_stages = ranks, 0, ranks * 2
        self.stage_index, self.has_backward = index, True
        self.stage_index_to_group_rank = {stage: stage % ranks for stage in range(ranks * 2)}


Stage.__abstractmethods__ = frozenset()


def torch_accepts(schedule: str, ranks: int, count: int) -> bool:
    first, second = Stage(ranks, 0), Stage(ranks, ranks)
    try:
        if schedule == "interleaved":
            schedules.ScheduleInterleaved1F1B([first, second], count, loss_fn=max)
        elif schedule == "zero-bubble":
            schedules.ScheduleInterleavedZeroBubble([first, second], count, loss_fn=max)
        else:
            first.num_stages = ranks
            kinds = {"gpipe": schedules.ScheduleGPipe, "1f1b": schedules.Schedule1F1B}
            kinds[schedule](first, count, loss_fn=max)
    except ValueError:
        return False
    return True


@pytest.fixture
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zero-bubble"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_micro_batches_accepted_are_those_of_torch(schedule, ranks, quiet):
    overrides = [f"--parallel.schedule={schedule}", f"--parallel.pp={ranks}"]
    if schedule in ("interleaved", "zero-bubble"):
        overrides.append("--parallel.stages_per_rank=2")
    for count in range(1, 14):
        sizes = ["--train.micro_batch_size=1", f"--train.batch_size={count}"]
        try:
            accepted(ranks, *overrides, *sizes)
            ours = True
        except ConfigError:
            ours = False
        assert ours == torch_accepts(schedule, ranks, count), count


@pytest.mark.parametrize(
    ("overrides", "layout", "expected"),
    [
        (SWITCH_C, {"tp": 4}, "--tp=4 must divide model.num_heads=30 (switch-c-2048); use 1 or 2"),
        (SWITCH, {"ep": 16},
         "--ep=16 must divide model.moe.num_experts=8 (switch-tiny); use 1, 2, 4 or 8"),
        (["--model.preset=t5-small"], {"ep": 2},
         "--ep=2 needs experts to spread, and model.moe.num_experts=0 is a dense model; "
         "use --ep=1"),
        (SWITCH, {"ep": 2, "tp": 3},
         "--ep × --tp = 2 × 3 = 6 must divide the number of ranks, 16; start a multiple of 6 ranks "
         "with torchrun, or use values whose product is 1, 2, 4, 8 or 16"),
        ([*SWITCH, "--model.d_model=126"], {"ep": 2, "tp": 4},
         "--tp=4 must divide model.d_model=126 with --ep > 1; use 1 or 2"),
    ],
)  # fmt: skip
def test_options_of_commands_are_refused_in_their_words(overrides, layout, expected):
    config = load_config(None, overrides)
    parallel = ParallelConfig(**layout, sequence_parallel=False)
    assert expected in list(check_options(dataclasses.replace(config, parallel=parallel), 16))


def test_options_of_commands_are_not_refused_for_what_matters_in_training_alone():
    config = load_config(None, [*SWITCH_C, "--train.batch_size=8"])
    laid = dataclasses.replace(config, parallel=ParallelConfig(ep=2048, tp=2))
    assert check(laid, 4096)
    assert list(check_options(laid, 4096)) == []
