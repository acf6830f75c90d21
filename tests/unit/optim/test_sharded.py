"""Optimizers over blocks of parameters, against the same optimizers over the whole parameters.

Four ranks stand in a grid of 2 × 2: axis "a" is the outer one, "b" the inner one, "all" both. The
whole parameters are known to every rank, which cuts its blocks by hand, trains both, and tells how
far they are apart.
"""

import multiprocessing
import traceback
from dataclasses import replace
from itertools import count
from multiprocessing.connection import Connection
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megaswitch.optim import adafactor_math, sharded_adafactor
from megaswitch.optim.adafactor import Adafactor
from megaswitch.optim.build import build_optimizer, clip_gradients
from megaswitch.parallel.mesh import Axis, Mesh
from megaswitch.parallel.shard import declare
from megaswitch.parallel.weights import Block

RANKS = 4

# Name: global shape, whether dimension 0 counts experts, the axes that divide each dimension.
PARAMETERS = {
    "rows": ((140, 130), False, ["all", ""]),
    "columns": ((130, 140), False, ["", "all"]),
    "rows and columns": ((150, 132), False, ["a", "b"]),
    "columns and rows": ((132, 150), False, ["b", "a"]),
    "rows twice": ((140, 130), False, ["ab", ""]),
    "rows twice, the inner axis first": ((134, 129), False, ["ba", ""]),
    "uneven rows": ((5, 6), False, ["all", ""]),
    "uneven columns": ((6, 5), False, ["", "ba"]),
    "a rank without rows": ((3, 7), False, ["all", ""]),
    "a rank without columns": ((7, 3), False, ["", "all"]),
    "ranks without rows on one axis": ((1, 7), False, ["a", "b"]),
    "replicated": ((9, 8), False, ["", ""]),
    "replicated on one axis": ((131, 136), False, ["", "b"]),
    "vector": ((11,), False, ["all"]),
    "short vector": ((3,), False, ["ab"]),
    "scalar": ((), False, []),
    "experts, rows": ((6, 160, 130), True, ["a", "b", ""]),
    "experts, columns": ((6, 160, 130), True, ["a", "", "b"]),
    "experts twice": ((5, 8, 9), True, ["ab", "", ""]),
    "a rank without experts": ((3, 8, 9), True, ["all", "", ""]),
    "whole experts, divided matrices": ((3, 7, 10), True, ["", "a", "b"]),
    "expert rows twice": ((2, 9, 6), True, ["", "ab", ""]),
    "expert vectors": ((6, 7), True, ["a", "b"]),
}
# Updated together with those that they are like.
TWINS = ("rows", "columns and rows", "uneven rows", "a rank without rows", "vector",
         "experts, rows", "experts twice", "a rank without experts")  # fmt: skip
PARAMETERS |= {f"{name}, again": PARAMETERS[name] for name in TWINS}


class Rank:
    """What a process of the world knows: its axes, its mesh, and how to cut."""

    def __init__(self, rank: int) -> None:
        outer, inner = divmod(rank, 2)
        groups = {ranks: dist.new_group(ranks) for ranks in ((0, 2), (1, 3), (0, 1), (2, 3))}
        self.axes = {
            "a": Axis("a", outer, 2, groups[inner, inner + 2]),
            "b": Axis("b", inner, 2, groups[2 * outer, 2 * outer + 1]),
            "all": Axis("all", rank, RANKS, dist.group.WORLD),
        }
        self.mesh = Mesh(rank, RANKS, torch.device("cpu"), dist.group.WORLD)

    def cut(self, whole: nn.Parameter, layout: list[str]) -> nn.Parameter:
        """This rank's block; each axis in turn cuts as `torch.chunk` does, with empty ends."""
        offsets, sizes, axes = [], [], []
        for size, names in zip(whole.shape, layout, strict=True):
            offset = 0
            axes.append(tuple(self.axes[n] for n in ([names] if names == "all" else names)))
            for axis in axes[-1]:
                step = -(-size // axis.size)
                start = min(step * axis.rank, size)
                offset, size = offset + start, min(step, size - start)
            offsets.append(offset)
            sizes.append(size)
        used = {axis.name for divided in axes for axis in divided}
        counts = "all" in used or all(self.axes[n].rank == 0 for n in {"a", "b"} - used)
        block = Block(tuple(whole.shape), tuple(offsets), tuple(sizes), tuple(axes), counts)
        local = nn.Parameter(whole.detach()[block.slices].clone())
        declare(local, *whole.shard_spec.axes, is_bias=whole.shard_spec.is_bias)
        local.block = block
        return local


def wholes(dtype=torch.float64, names=PARAMETERS):
    """Whole parameters; experts differ in size by a lot, so that "joint" matters."""
    generator = torch.Generator().manual_seed(1)
    made = {}
    for name in names:
        shape, expert, _ = PARAMETERS[name]
        values = torch.randn(shape, dtype=torch.float64, generator=generator)
        if expert:
            values *= torch.arange(1.0, shape[0] + 1).view(-1, *[1] * (len(shape) - 1))
        axes = ["ep" if expert and dim == 0 else None for dim in range(len(shape))]
        made[name] = declare(nn.Parameter(values.to(dtype)), *axes)
    return made


def set_gradients(whole, local, step):
    """New gradients, which grow so that from the second step on clipping is at work."""
    generator = torch.Generator().manual_seed(100 + step)
    for name, parameter in whole.items():
        gradient = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        if parameter.ndim:
            # Rows of the front matter less: a mean over some ranks is not one over all.
            size = len(parameter)
            scale = torch.arange(1.0, size + 1, dtype=torch.float64)
            gradient *= scale.view(-1, *[1] * (parameter.ndim - 1))
        parameter.grad = (gradient * 3.0**step).to(parameter.dtype)
        local[name].grad = parameter.grad[local[name].block.slices].clone()


def distance(ours, theirs):
    """Largest relative difference of two tensors of one shape and dtype."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    if ours.numel() == 0:
        return 0.0
    ours, theirs = ours.detach().double(), theirs.detach().double()
    # What is a thousandth of the largest may be the difference of two large numbers.
    return ((ours - theirs).abs() / (theirs.abs() + 1e-3 * theirs.abs().max())).max().item()


def state_block(name, value, block):
    """The part of a whole parameter's state that belongs to `block`."""
    slices = block.slices
    kept = {"row": slices[:-1], "column": (*slices[:-2], *slices[-1:]), "step": ()}
    return value[kept.get(name, slices)]


def distances(whole, theirs, local, ours):
    found = {}
    for name, parameter in whole.items():
        block = local[name].block
        found[name] = distance(local[name], parameter[block.slices])
        states = theirs.state[parameter]
        assert list(ours.state[local[name]]) == list(states)
        for key, value in states.items():
            expected = state_block(key, value, block)
            found[f"{name}: {key}"] = distance(ours.state[local[name]][key], expected)
    return found


def train(rank, build, dtype=torch.float64, steps=3):
    """Distances by parameter and state after a few steps; `build` makes an optimizer."""
    whole = wholes(dtype)
    local = {name: rank.cut(p, PARAMETERS[name][2]) for name, p in whole.items()}
    theirs, ours = build(whole.values()), build(local.values())
    for step in range(steps):
        set_gradients(whole, local, step)
        theirs.step()
        ours.step()
    return distances(whole, theirs, local, ours)


def adafactor_distances(rank, options, dtype=torch.float64):
    def build(parameters):
        parameters = list(parameters)
        groups = [
            {"params": parameters[::2], "weight_decay": 0.3},
            {"params": parameters[1::2]},
        ]
        return Adafactor(groups, lr=0.02, **options)

    return train(rank, build, dtype)


def serve(number: int, store: str, pipe: Connection) -> None:
    """A process of the world: do what the test asks until it says no more."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=number, world_size=RANKS)
    rank = Rank(number)
    while (request := pipe.recv()) is not None:
        function, arguments = request
        try:
            pipe.send((function(rank, *arguments), None))
        except Exception:
            pipe.send((None, traceback.format_exc()))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory):
    """Calls a function of this file on every rank and returns their results."""
    store = str(tmp_path_factory.mktemp("world") / "store")
    context = multiprocessing.get_context("fork")
    pairs = [context.Pipe() for _ in range(RANKS)]
    processes = [
        context.Process(target=serve, args=(number, store, theirs), daemon=True)
        for number, (_, theirs) in enumerate(pairs)
    ]
    for process in processes:
        process.start()
    pipes = [ours for ours, _ in pairs]

    def call(function, *arguments):
        for pipe in pipes:
            pipe.send((function, arguments))
        assert all(pipe.poll(100) for pipe in pipes), "a rank does not answer"
        results, errors = zip(*(pipe.recv() for pipe in pipes), strict=True)
        assert not any(errors), "\n".join(filter(None, errors))
        return results

    yield call
    for pipe in pipes:
        pipe.send(None)
    for process in processes:
        process.join(10)
        process.kill()


def worst(results):
    """The largest distance on any rank, and what it belongs to."""
    return max((value, name) for result in results for name, value in result.items())


@pytest.mark.parametrize("statistics", ["per-expert", "joint"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"factored_min_dim": 1},
        {"factored_min_dim": 10**6, "clip_threshold": 0.5},
        {"scale_by_parameter": False, "factored_min_dim": 6},
    ],
    ids=["128", "all factored", "none factored", "not scaled"],
)
def test_adafactor_on_blocks_is_adafactor_on_the_whole(on_ranks, statistics, options):
    results = on_ranks(adafactor_distances, options | {"expert_statistics": statistics})
    assert len(results[0]) > 3 * len(PARAMETERS) - 1
    assert worst(results)[0] <= 1e-12, worst(results)


def in_small_pieces(rank, statistics):
    limit = adafactor_math._SCRATCH_BYTES_CPU
    adafactor_math._SCRATCH_BYTES_CPU = 1
    try:
        return adafactor_distances(rank, {"factored_min_dim": 6, "expert_statistics": statistics})
    finally:
        adafactor_math._SCRATCH_BYTES_CPU = limit


@pytest.mark.parametrize("statistics", ["per-expert", "joint"])
def test_blocks_are_walked_in_pieces(on_ranks, statistics):
    results = on_ranks(in_small_pieces, statistics)
    assert worst(results)[0] <= 1e-12, worst(results)


def test_states_of_bfloat16_blocks_are_single_precision(on_ranks):
    """`distances` compares the dtypes too; a parameter may be rounded to its neighbour."""
    for result in on_ranks(adafactor_distances, {"factored_min_dim": 6}, torch.bfloat16):
        for name, value in result.items():
            assert value <= (1e-5 if ":" in name else 2e-2), name


def count_sums(rank, names):
    local = [rank.cut(p, PARAMETERS[name][2]) for name, p in wholes(names=names).items()]
    optimizer = Adafactor(local, lr=0.02)
    counted = []
    genuine = dist.all_reduce

    def counting(tensor, group):
        counted.append(group)
        return genuine(tensor, group=group)

    for parameter in local:
        parameter.grad = torch.ones_like(parameter)
    dist.all_reduce = counting
    try:
        optimizer.step()
    finally:
        dist.all_reduce = genuine
    return len(counted)


def test_the_number_of_sums_does_not_grow_with_the_parameters(on_ranks):
    """At most three for each group, none for a model that is whole everywhere."""
    assert on_ranks(count_sums, list(PARAMETERS)) == (9,) * RANKS
    assert on_ranks(count_sums, ["rows"]) == (3,) * RANKS
    assert on_ranks(count_sums, ["columns"]) == (2,) * RANKS
    assert on_ranks(count_sums, ["replicated", "scalar"]) == (0,) * RANKS


def forget_an_axis(rank, options, forgotten):
    """A planted bug: nothing is summed over one of the axes."""
    genuine = sharded_adafactor.sum_terms

    def forgetful(terms):
        genuine((t, tuple(a for a in axes if a.name != forgotten)) for t, axes in terms)

    sharded_adafactor.sum_terms = forgetful
    try:
        return adafactor_distances(rank, options)
    finally:
        sharded_adafactor.sum_terms = genuine


@pytest.mark.parametrize("forgotten", ["a", "b", "all"])
def test_a_forgotten_sum_is_noticed(on_ranks, forgotten):
    """And only where that axis divides something."""
    results = on_ranks(forget_an_axis, {}, forgotten)
    for name, (shape, expert, layout) in PARAMETERS.items():
        dims = list(zip(shape, layout, strict=True))[1 if expert else 0 :]
        # A single row is not divided: one rank has it, the other knows nothing and needs nothing.
        names = [n for size, n in dims if size > 1]
        matters = any(forgotten == n or (n != "all" and forgotten in n) for n in names)
        far = max(result[name] for result in results) > 1e-6
        assert far == matters, name


def forget_a_round(rank, options, forgotten):
    """A planted bug: of the rounds of sums one is left out."""
    genuine = sharded_adafactor.sum_terms
    calls = count()

    def forgetful(terms):
        terms = list(terms)
        if next(calls) % 3 != forgotten:
            genuine(terms)

    sharded_adafactor.sum_terms = forgetful
    try:
        return adafactor_distances(rank, options)
    finally:
        sharded_adafactor.sum_terms = genuine


@pytest.mark.parametrize("forgotten", range(3))
def test_a_forgotten_round_of_sums_is_noticed(on_ranks, forgotten):
    """The second round is about rows of factored parameters only."""
    results = on_ranks(forget_a_round, {}, forgotten)
    far = {name for name in PARAMETERS if max(result[name] for result in results) > 1e-6}
    assert {"rows", "rows and columns", "experts, rows"} <= far
    assert ("vector" in far) == (forgotten != 1)
    assert ("experts, columns" in far) == (forgotten != 1)


def average_evenly(rank, options):
    """A planted bug: every rank weighs the same, however many elements it holds."""
    genuine = sharded_adafactor.ShardedUpdate._term

    def even(self, mean, dims):
        ranks = 1
        for axis in (axis for dim in dims for axis in self._block.axes[dim]):
            ranks *= axis.size
        _, axes = genuine(self, mean.clone(), dims)
        return mean.nan_to_num_().div_(ranks), axes

    sharded_adafactor.ShardedUpdate._term = even
    try:
        return adafactor_distances(rank, options)
    finally:
        sharded_adafactor.ShardedUpdate._term = genuine


def test_an_average_that_ignores_uneven_blocks_is_noticed(on_ranks):
    results = on_ranks(average_evenly, {"factored_min_dim": 1, "clip_threshold": 1e9})
    for name in ("uneven rows", "uneven columns", "a rank without rows", "short vector"):
        assert max(result[name] for result in results) > 1e-6, name


def test_joint_statistics_need_the_experts_of_all_ranks(on_ranks):
    """The planted bug of a sum over the axis of the experts alone."""
    results = on_ranks(forget_an_axis, {"expert_statistics": "joint"}, "all")
    assert max(result["a rank without experts"] for result in results) > 1e-6


def test_a_block_without_gradient_is_a_mistake():
    block = Block((4, 2), (0, 0), (2, 2), ((Axis("a", 0, 2),), ()))
    parameter = declare(nn.Parameter(torch.ones(2, 2)), None, None)
    parameter.block = block
    with pytest.raises(AssertionError, match="need its gradient"):
        Adafactor([parameter], lr=0.1).step()


ADAMW = SimpleNamespace(
    name="adamw", learning_rate=0.1, weight_decay=0.1, beta1=0.9, beta2=0.99, epsilon=1e-8
)


def adamw_distances(rank):
    return train(rank, lambda parameters: build_optimizer(parameters, ADAMW))


def test_adamw_on_blocks_is_adamw_on_the_whole(on_ranks):
    """Empty blocks have their states: `distances` compares names and shapes."""
    results = on_ranks(adamw_distances)
    assert worst(results)[0] <= 1e-12, worst(results)


def clipped(rank, max_norm, poison=None, double_count=False):
    """Norms on blocks and on the whole, and the distances of the gradients after it."""
    whole = wholes()
    local = {name: rank.cut(p, PARAMETERS[name][2]) for name, p in whole.items()}
    set_gradients(whole, local, 0)
    if poison is not None and rank.mesh.rank == 3:
        local["rows"].grad[-1, -1] = poison
    if double_count:
        for parameter in local.values():
            parameter.block = replace(parameter.block, counts=True)
    norm = clip_gradients(local.values(), max_norm, rank.mesh)
    expected = clip_gradients(whole.values(), max_norm)
    far = {n: distance(p.grad, whole[n].grad[p.block.slices]) for n, p in local.items()}
    return norm.item(), expected.item(), worst([far])[0]


@pytest.mark.parametrize("max_norm", [None, 1.0, 1e9])
def test_the_norm_over_blocks_is_that_of_the_whole(on_ranks, max_norm):
    for norm, expected, far in on_ranks(clipped, max_norm):
        assert norm == pytest.approx(expected, rel=1e-13)
        assert far <= 1e-12


def test_counting_replicated_gradients_twice_is_noticed(on_ranks):
    norm, expected, _ = on_ranks(clipped, None, None, True)[0]
    assert norm > expected * 1.0001


@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
def test_a_norm_that_is_not_finite_anywhere_is_so_on_all_ranks(on_ranks, poison):
    for norm, _, _ in on_ranks(clipped, None, poison):
        assert norm == float("inf") if poison == float("inf") else norm != norm


def clip_where_one_rank_has_all(rank, dtype):
    mine = [nn.Parameter(torch.ones(9, dtype=dtype))] if rank.mesh.rank == 2 else []
    for parameter in mine:
        parameter.grad = torch.full_like(parameter, 2.0)
    norm = clip_gradients(mine, 3.0, rank.mesh)
    return norm.item(), norm.dtype, [p.grad.tolist() for p in mine]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_without_gradients_take_part_in_the_norm(on_ranks, dtype):
    results = on_ranks(clip_where_one_rank_has_all, dtype)
    assert [norm for norm, _, _ in results] == [6.0] * RANKS
    assert {kind for _, kind, _ in results} == {torch.float32}
    assert results[2][2] == [pytest.approx([1.0] * 9)]
