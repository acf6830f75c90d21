"""`megaswitch inspect --diff` and what `inspect` says of layouts."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megaswitch.checkpoint.integrity import entry_of
from megaswitch.checkpoint.manager import find_checkpoint
from tests.unit.cli.commands import printed, refusal, report, run

NAME = "model.encoder.layers.1.ffn.experts.wi.weight"


@pytest.fixture(scope="module")
def checkpoint(text_run):
    return find_checkpoint(text_run / "run")


@pytest.fixture
def other(checkpoint, tmp_path):
    """A copy to change."""
    return shutil.copytree(checkpoint, tmp_path / "other")


def change(path, edit):
    """Change the tensors, with correct checksums."""
    (file,) = path.glob("*.safetensors")
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    state = json.loads((path / "state.json").read_text())
    state["files"][file.name] = entry_of(file)
    (path / "state.json").write_text(json.dumps(state))


def test_checkpoints_of_two_layouts_are_equal(checkpoint, tmp_path, capsys):
    wide = tmp_path / "wide"
    run("reshard", checkpoint, wide, "--parallel.ep=2", "--parallel.tp=2")
    capsys.readouterr()
    found = report(capsys, "inspect", wide, "--diff", checkpoint)
    assert found["tensors"] == []
    assert found["counts"].keys() == {"equal"}
    assert found["equal_elements"] == found["elements"] > 0
    keys = {entry["key"] for entry in found["config"]}
    assert keys == {"parallel.ep", "parallel.tp"}
    assert "no other" in printed(capsys, "inspect", wide, "--diff", checkpoint)
    seen = report(capsys, "inspect", wide)
    parts = {p["name"]: p["parts"] for p in seen["parameters"]}
    assert parts[NAME.removeprefix("model.")] == [2, 2, 1]
    assert seen["layout"] == {"ep": 2, "tp": 2}
    assert "2×2×1" in printed(capsys, "inspect", wide)


def test_differences_are_exact(checkpoint, other, capsys):
    stored = {}

    def edit(tensors):
        stored.update({name: tensor.clone() for name, tensor in tensors.items()})
        tensors[NAME][2, 3, 4] += 0.5
        tensors[NAME][0, 0, 0] *= 1.25
        tensors["model.embedding.weight"][5, 6] = torch.nan
        tensors["model.encoder.final_norm.weight"] = stored[
            "model.encoder.final_norm.weight"
        ].half()
        tensors["model.decoder.final_norm.weight"] = torch.ones(5)
        del tensors["model.encoder.relative_bias.weight"]
        tensors["model.more"] = torch.ones(3)

    change(other, edit)
    found = report(capsys, "inspect", checkpoint, "--diff", other)
    by_name = {t["name"]: t for t in found["tensors"]}
    kinds = {name.removeprefix("model."): t["kind"] for name, t in by_name.items()}
    assert kinds == {
        NAME.removeprefix("model."): "values",
        "embedding.weight": "values",
        "encoder.final_norm.weight": "dtype",
        "decoder.final_norm.weight": "shape",
        "encoder.relative_bias.weight": "missing",
        "more": "extra",
    }
    values, before = by_name[NAME], stored[NAME].double()
    after = before.float()
    after[2, 3, 4] += 0.5
    after[0, 0, 0] *= 1.25
    difference = (after.double() - before).abs()
    assert values["count"] - values["equal"] == 2
    assert values["max_abs"] == difference.max().item()
    larger = torch.maximum(after.double().abs(), before.abs())
    assert values["max_relative"] == (difference / larger).max().item()
    assert by_name["model.embedding.weight"]["not_finite"] == 1
    text = printed(capsys, "inspect", checkpoint, "--diff", other)
    assert "F32 and F16" in text
    assert "missing in the other" in text


def test_configuration_and_progress_are_compared(checkpoint, other, capsys):
    state = json.loads((other / "state.json").read_text())
    state["state"]["step"] = 7
    text = (other / "config.toml").read_text().replace("seed = 5", "seed = 6")
    (other / "config.toml").write_text(text)
    state["files"]["config.toml"] = entry_of(other / "config.toml")
    (other / "state.json").write_text(json.dumps(state))
    found = report(capsys, "inspect", checkpoint, "--diff", other)
    assert found["state"] == {"step": [3, 7]}
    assert [entry["key"] for entry in found["config"]] == ["train.seed"]
    assert "train.seed was 5 and is 6" in printed(capsys, "inspect", checkpoint, "--diff", other)


def test_a_run_folder_stands_for_its_newest_checkpoint(checkpoint, text_run, capsys):
    assert report(capsys, "inspect", checkpoint, "--diff", text_run / "run")["tensors"] == []


def test_what_cannot_be_compared_is_said(checkpoint, text_run, tmp_path):
    assert "neither a checkpoint" in refusal("inspect", checkpoint, "--diff", tmp_path)
    assert "is for a checkpoint" in refusal("inspect", text_run / "run", "--diff", checkpoint)
    both = refusal("inspect", checkpoint, "--diff", checkpoint, "--verify")
    assert "reads two checkpoints" in both
