"""Resharding: what each file holds, that nothing is lost, and what happens when it is cut short."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from megaswitch.checkpoint import reshard as module
from megaswitch.checkpoint.fingerprint import fingerprint
from megaswitch.checkpoint.manager import (
    find_checkpoint,
    read_config,
    read_state,
    tensor_files,
    verify,
)
from megaswitch.checkpoint.reshard import UNFINISHED
from megaswitch.checkpoint.tensor_files import read_headers
from megaswitch.config import load_config
from megaswitch.log import UserError
from megaswitch.parallel.mesh import Mesh
from megaswitch.train.trainer import Trainer
from tests.unit.cli.commands import refusal, run

# Ranks and keys of `parallel`: every axis, ties, uneven vocabulary, ZeRO over tp and experts.
LAYOUTS = [
    (1, {}),
    (2, {"tp": 2}),
    (4, {"ep": 4}),
    (8, {"pp": 2, "ep": 2, "tp": 2}),
    (8, {"zero": "full", "tp": 2}),
    (8, {"zero": "optimizer", "ep": 2, "replicas": 2}),
    (4, {"pp": 4}),
    (8, {"pp": 2, "schedule": "interleaved", "stages_per_rank": 2, "zero": "full"}),
    (8, {"tp": 4, "ep": 2, "zero": "full"}),
    (6, {"zero": "full"}),  # uneven, some ranks with nothing
]
SMALL = [*("--data.encoder_length=64", "--train.batch_size=8", "--train.micro_batch_size=2")]


def keys(layout: dict) -> list[str]:
    return [f"--parallel.{key}={value}" for key, value in layout.items()]


@pytest.fixture(scope="module", params=["adafactor", "adamw"])
def checkpoint(request, corpus, tmp_path_factory) -> Path:
    """A checkpoint after two steps of one process."""
    folder = tmp_path_factory.mktemp(request.param)
    options = [
        *("--model.vocab_size=195", "--model.d_model=32", "--model.d_kv=8", "--model.d_ff=64"),
        *("--model.num_heads=4", "--model.num_encoder_layers=4", "--model.num_decoder_layers=4"),
        *("--model.moe.num_experts=8", "--model.moe.group_size=128", f"--data.train={corpus}"),
        *(f"--optim.name={request.param}", "--optim.learning_rate=0.01", "--train.steps=2"),
        *(*SMALL, f"--train.run_dir={folder / 'run'}"),
    ]
    if request.param == "adafactor":
        options.append("--optim.factored_min_dim=32")
    trainer = Trainer.build(load_config(None, options), Mesh(0, 1, torch.device("cpu"), None))
    trainer.fit()
    return find_checkpoint(folder / "run")


def reshard(source: Path, target: Path, layout=(1, {}), *options) -> Path:
    ranks, chosen = layout
    run("reshard", source, target, f"--ranks={ranks}", *options, *keys(chosen))
    return target


def content(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor, put together by torch alone."""
    tensors = {}
    for name, stored in read_headers(tensor_files(path)).items():
        whole = None
        for part in stored.parts:
            with safe_open(str(part.file), framework="pt") as file:
                piece = file.get_tensor(name)
            if whole is None:
                whole = torch.empty(stored.shape, dtype=piece.dtype)
            index = tuple(slice(o, o + n) for o, n in zip(part.offsets, part.shape, strict=True))
            whole[index] = piece
        tensors[name] = whole
    return tensors


def assert_same(one: Path, other: Path) -> None:
    a, b = content(one), content(other)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype, name
        assert torch.equal(tensor, b[name]), name
    assert read_state(one)["state"] == read_state(other)["state"]


def check_pair(checkpoint: Path, tmp_path: Path, first, second) -> None:
    """From one process to a layout and on to another: equal, whole, verified."""
    middle = reshard(checkpoint, tmp_path / "middle", first)
    end = reshard(middle, tmp_path / "end", second)
    for path in (middle, end):
        verify(path)
        assert not list(path.parent.glob(f"*{UNFINISHED}"))
    assert_same(checkpoint, end)
    assert read_state(middle)["tensors"] == read_state(end)["tensors"]


@pytest.mark.parametrize(("first", "second"), [(3, 4), (5, 8), (7, 2)])
def test_tensors_are_equal_after_two_changes_of_layout(checkpoint, tmp_path, first, second):
    check_pair(checkpoint, tmp_path, LAYOUTS[first], LAYOUTS[second])


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10))
def test_tensors_are_equal_between_any_layouts(checkpoint, tmp_path, seed):
    check_pair(checkpoint, tmp_path, *random.Random(seed).sample(LAYOUTS, 2))


def test_files_are_about_as_large(checkpoint, tmp_path):
    path = reshard(checkpoint, tmp_path / "out", (8, {"ep": 4}))
    sizes = [f["bytes"] for n, f in read_state(path)["files"].items() if n.startswith("shard")]
    assert len(sizes) == 8
    assert max(sizes) < 1.6 * min(sizes)


def test_the_layout_is_written_and_the_rest_of_the_configuration_kept(checkpoint, tmp_path):
    path = reshard(checkpoint, tmp_path / "out", (8, {"pp": 2, "tp": 2, "zero": "full"}))
    before, after = read_config(checkpoint), read_config(path)
    assert (after.parallel.pp, after.parallel.tp, after.parallel.zero) == (2, 2, "full")
    assert (after.model, after.optim, after.data) == (before.model, before.optim, before.data)


def test_optimizer_states_are_left_out_on_request(checkpoint, tmp_path):
    path = reshard(checkpoint, tmp_path / "out", (2, {"tp": 2}), "--no-optimizer")
    kept, stored = content(path), content(checkpoint)
    assert kept.keys() == {name for name in stored if name.startswith("model.")}
    assert all(torch.equal(tensor, stored[name]) for name, tensor in kept.items())


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_weights_are_cast_and_states_are_not(checkpoint, tmp_path, kind):
    path = reshard(checkpoint, tmp_path / "out", (4, {"ep": 2, "tp": 2}), "--dtype", kind)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[kind]
    kept = content(path)
    for name, tensor in content(checkpoint).items():
        want = tensor.to(dtype) if name.startswith("model.") else tensor
        assert kept[name].dtype == want.dtype, name
        assert torch.equal(kept[name], want), name
    verify(path)
    back = reshard(path, tmp_path / "back", (1, {}), "--dtype", "fp32")
    assert content(back)["model.embedding.weight"].dtype == torch.float32


def test_experts_are_kept_with_their_routes_and_states(checkpoint, tmp_path):
    source = reshard(checkpoint, tmp_path / "ep", (8, {"ep": 4, "tp": 2}))
    path = reshard(source, tmp_path / "out", (4, {"ep": 2, "tp": 2}), "--experts", "6,1-3")
    assert read_config(path).model.moe.num_experts == 4
    kept, stored, rows = content(path), content(checkpoint), [6, 1, 2, 3]
    experts = 0
    for name, tensor in stored.items():
        divided = ("experts" in name or "router" in name) and tensor.ndim and len(tensor) == 8
        experts += divided
        assert torch.equal(kept[name], tensor[rows] if divided else tensor), name
    assert experts > 16


def test_layers_are_kept_under_new_numbers(checkpoint, tmp_path):
    options = ["--encoder-layers", "2-3", "--decoder-layers", "0,3"]
    path = reshard(checkpoint, tmp_path / "out", (2, {"tp": 2}), *options)
    model = read_config(path).model
    assert (model.num_encoder_layers, model.num_decoder_layers) == (2, 2)
    kept, stored = content(path), content(checkpoint)
    for name, tensor in kept.items():
        for stack, old in (("encoder", {0: 2, 1: 3}), ("decoder", {0: 0, 1: 3})):
            for new, index in old.items():
                if f"{stack}.layers.{new}." in name:
                    source = name.replace(f"{stack}.layers.{new}.", f"{stack}.layers.{index}.")
                    assert torch.equal(tensor, stored[source]), name
    assert len(kept) < len(stored)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--encoder-layers", "1-2"], "same rhythm"),
        (["--experts", "0-8"], "has 8 experts"),
        (["--experts", "1,1"], "one twice"),
        (["--experts", "0-2", "--parallel.ep=2"], "must divide model.moe.num_experts=3"),
        (["--parallel.tp=3"], "must divide model.num_heads=4"),
        (["--model.d_model=4"], "is no key of a layout"),
        (["--max-memory", "1MiB"], "does not suffice"),
        (["--ranks", "3", "--parallel.tp=2"], "must divide the number of ranks"),
    ],
)
def test_what_cannot_be_done_is_said_first(checkpoint, tmp_path, arguments, message):
    text = refusal("reshard", checkpoint, tmp_path / "out", *arguments)
    assert message in text
    assert not list(tmp_path.glob("out*"))


def test_a_destination_that_exists_is_left_alone(checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    assert "exists" in refusal("reshard", checkpoint, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_full_disk_leaves_nothing_that_loads(checkpoint, tmp_path, monkeypatch):
    write = module.Writer.write

    def full(self, data):
        if self.bytes > 100_000:
            raise OSError(28, "No space left on device")
        write(self, data)

    monkeypatch.setattr(module.Writer, "write", full)
    text = refusal("reshard", checkpoint, tmp_path / "out", "--parallel.tp=2")
    assert "No space left on device" in text
    assert "source is intact" in text
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError):
        find_checkpoint(tmp_path / f"out{UNFINISHED}")
    verify(checkpoint)
    assert_same(checkpoint, reshard(checkpoint, tmp_path / "out", (2, {"tp": 2})))


def test_too_little_space_is_found_before_anything_is_written(checkpoint, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert "and 1,000 are free" in refusal("reshard", checkpoint, tmp_path / "out")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_after_a_kill_finished_files_are_kept(checkpoint, tmp_path, monkeypatch):
    finish, count = module.Writer.finish, 0

    class Kill(BaseException):
        """Nobody may catch it and tidy up."""

    def killed(self):
        nonlocal count
        count += 1
        if count > 3:
            raise Kill
        return finish(self)

    monkeypatch.setattr(module.Writer, "finish", killed)
    with pytest.raises(Kill):
        reshard(checkpoint, tmp_path / "out", (8, {"ep": 8}))
    monkeypatch.undo()
    aside = tmp_path / f"out{UNFINISHED}"
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError):
        find_checkpoint(aside)
    with (aside / "journal.jsonl").open("a") as file:
        file.write('{"written": "cut')
    done = [json.loads(line) for line in (aside / "journal.jsonl").read_bytes().splitlines()[:-1]]
    kept = {e["written"]: (aside / e["written"]).stat().st_ino for e in done if "written" in e}
    assert len(kept) == 3
    other = refusal("reshard", checkpoint, tmp_path / "out", "--parallel.tp=2")
    assert "another resharding" in other
    assert "never finished" in refusal("inspect", aside)
    path = reshard(checkpoint, tmp_path / "out", (8, {"ep": 8}))
    assert {name: (path / name).stat().st_ino for name in kept} == kept
    verify(path)
    assert_same(checkpoint, path)


def test_fingerprints_add_up_over_any_parts_and_see_what_moved():
    import numpy as np

    bits = np.random.default_rng(0).integers(0, 1 << 32, (5, 6, 8), dtype=np.uint32)
    whole = fingerprint(bits, (0, 0, 0), bits.shape)
    for dim in range(3):
        for cut in range(bits.shape[dim] + 1):
            first, second = np.split(bits, [cut], axis=dim)
            offsets = [cut if d == dim else 0 for d in range(3)]
            shares = fingerprint(first, (0, 0, 0), bits.shape)
            shares += fingerprint(second, offsets, bits.shape)
            assert shares % (1 << 64) == whole
        swapped = np.roll(bits, 1, axis=dim)
        assert fingerprint(swapped, (0, 0, 0), bits.shape) != whole
    changed = bits.copy()
    changed[4, 5, 7] ^= 1
    assert fingerprint(changed, (0, 0, 0), bits.shape) != whole


def test_magnitudes_of_delayed_scaling_are_left_out_with_a_word(corpus, tmp_path, capsys):
    options = [
        *("--model.preset=switch-tiny", "--model.vocab_size=195", f"--data.train={corpus}"),
        *("--model.moe.group_size=128", "--train.fp8.recipe=delayed", "--train.steps=1"),
        *(*SMALL, f"--train.run_dir={tmp_path / 'run'}"),
    ]
    alone = Mesh(0, 1, torch.device("cpu"), None)
    Trainer.build(load_config(None, options), alone).fit()
    source = find_checkpoint(tmp_path / "run")
    run("reshard", source, tmp_path / "run2/checkpoints/step_00000001")
    assert "left out: the magnitudes of FP8's delayed scaling" in capsys.readouterr().err
    assert any(name.startswith("fp8.") for name in content(source))
