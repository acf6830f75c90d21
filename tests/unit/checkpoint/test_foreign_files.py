"""Malicious and damaged files: each is refused with a reason, in little memory, leaving nothing."""

from __future__ import annotations

import collections
import gzip
import json
import os
import pickle
import re
import resource
import struct
import subprocess
import zipfile
from pathlib import Path

import msgpack
import pytest
import torch
from safetensors.torch import load_file, save_file

from megaswitch.checkpoint.conversion import Options
from megaswitch.checkpoint.huggingface_files import export_hf, import_hf
from megaswitch.checkpoint.t5x import import_t5x
from megaswitch.log import UserError
from megaswitch.storage import location
from tests.unit.checkpoint.t5x_reference import flax_tree, write_t5x
from tests.unit.model.hf_reference import switch, t5

SPARE = 300 << 20  # bytes that a refusal may take beyond what the process has


class Bomb:
    """Runs a command when unpickled."""

    def __reduce__(self):
        return os.system, ("touch bomb-went-off",)


class Hog:
    """Takes ten gigabytes when unpickled, by way of what torch's restricted reader allows."""

    def __reduce__(self):
        return bytearray, (10 << 30,)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """`hf` (safetensors in shards), `bin` and `t5x`: three sound sources."""
    folder = tmp_path_factory.mktemp("whole")
    hf = switch()
    hf.save_pretrained(folder / "hf", max_shard_size="40KB")
    dense = t5(gated=False)
    dense.save_pretrained(folder / "bin")
    (folder / "bin/model.safetensors").unlink()
    torch.save(dense.state_dict(), folder / "bin/pytorch_model.bin")
    tree = flax_tree(dense.state_dict(), dense.config)
    write_t5x(folder / "t5x", tree, compressor={"id": "gzip", "level": 1}, inline=("scale",))
    return folder


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_index(source: Path, change) -> None:
    path = source / "model.safetensors.index.json"
    places = json.loads(path.read_text())["weight_map"]
    change(places)
    edit_json(path, weight_map=places)


def shard(source: Path) -> Path:
    return min(source.glob("model-*.safetensors"))


def edit_header(source: Path, change) -> None:
    """Change the header of a shard, leaving its tensors."""
    path = shard(source)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    text = change(header) or json.dumps(header)
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + data[8 + length :])


def first(header: dict) -> str:
    return next(name for name in header if name != "__metadata__")


def edit_bin(source: Path, content) -> None:
    torch.save(content, source / "pytorch_model.bin")


def rewrite_zip(source: Path, change, compress=zipfile.ZIP_STORED) -> None:
    path = source / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        records = {i.filename: archive.read(i) for i in archive.infolist()}
    with zipfile.ZipFile(path, "w", compress) as archive:
        for name, data in records.items():
            archive.writestr(name, change(data) if name.endswith("data.pkl") else data)


def edit_msgpack(source: Path, change) -> None:
    content = msgpack.unpackb((source / "checkpoint").read_bytes())
    change(content["optimizer"]["target"])
    (source / "checkpoint").write_bytes(msgpack.packb(content))


def kernel(source: Path) -> Path:
    return source / "target.encoder.layers_0.mlp.wi.kernel"


def deep(levels: int = 200_000) -> str:
    return '{"a":' * levels + "1" + "}" * levels


def nan_shard(source: Path) -> None:
    path = shard(source)
    tensors = load_file(path)
    name = next(iter(tensors))
    tensors[name].view(-1)[-1] = float("nan")
    save_file(tensors, path)


def duplicate(header: dict) -> str:
    name = first(header)
    return json.dumps(header)[:-1] + f', "{name}": {json.dumps(header[name])}}}'


def overlap(header: dict) -> None:
    a, b = [name for name in header if name != "__metadata__"][:2]
    size = header[b]["data_offsets"][1] - header[b]["data_offsets"][0]
    start = header[a]["data_offsets"][0]
    header[b]["data_offsets"] = [start, start + size]


def link_out(source: Path) -> None:
    path = shard(source)
    outside = source.parent / "outside.safetensors"
    path.rename(outside)
    path.symlink_to(outside)


def huge(header: dict) -> None:
    entry = header[first(header)]
    entry["shape"] = [1 << 40, 1 << 20]  # of 4 bytes each
    entry["data_offsets"] = [0, 1 << 62]


def expanded(state: dict) -> dict:
    return state | {"shared.weight": torch.zeros(1).expand(1 << 20, 1 << 20)}


def absurd_ndarray(target: dict) -> None:
    packed = msgpack.packb(((1 << 40, 4), "float32", b"\0" * 16))
    target["encoder"]["encoder_norm"]["scale"] = msgpack.ExtType(1, packed)


def tensors_of(source: Path) -> dict:
    return torch.load(source / "pytorch_model.bin", weights_only=True)


# Source, what is done to it, and what is said of it.
CASES = {
    "pickle that runs a command": (
        "bin", lambda s: edit_bin(s, {"x": Bomb()}), "would call posix system"),
    "pickle that takes memory": (
        "bin", lambda s: edit_bin(s, {"x": Hog()}), "would call __builtin__ bytearray"),
    "pickle of newer names": (
        "bin", lambda s: rewrite_zip(s, lambda _: pickle.dumps(collections.Counter(), 4)),
        "would call STACK_GLOBAL"),
    "pickle without a zip": (
        "bin", lambda s: (s / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb())),
        "older than torch 1.6"),
    "pickle cut short": (
        "bin", lambda s: rewrite_zip(s, lambda data: data[: len(data) // 2]), "is no pickle"),
    "zip bomb": (
        "bin", lambda s: rewrite_zip(s, lambda d: d + b"\0" * 10**8, zipfile.ZIP_DEFLATED),
        "records are compressed"),
    "zip cut short": (
        "bin", lambda s: os.truncate(s / "pytorch_model.bin", 20_000), "cannot be read"),
    "one number as a tensor of a terabyte": (
        "bin", lambda s: edit_bin(s, expanded(tensors_of(s))), "shared.weight is no dense tensor"),
    "not a tensor": ("bin", lambda s: edit_bin(s, {"x": 3}), "'x' is no tensor"),
    "tensors of whole numbers": (
        "bin", lambda s: edit_bin(s, {"x": torch.zeros(3).long()}), "torch LongStorage"),
    "claims a huge tensor": (
        "hf", lambda s: edit_header(s, huge), "where 4611686018427387904 is free"),
    "claims a huge header": (
        "hf", lambda s: shard(s).write_bytes(struct.pack("<Q", 1 << 60) + b"{}"),
        "a header of 1152921504606846976 bytes"),
    "tensors overlap": ("hf", lambda s: edit_header(s, overlap), "where .* is free"),
    "negative shape": (
        "hf", lambda s: edit_header(s, lambda h: h[first(h)].update(shape=[-1, -5])),
        "wrong description"),
    "unknown type": (
        "hf", lambda s: edit_header(s, lambda h: h[first(h)].update(dtype="F3")), "type F3"),
    "shape of other size": (
        "hf", lambda s: edit_header(s, lambda h: h[first(h)].update(shape=[3])), r"shape \[3\] in"),
    "a tensor twice": ("hf", lambda s: edit_header(s, duplicate), "occurs twice"),
    "deep header": ("hf", lambda s: edit_header(s, lambda _: deep()), "holds no sound JSON"),
    "header of no text": (
        "hf", lambda s: shard(s).write_bytes(struct.pack("<Q", 8) + b"\xff" * 8), "no sound JSON"),
    "shard cut short": (
        "hf", lambda s: os.truncate(shard(s), shard(s).stat().st_size - 40), "bytes of tensors in"),
    "shard with a tail": (
        "hf", lambda s: shard(s).open("ab").write(b"x" * 9), "bytes of tensors in"),
    "empty shard": ("hf", lambda s: shard(s).write_bytes(b""), "it has 0 bytes"),
    "shard missing": ("hf", lambda s: shard(s).unlink(), "which is missing"),
    "shards exchanged": (
        "hf", lambda s: shard(s).write_bytes(max(s.glob("model-*.safetensors")).read_bytes()),
        "disagree on"),
    "NaN in a tensor": ("hf", nan_shard, "holds NaN or infinity"),
    "index leads out": (
        "hf", lambda s: edit_index(s, lambda p: p.update({next(iter(p)): "../../secret"})),
        "only plain names"),
    "index leads to the root": (
        "hf", lambda s: edit_index(s, lambda p: p.update({next(iter(p)): "/etc/passwd"})),
        "only plain names"),
    "index of another kind of file": (
        "hf", lambda s: edit_index(s, lambda p: p.update({next(iter(p)): "config.json"})),
        "only .safetensors"),
    "index without a table": (
        "hf", lambda s: edit_json(s / "model.safetensors.index.json", weight_map=[1]),
        "no table weight_map"),
    "deep index": (
        "hf", lambda s: (s / "model.safetensors.index.json").write_text(deep()), "no sound JSON"),
    "link out of the folder": ("hf", link_out, "outside the folder, and is not followed"),
    "link to itself": (
        "hf", lambda s: (shard(s).unlink(), os.symlink(n := min(json.loads(
            (s / "model.safetensors.index.json").read_text())["weight_map"].values()), s / n)),
        "missing|leads nowhere"),
    "configuration gone": ("hf", lambda s: (s / "config.json").unlink(), "config.json cannot be"),
    "configuration of absurd size": (
        "hf", lambda s: (s / "config.json").write_text(" " * (2 << 20)), "has more than"),
    "configuration that is a list": (
        "hf", lambda s: (s / "config.json").write_text("[]"), "must hold a table"),
    "configuration with NaN": (
        "hf", lambda s: edit_json(s / "config.json", layer_norm_epsilon=float("nan")), "NaN is no"),
    "configuration with infinity": (
        "hf", lambda s: (s / "config.json").write_text('{"layer_norm_epsilon": 1e999}'),
        "too large"),
    "configuration of a billion layers": (
        "hf", lambda s: edit_json(s / "config.json", num_layers=10**9), "num_layers=1000000000"),
    "configuration of a billion experts": (
        "hf", lambda s: edit_json(s / "config.json", num_experts=10**9), "num_experts=1000000000"),
    "configuration of a huge vocabulary": (
        "hf", lambda s: edit_json(s / "config.json", vocab_size=10**12),
        r"makes it \[1000000000000, 20\]"),
    "msgpack of deep arrays": (
        "t5x", lambda s: (s / "checkpoint").write_bytes(b"\x91" * 100_000), "is no msgpack"),
    "msgpack claims a huge array": (
        "t5x", lambda s: (s / "checkpoint").write_bytes(b"\xdd\xff\xff\xff\xff"), "is no msgpack"),
    "msgpack cut short": (
        "t5x", lambda s: os.truncate(s / "checkpoint", 900), "is no msgpack"),
    "packed array of lying shape": (
        "t5x", lambda s: edit_msgpack(s, absurd_ndarray), "encoder_norm/scale is no array"),
    "array somewhere else": (
        "t5x", lambda s: edit_msgpack(s, lambda t: t["token_embedder"]["embedding"]["kvstore"]
                                      .update(path="x/..")), "only plain names"),
    "array of another driver": (
        "t5x", lambda s: edit_msgpack(s, lambda t: t["token_embedder"]["embedding"]
                                      .update(driver="json")), "stored by json"),
    "chunk that is a bomb": (
        "t5x", lambda s: (kernel(s) / "0.0").write_bytes(gzip.compress(b"\0" * (1 << 21))),
        "unpacks to more"),
    "chunk that is too short": (
        "t5x", lambda s: (kernel(s) / "0.0").write_bytes(gzip.compress(b"\0")), "unpacks to less"),
    "chunk of noise": (
        "t5x", lambda s: (kernel(s) / "0.0").write_bytes(b"noise" * 9), "is damaged"),
    "chunk missing": ("t5x", lambda s: (kernel(s) / "0.0").unlink(), "chunks where its shape"),
    "array of absurd shape": (
        "t5x", lambda s: edit_json(kernel(s) / ".zarray", shape=[1 << 40, 1 << 40]),
        "chunks where its shape"),
    "chunks of absurd shape": (
        "t5x", lambda s: edit_json(kernel(s) / ".zarray", chunks=[1 << 40, 1 << 40]),
        r"chunks \[1099511627776"),
    "array of objects": (
        "t5x", lambda s: edit_json(kernel(s) / ".zarray", dtype="|O"), r"values of type '\|O'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CASES)
def test_is_refused_and_leaves_nothing(kind, whole, tmp_path, monkeypatch):
    origin, damage, message = CASES[kind]
    source = tmp_path / "source"
    subprocess.run(["cp", "-r", whole / origin, source], check=True)
    damage(source)
    before = sorted(p.name for p in tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run = import_t5x if origin == "t5x" else import_hf
    with pytest.raises(UserError, match=re.compile(message, re.DOTALL)) as refusal:
        run(source, tmp_path / "new" / "ours", Options())
    assert len(str(refusal.value)) < 700
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) << 10 < SPARE
    left = sorted(p.name for p in tmp_path.iterdir() if p.name != "new")
    assert left == before
    assert not (tmp_path / "new").exists() or not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("origin", ["hf", "bin", "t5x"])
def test_the_sound_sources_are_accepted(origin, whole, tmp_path):
    run = import_t5x if origin == "t5x" else import_hf
    assert run(whole / origin, tmp_path / "ours", Options()).parameters


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("shard-00001-of-00001.safetensors", lambda p: os.truncate(p, 5000), "damaged.*has 5,000"),
        ("config.toml", lambda p: p.write_text(p.read_text() + "\n"), "has .* bytes"),
        ("state.json", lambda p: p.write_text(deep()), "no readable state.json"),
        ("state.json", lambda p: p.unlink(), "neither a checkpoint nor a run"),
    ],
)  # fmt: skip
def test_our_own_damaged_checkpoints_are_not_exported(file, damage, message, whole, tmp_path):
    import_hf(whole / "hf", tmp_path / "ours", Options())
    damage(tmp_path / "ours" / file)
    with pytest.raises(UserError, match=re.compile(message, re.DOTALL)):
        export_hf(tmp_path / "ours", tmp_path / "out", Options())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours"]


def test_pickles_in_memory_are_not_read_either(whole):
    cloud = location("memory://pickles")
    cloud.mkdir(parents=True, exist_ok=True)
    for file in (whole / "bin").iterdir():
        (cloud / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="only be read from a local folder"):
        import_hf(cloud, cloud / "ours", Options())
