"""`megaswitch inspect` of a checkpoint: what it says, and that it believes nothing in the files."""

import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from megaswitch.checkpoint import tensor_files
from megaswitch.checkpoint.integrity import entry_of
from megaswitch.checkpoint.manager import checkpoints, find_checkpoint, read_config
from megaswitch.checkpoint.tensor_files import StoredTensor, read_headers
from megaswitch.cli.parameter_tree import parameter_tree
from megaswitch.cli.tensor_stats import Stats, spread, tensor_stats
from megaswitch.log import UserError
from megaswitch.model.count import count
from tests.unit.cli.commands import printed, refusal, report


@pytest.fixture
def checkpoint(text_run, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(find_checkpoint(text_run / "run"), tmp_path / "step_00000003")


def shard(checkpoint):
    (path,) = checkpoint.glob("*.safetensors")
    return path


def rewrite(checkpoint, change):
    """Change the tensors of a checkpoint, and its sums so that only the content is wrong."""
    path = shard(checkpoint)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    update_sums(checkpoint)


def update_sums(checkpoint):
    state = json.loads((checkpoint / "state.json").read_text())
    for name in state["files"]:
        file = checkpoint / name
        state["files"][name] = entry_of(file)
    (checkpoint / "state.json").write_text(json.dumps(state))


def test_the_report_is_exact(text_run, capsys):
    path = find_checkpoint(text_run / "run")
    found = report(capsys, "inspect", path)
    config = read_config(path)
    sizes = count(config.model)
    assert (found["kind"], found["step"], found["samples"]) == ("checkpoint", 3, 12)
    assert found["model"]["total_parameters"] == sizes.total_parameters
    assert found["model"]["active_parameters"] == sizes.active_parameters
    assert sum(p["count"] for p in found["parameters"]) == sizes.total_parameters
    assert sum(p["bytes"] for p in found["parameters"]) == 4 * sizes.total_parameters
    assert {c["key"]: c["value"] for c in found["model"]["changes"]}["model.d_model"] == 32
    stored = load_file(shard(path))
    state = {k: t.nbytes for k, t in stored.items() if k.startswith("optimizer.")}
    assert found["optimizer"]["bytes"] == sum(state.values())
    assert found["files"][shard(path).name]["bytes"] == shard(path).stat().st_size
    assert found["tokenizer"]["vocab_size"] == 500
    assert not found["verified"]


def test_people_see_a_tree(text_run, capsys):
    text = printed(capsys, "inspect", find_checkpoint(text_run / "run"), "--verify")
    assert "embedding.weight" in text
    assert "self_attention" in text
    assert "all sums match" in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_layers_that_are_alike_share_a_line():
    shapes = {f"encoder.layers.{i}.q.weight": (4, 4) for i in range(12)}
    shapes |= {f"decoder.layers.{i}.q.weight": (4, 4 + i % 2) for i in range(6)}
    shapes |= {"decoder.norm": (4,)}
    lines = parameter_tree({n: StoredTensor(n, s, "F32") for n, s in shapes.items()})
    assert [(line.label, len(line.tensors)) for line in lines] == [
        ("├─ encoder.layers.{0..11}.q.weight", 12),
        ("└─ decoder", 7),
        ("   ├─ layers", 6),
        ("   │  ├─ {0..4..2}.q.weight", 3),
        ("   │  └─ {1..5..2}.q.weight", 3),
        ("   └─ norm", 1),
    ]


@pytest.mark.parametrize("other", [((4, 4), "BF16"), ((4, 5), "F32")])
def test_layers_that_differ_do_not(other):
    tensors = {
        "l.0.w": StoredTensor("l.0.w", (4, 4), "F32"),
        "l.1.w": StoredTensor("l.1.w", *other),
    }
    assert len([line for line in parameter_tree(tensors) if line.leaf]) == 2


def test_stats_are_those_of_the_tensors(text_run, capsys, monkeypatch):
    monkeypatch.setattr(tensor_files, "_PART_BYTES", 1000)  # several pieces a tensor
    path = find_checkpoint(text_run / "run")
    found = report(capsys, "inspect", path, "--stats")["stats"]
    stored = load_file(shard(path))
    for name, stats in found["parameters"].items():
        tensor = stored[f"model.{name}"].double()
        assert stats["min"] == tensor.min().item()
        assert stats["max"] == tensor.max().item()
        assert stats["mean"] == pytest.approx(tensor.mean().item(), abs=1e-9)
        assert stats["rms"] == pytest.approx(tensor.square().mean().sqrt().item())
        assert (stats["nan"], stats["inf"]) == (0, 0)
    experts = {(e["parameter"], e["what"]): e for e in found["experts"]}
    name = "encoder.layers.1.ffn.experts.wi.weight"
    rms = stored[f"model.{name}"].double().square().mean((1, 2)).sqrt()
    assert experts[name, "rms of weights"]["values"] == pytest.approx(rms.tolist())
    assert (name, "rms of gradients") in experts


def test_nan_and_dead_experts_stand_out(checkpoint, capsys):
    name = "encoder.layers.1.ffn.experts.wi.weight"

    def change(tensors):
        tensors[
            "model.head.weight" if "model.head.weight" in tensors else "model.embedding.weight"
        ][0, :2] = torch.tensor([float("nan"), float("inf")])
        tensors[f"model.{name}"][2] = 0
        for key, tensor in tensors.items():
            if key.startswith(f"optimizer.state.{name}.") and key.endswith(("row", "moment")):
                tensor[1] = 1e-30

    rewrite(checkpoint, change)
    found = report(capsys, "inspect", checkpoint, "--stats")["stats"]
    assert sum(s["nan"] for s in found["parameters"].values()) == 1
    assert sum(s["inf"] for s in found["parameters"].values()) == 1
    apart = {(e["parameter"], e["what"]): e["stand_out"] for e in found["experts"]}
    assert apart[name, "rms of weights"] == [2]
    assert apart[name, "rms of gradients"] == [1]
    text = printed(capsys, "inspect", checkpoint, "--stats")
    assert "NOT FINITE" in text


def test_experts_without_finite_values_stand_out():
    assert spread("w", "rms", [1.0, 1.1, float("nan"), 0.9])["stand_out"] == [2]
    assert spread("w", "rms", [1.0, 1.1, 5.0, 0.9])["stand_out"] == [2]
    assert spread("w", "rms", [0.0, 0.0, 0.0])["stand_out"] == []


def test_stats_of_nothing():
    stats = Stats()
    stats.add(torch.tensor([float("nan")]))
    assert stats.nan == 1
    assert stats.finite == 0
    assert stats.mean != stats.mean


def test_a_tensor_is_read_in_small_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "_PART_BYTES", 64)
    values = torch.arange(3 * 5 * 20, dtype=torch.float32).reshape(3, 5, 20)
    save_file({"w": values, "s": torch.tensor(7.0)}, tmp_path / "a.safetensors")
    tensors = read_headers([tmp_path / "a.safetensors"])
    pieces = list(tensors["w"].read())
    assert max(piece.nbytes for _, piece in pieces) <= 80  # a row of 20 is never cut
    stats = tensor_stats(tensors["w"], by_expert=True)
    assert [s.total for s in stats] == values.double().sum((1, 2)).tolist()
    assert [piece.item() for _, piece in tensors["s"].read()] == [7.0]


def sharded(folder, **parts):
    """Files of torch's kind: name → (tensor, offsets of its first element)."""
    files = []
    for name, (tensor, offsets) in parts.items():
        path = folder / f"{name}.safetensors"
        info = json.dumps({"w": {"saved_offsets": offsets}})
        save_file({"w": tensor}, path, metadata={"DCP_SHARDING_INFO": info})
        files.append(path)
    return files


def test_parts_of_several_files_make_one_tensor(tmp_path):
    first, second = torch.ones(2, 3), torch.full((1, 3), 5.0)
    files = sharded(tmp_path, a=(first, [0, 0]), b=(second, [2, 0]))
    tensor = read_headers(files)["w"]
    assert tensor.shape == (3, 3)
    assert [s.total for s in tensor_stats(tensor, by_expert=True)] == [3.0, 3.0, 15.0]


@pytest.mark.parametrize(
    "offsets", [[3, 0], [0, 0], [2], [2, 0, 0], [2**60, 0]], ids=lambda o: str(o)
)
def test_parts_that_make_no_whole_are_refused(tmp_path, offsets):
    files = sharded(tmp_path, a=(torch.ones(2, 3), [0, 0]), b=(torch.ones(2, 3), offsets))
    with pytest.raises(UserError, match="do not make one whole tensor"):
        read_headers(files)


@pytest.mark.parametrize("offsets", [[-1, 0], ["a", 0], None, [0.5, 0], [True, 0]])
def test_offsets_that_are_no_numbers_are_refused(tmp_path, offsets):
    with pytest.raises(UserError, match="does not say where"):
        read_headers(sharded(tmp_path, a=(torch.ones(2, 3), offsets)))


HEADERS = {
    "longer than the file": (2**40, b"{}"),
    "of all lengths the greatest": (2**64 - 1, b"{}"),
    "not JSON": (4, b"{{{{"),
    "empty file": (None, b""),
    "beyond the end": (
        None,
        b'{"w":{"dtype":"F32","shape":[1000000],"data_offsets":[0,4000000]}}',
    ),
    "overlapping": (
        None,
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    ),
    "huge shape": (
        None,
        b'{"w":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}',
    ),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_no_header_is_believed(checkpoint, kind):
    length, header = HEADERS[kind]
    content = struct.pack("<Q", len(header) if length is None else length) + header + b"\0" * 8
    shard(checkpoint).write_bytes(b"" if kind == "empty file" else content)
    update_sums(checkpoint)
    assert "damaged or no safetensors file" in refusal("inspect", checkpoint)


def test_a_file_cut_short_is_seen_without_reading_it(checkpoint):
    file = shard(checkpoint)
    file.write_bytes(file.read_bytes()[:-10])
    message = refusal("inspect", checkpoint)
    assert "is damaged" in message
    assert file.name in message


def test_a_missing_file_is_named(checkpoint):
    (checkpoint / "tokenizer.model").unlink()
    assert "tokenizer.model is missing" in refusal("inspect", checkpoint)


def test_verify_finds_a_flipped_bit(checkpoint, capsys):
    content = bytearray(shard(checkpoint).read_bytes())
    content[-5] ^= 1
    shard(checkpoint).write_bytes(content)
    report(capsys, "inspect", checkpoint)
    assert "does not match its checksum" in refusal("inspect", checkpoint, "--verify")


def test_tensors_of_another_model_are_refused(checkpoint):
    def change(tensors):
        tensors["model.stranger"] = tensors.pop("model.embedding.weight")

    rewrite(checkpoint, change)
    message = refusal("inspect", checkpoint)
    assert "model.embedding.weight is missing" in message
    assert "model.stranger is not of its model" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "no readable state.json"),
        ("[1, 2]", "no readable state.json"),
        ('{"format": 1, "files": {}}', "no readable state.json"),
        ('{"format": 7, "anything": "else"}', "has format 7, this version reads 1"),
    ],
)
def test_a_strange_state_is_explained(checkpoint, content, words):
    (checkpoint / "state.json").write_text(content)
    assert words in refusal("inspect", checkpoint)


def test_a_half_written_checkpoint_is_explained(checkpoint):
    unfinished = checkpoint.rename(checkpoint.with_name("step_00000004.unfinished"))
    assert "never finished" in refusal("inspect", unfinished)
    assert "holds neither state.json" in refusal("inspect", unfinished.parent)


def test_a_folder_of_checkpoints_means_the_newest(text_run, capsys):
    folder = text_run / "run" / "checkpoints"
    assert report(capsys, "inspect", folder)["path"] == str(checkpoints(folder)[-1])
