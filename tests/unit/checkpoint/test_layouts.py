"""A checkpoint of any layout is read by any other, bit for bit, and written behind training's back.

Eight forked ranks hold a small model in layouts made by hand from DTensors and FSDP2.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import multiprocessing as mp
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from megaswitch.checkpoint import manager as module
from megaswitch.checkpoint.chunks import shares
from megaswitch.checkpoint.contents import model_chunks, optimizer_chunks
from megaswitch.checkpoint.integrity import entry_of
from megaswitch.checkpoint.manager import (
    CheckpointManager,
    TrainState,
    checkpoints,
    load_model_tensors,
    read_state,
    verify,
)
from megaswitch.checkpoint.staging import Staging
from megaswitch.config import ParallelConfig, RunConfig
from megaswitch.log import UserError
from megaswitch.optim.adafactor import Adafactor
from megaswitch.parallel.mesh import Mesh
from megaswitch.parallel.shard import declare, spec_of
from megaswitch.parallel.weights import Weight, weight

RANKS = 8
CPU = torch.device("cpu")
CONFIG = RunConfig()
# Shape and axes of each parameter; with dp > 1, FSDP2 cuts most of them unevenly, some into fewer
# parts than there are ranks.
PARAMETERS: dict[str, tuple[tuple[int, ...], tuple[Any, ...]]] = {
    "embedding.weight": ((37, 6), (None, None)),
    "first.up": ((10, 12), ("tp", None)),
    "first.down": ((6, 20), (None, "tp")),
    "first.norm": ((3,), (None,)),
    "second.experts.up": ((4, 5, 8), ("ep", None, "tp")),
    "second.experts.down": ((4, 8, 5), ("ep", "tp", None)),
    "second.router": ((4, 6), (None, None)),
}
TIED = "embedding.weight"  # lies on every pipeline stage
LAYOUTS = {
    "dp8": ParallelConfig(),
    "zero8": ParallelConfig(zero="full"),
    "pp2-ep2-tp2": ParallelConfig(pp=2, ep=2, tp=2),
    "ep4-tp2": ParallelConfig(ep=4, tp=2),
    "pp4-dp2": ParallelConfig(pp=4),
    "zero2-ep2-tp2": ParallelConfig(ep=2, tp=2, zero="full"),
    "zero4-tp2": ParallelConfig(tp=2, zero="full"),
    "hsdp-tp2": ParallelConfig(tp=2, zero="full", replicas=2),
    "hsdp-ep2": ParallelConfig(ep=2, zero="full", replicas=2),
    "pp2-zero4": ParallelConfig(pp=2, zero="full"),
}
OPTIMIZERS = ("adafactor", "adamw")


def value(name: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """The global tensor of that name."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randn(shape, generator=generator)


class Model(nn.Module):
    """Parameters by dotted names; those of the experts lie in a module of their own."""

    def __init__(self, names: list[str], mesh: Mesh) -> None:
        super().__init__()
        for name in names:
            *path, last = name.split(".")
            owner: nn.Module = self
            for part in path:
                if not hasattr(owner, part):
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            shape, axes = PARAMETERS[name]
            owner.register_parameter(last, _sliced(value(name, shape), axes, mesh))


def _sliced(tensor: Tensor, axes: tuple[Any, ...], mesh: Mesh) -> nn.Parameter:
    """A parameter over those of the mesh's axes that slice it."""
    used = [a for a in ("ep", "tp") if a in axes and mesh.axis(a).size > 1]
    if used:
        placements = [Shard(axes.index(a)) for a in used]
        grid = mesh.expert_grid if "ep" in axes else mesh.dense_grid
        tensor = distribute_tensor(tensor, grid[tuple(used)], placements)
    return declare(nn.Parameter(tensor), *axes)


def build(layout: str | None, mesh: Mesh) -> dict[str, Weight]:
    """This rank's weights, all of them in a single process."""
    pp = mesh.axis("pp")
    names = list(PARAMETERS)
    names = [n for i, n in enumerate(names) if n == TIED or i * pp.size // len(names) == pp.rank]
    model = Model(names, mesh)
    specs = {name: spec_of(p) for name, p in model.named_parameters()}
    if layout and LAYOUTS[layout].zero != "none":
        hsdp = mesh.axis("replica").size > 1
        experts = [m for n, m in model.named_modules() if n.endswith("experts")]
        dense = (model, mesh.dense_grid, "dense_shard")
        for part, grid, axis in [*((m, mesh.expert_grid, "shard") for m in experts), dense]:
            fully_shard(part, mesh=grid[("replica", axis) if hsdp else axis])
    weights = {}
    for name, parameter in model.named_parameters():
        data = parameter.data
        over = data.device_mesh.mesh_dim_names if isinstance(data, DTensor) else ()
        axes = [mesh.axis(axis) for axis in over]
        weights[name] = weight(name, parameter, specs[name], axes, counts=mesh.rank == 0)
    return weights


def states_of(name: str, optimizer: str) -> dict[str, tuple[int, ...]]:
    """Keys and global shapes of a parameter's optimizer states."""
    shape, _ = PARAMETERS[name]
    if optimizer == "adamw":
        return {"step": (), "exp_avg": shape, "exp_avg_sq": shape}
    if len(shape) < 2 or name == "second.router":
        return {"step": (), "moment": shape}
    return {"step": (), "row": shape[:-1], "column": (*shape[:-2], shape[-1])}


def expected(one: Weight, key: str, shape: tuple[int, ...]) -> Tensor:
    """This rank's part of an optimizer state."""
    if key == "step":
        return torch.tensor(7.0)
    cuts = list(one.block.slices)
    if key in ("row", "column"):
        del cuts[{"row": -1, "column": -2}[key]]
    return value(f"{one.name}.{key}", shape)[tuple(cuts)].clone()


def optimizer_over(weights: dict[str, Weight], kind: str) -> torch.optim.Optimizer:
    blocks = [w.local for w in weights.values()]
    if kind == "adafactor":
        return Adafactor(blocks, lr=0.1, factored_min_dim=5)
    return torch.optim.AdamW(blocks, lr=0.1, fused=True)


def filled_optimizer(weights: dict[str, Weight], kind: str) -> torch.optim.Optimizer:
    """An optimizer that has made seven steps, one would think."""
    optimizer = optimizer_over(weights, kind)
    for one in weights.values():
        states = states_of(one.name, kind).items()
        optimizer.state[one.local] = {k: expected(one, k, shape) for k, shape in states}
        if not one.local.numel():  # may know nothing, and must not be asked
            optimizer.state[one.local] = {
                k: torch.full_like(t, torch.nan) for k, t in optimizer.state[one.local].items()
            }
    return optimizer


def digest(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tuple(tensor.shape), hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


@functools.cache
def mesh_of(layout: str | None) -> Mesh:
    return Mesh.over_ranks(CPU, LAYOUTS[layout]) if layout else Mesh(0, 1, CPU, None)


def save_layout(folder: Path, layout: str | None) -> dict[str, int]:
    """Save under a layout with every optimizer; returns how much was written of each."""
    mesh = mesh_of(layout)
    weights = build(layout, mesh)
    for kind in OPTIMIZERS:
        manager = CheckpointManager(folder / kind / str(layout), keep=1, mesh=mesh)
        manager.save(CONFIG, TrainState(7, 70, kind), weights, filled_optimizer(weights, kind))
    cuts = {n: len(w.local.flatten()) for n, w in weights.items()}
    return cuts


def load_all(folder: Path, layout: str | None) -> int:
    """Load every layout's checkpoint of every optimizer; returns how many were compared."""
    mesh = mesh_of(layout)
    weights = build(layout, mesh)
    compared = 0
    for kind, source in itertools.product(OPTIMIZERS, [None, *LAYOUTS]):
        for one in weights.values():
            one.local.data.fill_(torch.nan)
        optimizer = optimizer_over(weights, kind)
        manager = CheckpointManager(folder / kind / str(source), keep=1, mesh=mesh)
        (path,) = checkpoints(manager.folder)
        assert manager.restore(path, weights, optimizer) == TrainState(7, 70, kind)
        for name, one in weights.items():
            want = value(name, PARAMETERS[name][0])
            assert digest(one.local.detach()) == digest(want[one.block.slices]), (source, name)
            states = states_of(name, kind)
            assert optimizer.state[one.local].keys() == states.keys()
            for key, shape in states.items():
                got, want = optimizer.state[one.local][key], expected(one, key, shape)
                assert digest(got) == digest(want), (source, name, key)
                compared += 1
            if source is None:  # which knows no layout
                _check_as_torch_sees_it(one, optimizer)
    return compared


def _check_as_torch_sees_it(one: Weight, optimizer: torch.optim.Optimizer) -> None:
    """The parameter, and a state laid out as it is, gathered by torch's own idea of the layout."""
    data = one.parameter.data
    if not isinstance(data, DTensor):
        return
    shape, _ = PARAMETERS[one.name]
    assert torch.equal(data.full_tensor(), value(one.name, shape))
    for key in ("exp_avg", "moment"):
        if key in optimizer.state[one.local]:
            local = optimizer.state[one.local][key]
            state = DTensor.from_local(
                local, data.device_mesh, data.placements, shape=data.shape, stride=data.stride()
            )
            assert torch.equal(state.full_tensor(), value(f"{one.name}.{key}", shape))


# ---------------------------------------------------------------- the world


class World:
    """Ranks that do what they are told, all the same thing."""

    def __init__(self, size: int, folder: Path) -> None:
        context = mp.get_context("fork")
        pairs = [context.Pipe() for _ in range(size)]
        self.pipes = [ours for ours, _ in pairs]
        self.processes = [
            context.Process(target=_rank, args=(rank, size, folder / "store", theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process in self.processes:
            process.start()
        for _, theirs in pairs:
            theirs.close()

    def tell(self, job: Callable[..., Any], *arguments: Any) -> None:
        for pipe in self.pipes:
            pipe.send((job, arguments))

    def __call__(self, job: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `job` returns on each rank; if one fails, the others may wait for it: all end."""
        self.tell(job, *arguments)
        results = {}
        while len(results) < len(self.pipes):
            ready = connection.wait([p for p in self.pipes if p not in results], timeout=60)
            answers = {pipe: pipe.recv() for pipe in ready}
            errors = [error for error, _ in answers.values() if error]
            if errors or not ready:
                self.kill()
                pytest.fail(errors[0] if errors else "the ranks hang")
            results |= {pipe: result for pipe, (_, result) in answers.items()}
        return [results[pipe] for pipe in self.pipes]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _rank(rank: int, size: int, store: Path, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    while True:
        job, arguments = pipe.recv()
        try:
            pipe.send((None, job(*arguments)))
        except BaseException:
            pipe.send((f"rank {rank}: {traceback.format_exc()}", None))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    ranks = World(RANKS, tmp_path_factory.mktemp("world"))
    yield ranks
    ranks.kill()


@pytest.fixture(scope="module")
def saved(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`<optimizer>/<layout>/checkpoints/` of every layout, None for a single process."""
    folder = tmp_path_factory.mktemp("saved")
    save_layout(folder, None)
    for layout in LAYOUTS:
        sizes = world(save_layout, folder, layout)
        if layout.startswith("zero"):
            assert any(0 in held.values() for held in sizes), "no rank's block was empty"
    return folder


# ---------------------------------------------------------------- layouts


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_checkpoint_loads_under_the_layout(world: World, saved: Path, layout: str) -> None:
    assert min(world(load_all, saved, layout)) > 0


def test_every_checkpoint_loads_in_a_single_process(saved: Path) -> None:
    states = sum(len(states_of(name, kind)) for name in PARAMETERS for kind in OPTIMIZERS)
    assert load_all(saved, None) == states * (len(LAYOUTS) + 1)


def test_ranks_share_the_writing(saved: Path) -> None:
    (path,) = checkpoints(saved / "adamw" / "dp8" / "checkpoints")
    sizes = [f["bytes"] for n, f in read_state(path)["files"].items() if "shard" in n]
    assert len(sizes) == RANKS
    (alone,) = checkpoints(saved / "adamw" / "None" / "checkpoints")
    (file,) = alone.glob("*.safetensors")
    assert max(sizes) < file.stat().st_size / 4


def test_parts_that_do_not_make_a_tensor_are_never_written() -> None:
    half = ("w", (4,), (0,), (2,), 8)
    with pytest.raises(AssertionError, match=r"w \[4\]"):
        shares([[half], [half]])
    with pytest.raises(AssertionError, match=r"w \[4\]"):
        shares([[("w", (4,), (0,), (4,), 16)], [("w", (5,), (0,), (5,), 20)]])


# ---------------------------------------------------------------- formats


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_reads_what_we_write(saved: Path) -> None:
    (path,) = checkpoints(saved / "adafactor" / "zero2-ep2-tp2" / "checkpoints")
    for name, (shape, _) in PARAMETERS.items():
        tensors = {f"model.{name}": torch.empty(shape)}
        states = states_of(name, "adafactor")
        tensors |= {f"optimizer.state.{name}.{k}": torch.empty(s) for k, s in states.items()}
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)
        assert torch.equal(tensors[f"model.{name}"], value(name, shape))
        for key, shape in states.items():
            want = value(f"{name}.{key}", shape) if shape else torch.tensor(7.0)
            assert torch.equal(tensors[f"optimizer.state.{name}.{key}"], want)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_we_read_what_torch_wrote(saved: Path, tmp_path: Path) -> None:
    """Checkpoints of earlier releases were written so."""
    weights = build(None, mesh_of(None))
    optimizer = filled_optimizer(weights, "adamw")
    chunks = model_chunks(weights) + optimizer_chunks(weights, optimizer)
    tensors = {c.name: c.tensor.clone() for c in chunks}
    writer = HuggingFaceStorageWriter(str(tmp_path), save_distributed=True)
    dcp.save(tensors, storage_writer=writer, no_dist=True)
    files = {path.name: entry_of(path) for path in tmp_path.iterdir()}
    state = {"step": 7, "samples": 70, "fingerprint": "adamw"}
    content = {"format": module.FORMAT, "state": state, "files": files}
    (tmp_path / "state.json").write_text(json.dumps(content))
    for one in weights.values():
        one.local.data.zero_()
    fresh = optimizer_over(weights, "adamw")
    CheckpointManager(tmp_path / "run", keep=1, mesh=mesh_of(None)).restore(
        tmp_path, weights, fresh
    )
    for name, tensor in tensors.items():
        loaded = {
            c.name: c.tensor for c in model_chunks(weights) + optimizer_chunks(weights, fresh)
        }
        assert torch.equal(loaded[name], tensor), name


def test_a_plain_model_takes_the_tensors_of_a_sliced_one(saved: Path) -> None:
    (path,) = checkpoints(saved / "adamw" / "hsdp-ep2" / "checkpoints")
    model = Model(list(PARAMETERS), mesh_of(None))
    for parameter in model.parameters():
        parameter.data.zero_()
    load_model_tensors(path, model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, value(name, PARAMETERS[name][0])), name


# ---------------------------------------------------------------- optimizers


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_goes_on_bit_for_bit(tmp_path: Path, kind: str) -> None:
    def step(weights: dict[str, Weight], optimizer: torch.optim.Optimizer, number: int) -> None:
        for one in weights.values():
            one.local.grad = value(one.name, one.block.shape, seed=number)
        optimizer.step()

    straight = build(None, mesh_of(None))
    optimizer = optimizer_over(straight, kind)
    manager = CheckpointManager(tmp_path, keep=1, mesh=mesh_of(None), background=True)
    step(straight, optimizer, 1)
    path = manager.save(CONFIG, TrainState(1, 1, ""), straight, optimizer)
    step(straight, optimizer, 2)
    manager.wait()
    resumed = build(None, mesh_of(None))
    again = optimizer_over(resumed, kind)
    manager.restore(path, resumed, again)
    step(resumed, again, 2)
    for name, one in resumed.items():
        assert torch.equal(one.local, straight[name].local), name
        for key, state in again.state[one.local].items():
            original = optimizer.state[straight[name].local][key]
            assert torch.equal(state, original), (name, key)
            assert (state.dtype, state.device) == (original.dtype, original.device)


def test_before_the_first_step_there_is_no_optimizer_state(tmp_path: Path) -> None:
    weights = build(None, mesh_of(None))
    manager = CheckpointManager(tmp_path, keep=1, mesh=mesh_of(None))
    optimizer = optimizer_over(weights, "adamw")
    path = manager.save(CONFIG, TrainState(0, 0, ""), weights, optimizer)
    assert manager.restore(path, weights, optimizer).step == 0
    assert not optimizer.state


def test_the_state_of_another_optimizer_is_refused(saved: Path) -> None:
    weights = build(None, mesh_of(None))
    manager = CheckpointManager(saved / "adamw" / "dp8", keep=1, mesh=mesh_of(None))
    (path,) = checkpoints(manager.folder)
    with pytest.raises(UserError, match=r"keeps exp_avg, .* Adafactor needs moment, step or"):
        manager.restore(path, weights, optimizer_over(weights, "adafactor"))


def test_a_checkpoint_of_another_model_is_refused(saved: Path) -> None:
    (path,) = checkpoints(saved / "adamw" / "dp8" / "checkpoints")
    model = nn.Module()
    model.register_parameter("other", nn.Parameter(torch.zeros(3)))
    with pytest.raises(UserError, match=r"model.other must have shape \[3\] and is not there"):
        load_model_tensors(path, model)


# ---------------------------------------------------------------- in the background


def save_and_train_on(folder: Path, layout: str | None) -> int:
    """Save in the background and overwrite everything before a byte is written, three times.

    Returns:
        bytes that were staged on this rank.
    """
    mesh = mesh_of(layout)
    weights = build(layout, mesh)
    optimizer = filled_optimizer(weights, "adamw")
    original = {name: one.local.detach().clone() for name, one in weights.items()}
    manager = CheckpointManager(folder, keep=3, mesh=mesh, background=True)
    write, addresses = module.write_chunks, []
    trained = {f"step_{step:08d}.unfinished": threading.Event() for step in (1, 2, 3)}

    def late(path: Path, chunks: Any) -> dict[str, Any]:
        assert trained[path.parent.name].wait(60)
        return write(path, chunks)

    module.write_chunks = late
    try:
        for step, event in enumerate(trained.values(), start=1):
            for name, one in weights.items():
                one.local.data.copy_(original[name] * step)
            manager.save(CONFIG, TrainState(step, step, ""), weights, optimizer)
            for one in weights.values():
                one.local.data.fill_(torch.nan)
            if mesh.group is not None:
                dist.all_reduce(torch.ones(4))  # training's messages do not mix with the save's
            event.set()
            addresses.append({n: b.data_ptr() for n, b in manager._staging._buffers.items()})
        manager.wait()
    finally:
        module.write_chunks = write
    assert addresses[0] == addresses[1] == addresses[2], "staging buffers are not reused"
    return sum(b.nbytes for b in manager._staging._buffers.values())


@pytest.mark.parametrize("layout", [None, "dp8", "hsdp-tp2"])
def test_a_background_save_keeps_the_values_of_its_moment(
    world: World, tmp_path: Path, layout: str | None
) -> None:
    run = (tmp_path, layout)
    staged = world(save_and_train_on, *run) if layout else [save_and_train_on(*run)]
    whole = sum(
        4 * math.prod(shape)
        for name, (shape, _) in PARAMETERS.items()
        for shape in (shape, *states_of(name, "adamw").values())
    )
    assert sum(staged) == whole  # the ranks together hold one copy
    found = checkpoints(tmp_path / "checkpoints")
    assert len(found) == 3
    for step, path in enumerate(found, start=1):
        verify(path)
        weights = build(None, mesh_of(None))
        load_model_tensors(path, weights)
        for name, one in weights.items():
            assert torch.equal(one.local, value(name, PARAMETERS[name][0]) * step), name


def fail_to_write(folder: Path, failing: int) -> str:
    """Save, save with a full disk on one rank, save; returns the message of the second."""
    mesh = mesh_of("zero8")
    weights = build("zero8", mesh)
    optimizer = filled_optimizer(weights, "adamw")
    manager = CheckpointManager(folder, keep=2, mesh=mesh, background=True)
    write, message = module.write_chunks, ""

    def full(path: Path, chunks: Any) -> dict[str, Any]:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    manager.save(CONFIG, TrainState(1, 1, ""), weights, optimizer)
    manager.wait()
    module.write_chunks = full if mesh.rank == failing else write
    try:
        manager.save(CONFIG, TrainState(2, 2, ""), weights, optimizer)
        manager.wait()
    except UserError as error:
        message = str(error)
    finally:
        module.write_chunks = write
    manager.wait()  # says it once
    manager.save(CONFIG, TrainState(3, 3, ""), weights, optimizer)
    manager.wait()
    return message


@pytest.mark.parametrize("failing", [0, 5])
def test_all_ranks_learn_of_a_failed_background_save(
    world: World, tmp_path: Path, failing: int
) -> None:
    for message in world(fail_to_write, tmp_path, failing):
        assert "step_00000002 could not be written" in message
        assert "No space left" in message
    assert [p.name for p in checkpoints(tmp_path / "checkpoints")] == [
        "step_00000001",
        "step_00000003",
    ]
    assert not list((tmp_path / "checkpoints").glob("*.unfinished"))


def die_while_writing(folder: Path, moment: str, victims: tuple[int, ...]) -> None:
    """Save, and lose power while the next save is under way."""
    mesh = Mesh.over_ranks(CPU, ParallelConfig())
    weights = build(None, mesh)
    optimizer = filled_optimizer(weights, "adamw")
    manager = CheckpointManager(folder, keep=1, mesh=mesh, background=True)
    manager.save(CONFIG, TrainState(1, 1, ""), weights, optimizer)
    manager.wait()

    def die(*arguments: Any) -> None:
        if moment == "half a file":
            arguments[0].write_bytes(b"half")
        if moment == "half a state":
            arguments[0].write_text("{")
        os.kill(os.getpid(), signal.SIGKILL)

    match moment if mesh.rank in victims else "never":
        case "half a file":
            module.write_chunks = die
        case "half a state":
            module.write_durably = die
        case "before the rename":
            module.Path.rename = die
        case "after the rename":
            module.keep_only = die
    manager.save(CONFIG, TrainState(2, 2, ""), weights, optimizer)
    manager.wait()


@pytest.mark.parametrize(
    ("moment", "left"),
    [
        ("half a file", [1]),
        ("half a state", [1]),
        ("before the rename", [1]),
        ("after the rename", [1, 2]),
    ],
)
def test_a_kill_in_the_background_leaves_whole_checkpoints(
    tmp_path: Path, moment: str, left: list[int]
) -> None:
    ranks = World(2, tmp_path)
    ranks.tell(die_while_writing, tmp_path, moment, (0, 1))
    ranks.processes[0].join()
    ranks.kill()
    found = checkpoints(tmp_path / "checkpoints")
    assert [int(p.name.removeprefix("step_")) for p in found] == left
    for path in found:
        verify(path)
        load_model_tensors(path, build(None, mesh_of(None)))
    weights = build(None, mesh_of(None))
    manager = CheckpointManager(tmp_path, keep=5, mesh=mesh_of(None))
    manager.save(CONFIG, TrainState(3, 3, ""), weights, filled_optimizer(weights, "adamw"))
    assert not list(manager.folder.glob("*.unfinished"))


def test_a_rank_that_dies_while_writing_ends_the_save_of_the_others(tmp_path: Path) -> None:
    ranks = World(2, tmp_path)
    ranks.tell(die_while_writing, tmp_path, "half a file", (1,))
    error, _ = ranks.pipes[0].recv()
    ranks.kill()
    assert "under_way.result()" in error
    assert "Connection" in error
    assert [p.name for p in checkpoints(tmp_path / "checkpoints")] == ["step_00000001"]


def test_buffers_follow_the_tensors() -> None:
    weights = build(None, mesh_of(None))
    staging = Staging()
    chunks = model_chunks(weights)
    first = staging.copy(chunks).chunks
    fewer = staging.copy([dataclasses.replace(chunks[0], tensor=chunks[0].tensor[:3])]).chunks
    assert torch.equal(fewer[0].tensor, chunks[0].tensor[:3])
    assert len(first) == len(chunks)
    assert staging._buffers.keys() == {chunks[0].name}
