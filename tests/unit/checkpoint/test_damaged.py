"""Checkpoints that lie: each lie is told in words, costs no memory, and leaves nothing behind."""

import json
import os
import resource
import shutil

import pytest

import megaswitch
from megaswitch.checkpoint.integrity import entry_of
from megaswitch.checkpoint.manager import find_checkpoint
from tests.unit.cli.commands import refusal, run

NAME = "model.encoder.layers.1.ffn.experts.wi.weight"
HUGE = 1 << 40


@pytest.fixture(scope="module")
def whole(text_run, tmp_path_factory):
    """A good checkpoint of four files."""
    path = tmp_path_factory.mktemp("whole") / "step_00000003"
    layout = ["--parallel.ep=2", "--parallel.tp=2"]
    run("reshard", find_checkpoint(text_run / "run"), path, *layout)
    return path


@pytest.fixture
def checkpoint(whole, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(whole, tmp_path / "source")


def shards(checkpoint):
    return sorted(checkpoint.glob("*.safetensors"))


def update_sums(checkpoint):
    """Make the lie complete: sizes and checksums are those of the files."""
    state = json.loads((checkpoint / "state.json").read_text())
    for path in checkpoint.iterdir():
        if path.name != "state.json":
            state["files"][path.name] = entry_of(path)
    (checkpoint / "state.json").write_text(json.dumps(state))


def edit_header(change, file=0):
    """A damage that changes the JSON at the beginning of a shard."""

    def damage(checkpoint):
        path = shards(checkpoint)[file]
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        text = change(header)
        text = (text if isinstance(text, str) else json.dumps(header)).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        update_sums(checkpoint)

    return damage


def edit_offsets(change, file=0):
    """A damage that changes where the parts of a shard belong."""

    def damage(header):
        info = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
        text = change(info)
        header["__metadata__"]["DCP_SHARDING_INFO"] = (
            text if isinstance(text, str) else json.dumps(info)
        )

    return edit_header(damage, file)


def edit_state(change):
    def damage(checkpoint):
        state = json.loads((checkpoint / "state.json").read_text())
        text = change(state)
        (checkpoint / "state.json").write_text(text or json.dumps(state))

    return damage


def set_entry(key, value):
    return edit_header(lambda header: header[NAME].__setitem__(key, value))


def set_offsets(*offsets, file=0):
    return edit_offsets(lambda info: info[NAME].__setitem__("saved_offsets", offsets), file)


def alter_a_byte(checkpoint):
    path = shards(checkpoint)[1]
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def cut(checkpoint):
    path = shards(checkpoint)[2]
    path.write_bytes(path.read_bytes()[:-64])


def cut_and_updated(checkpoint):
    cut(checkpoint)
    update_sums(checkpoint)


def link(checkpoint):
    path = shards(checkpoint)[0]
    path.rename(checkpoint.parent / "elsewhere")
    path.symlink_to(checkpoint.parent / "elsewhere")


def again(checkpoint):
    shutil.copyfile(shards(checkpoint)[0], checkpoint / "zzz.safetensors")
    update_sums(checkpoint)


def unlisted(checkpoint):
    shutil.copyfile(shards(checkpoint)[0], checkpoint / "zzz.safetensors")


def long_header(checkpoint):
    path = shards(checkpoint)[0]
    path.write_bytes((1 << 60).to_bytes(8, "little") + path.read_bytes()[8:])
    update_sums(checkpoint)


def listed_twice(state):
    text = json.dumps(state)
    name = next(n for n in state["files"] if n.startswith("shard"))
    entry = json.dumps({name: state["files"][name]})[1:-1]
    return text.replace('"files": {', f'"files": {{{entry}, ')


def elsewhere(name):
    def change(state):
        entry = next(iter(state["files"].values()))
        state["files"][name] = entry

    return edit_state(change)


DAMAGES = {
    "a shape that its bytes do not have": (set_entry("shape", [2, 64, 33]), "damaged"),
    "a huge shape": (set_entry("shape", [HUGE, HUGE, HUGE]), "damaged"),
    "offsets beyond the file": (set_entry("data_offsets", [0, HUGE]), "damaged"),
    "a negative size": (set_entry("shape", [-2, 32, 32]), "damaged"),
    "a size that is no number": (set_entry("shape", [float("nan"), 32, 32]), "damaged"),
    "another type of the same size": (set_entry("dtype", "I32"), "one whole tensor"),
    "an unknown type": (set_entry("dtype", "F31"), "damaged"),
    "a deep header": (edit_header(lambda _: "[" * 100_000), "damaged"),
    "a header as long as the sea": (long_header, "damaged"),
    "no header": (lambda c: (shards(c)[0].write_bytes(b""), update_sums(c)), "damaged"),
    "deep offsets": (edit_offsets(lambda _: "[" * 100_000), "does not say where"),
    "offsets of a text": (edit_offsets(lambda _: '"x"'), "does not say where"),
    "a part twice": (set_offsets(2, 0, 0, file=0), "one whole tensor"),
    "parts that overlap": (set_offsets(1, 0, 0, file=2), "one whole tensor"),
    "a hole": (set_offsets(3, 0, 0, file=2), "one whole tensor"),
    "a part far away": (set_offsets(HUGE, HUGE, HUGE, file=3), "one whole tensor"),
    "a negative offset": (set_offsets(-1, 0, 0), "does not say where"),
    "too few offsets": (set_offsets(0, 0), "one whole tensor"),
    "a file again": (again, "one whole tensor"),
    "a file that is not listed": (unlisted, "is not part of it"),
    "a cut file": (cut, "bytes"),
    "a cut file of that size": (cut_and_updated, "damaged"),
    "another byte": (alter_a_byte, "does not match its checksum"),
    "a symbolic link": (link, "is a symbolic link"),
    "a size of NaN": (
        edit_state(lambda s: s["files"]["config.toml"].__setitem__("bytes", float("nan"))),
        "no readable state.json",
    ),
    "a file listed twice": (edit_state(listed_twice), "listed twice"),
    "a file above": (elsewhere("../config.toml"), "elsewhere"),
    "a file at the root": (elsewhere("/etc/passwd"), "elsewhere"),
    "a file below": (elsewhere("a/b.safetensors"), "elsewhere"),
}
# Told by the checksum alone, which only some commands read.
SUMS_ONLY = {"another byte"}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_lie_is_refused_in_words_and_leaves_nothing(checkpoint, whole, tmp_path, what):
    damage, message = DAMAGES[what]
    damage(checkpoint)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert message in refusal("reshard", checkpoint, tmp_path / "out", "--parallel.tp=2")
    assert message in refusal("inspect", checkpoint, "--verify")
    if what not in SUMS_ONLY:
        assert message in refusal("inspect", whole, "--diff", checkpoint)
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        megaswitch.load_model(checkpoint)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200 << 10  # KiB
    assert sorted(os.listdir(tmp_path)) in (["source"], ["elsewhere", "source"])


def test_parts_that_overlap_as_much_as_they_leave_out_are_refused(tmp_path):
    """Their sizes add up, and no two begin at the same place."""
    import torch

    from megaswitch.checkpoint.chunks import Chunk, write_chunks
    from megaswitch.checkpoint.tensor_files import read_headers
    from megaswitch.log import UserError

    places = [(0, 4), (3, 5), (6, 8), (5, 6)]
    paths = [tmp_path / f"{i}.safetensors" for i in range(4)]
    for path, (start, end) in zip(paths, places, strict=True):
        write_chunks(path, [Chunk("x", (8, 2), (start, 0), torch.zeros(end - start, 2))])
    with pytest.raises(UserError, match="one whole tensor"):
        read_headers(paths)
    for path, (start, end) in zip(paths[:3], [(0, 4), (3, 5), (6, 8)], strict=True):
        write_chunks(path, [Chunk("x", (8, 2), (start, 0), torch.zeros(end - start, 2))])
    with pytest.raises(UserError, match="one whole tensor"):  # 4 + 2 + 2 = 8
        read_headers(paths[:3])


def test_tensors_of_another_model_are_refused(checkpoint, tmp_path):
    text = (checkpoint / "config.toml").read_text()
    (checkpoint / "config.toml").write_text(text.replace("d_ff = 64", "d_ff = 128"))
    update_sums(checkpoint)
    message = refusal("reshard", checkpoint, tmp_path / "out")
    assert "does not fit its own config.toml" in message


def test_a_file_that_changes_while_it_is_read_is_noticed(checkpoint, tmp_path, monkeypatch):
    from megaswitch.checkpoint import reshard as module

    fill = module.Reader.fill

    def other(self, out, tensor, offsets):
        fill(self, out, tensor, offsets)
        if tensor.name == NAME:
            out.flat[0] ^= 1

    monkeypatch.setattr(module.Reader, "fill", other)
    assert "not the same" in refusal("reshard", checkpoint, tmp_path / "out", "--parallel.tp=2")
    assert os.listdir(tmp_path) == ["source"]
