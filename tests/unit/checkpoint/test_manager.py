"""Checkpoints: what is in them, and what happens to bad ones."""

import hashlib
import json
import pickle

import pytest
import torch
from blake3 import blake3
from safetensors.torch import save_file

import megaswitch
from megaswitch.checkpoint import manager
from megaswitch.checkpoint.integrity import entry_of, file_sum
from megaswitch.checkpoint.manager import checkpoints, find_checkpoint, verify
from megaswitch.config import load_config
from megaswitch.log import UserError
from megaswitch.parallel.mesh import Mesh
from megaswitch.train.trainer import Trainer


@pytest.fixture
def trainer(run_options):
    config = load_config(None, [*run_options, "--train.steps=2"])
    return Trainer.build(config, Mesh.start("cpu"))


def test_only_tensors_and_text_are_stored(trainer):
    trainer.fit()
    path = find_checkpoint(trainer.checkpoints.folder)
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".toml", ".json"}
    state = json.loads((path / "state.json").read_text())
    assert state["state"]["step"] == 2
    assert state["state"]["samples"] == 16
    verify(path)


def test_older_checkpoints_with_sha256_sums_are_still_checked(trainer):
    trainer.fit()
    path = find_checkpoint(trainer.checkpoints.folder)
    state = json.loads((path / "state.json").read_text())
    for name, entry in state["files"].items():
        del entry["blake3"]
        entry["sha256"] = hashlib.sha256((path / name).read_bytes()).hexdigest()
    (path / "state.json").write_text(json.dumps(state))
    verify(path)
    state["files"]["config.toml"]["sha256"] = "0" * 64
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"config\.toml does not match its checksum"):
        verify(path)


def test_sums_are_those_of_the_algorithm_that_they_name(tmp_path):
    # https://github.com/BLAKE3-team/BLAKE3/blob/master/test_vectors/test_vectors.json
    (tmp_path / "empty").touch()
    expected = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    assert entry_of(tmp_path / "empty") == {"bytes": 0, "blake3": expected}
    (tmp_path / "large").write_bytes(bytes(range(251)) * 10_000)
    assert file_sum(tmp_path / "large") == blake3(bytes(range(251)) * 10_000).hexdigest()


def test_the_newest_are_kept(run_options, tmp_path):
    options = ["--train.steps=5", "--checkpoint.interval=1", "--checkpoint.keep=2"]
    Trainer.build(load_config(None, [*run_options, *options]), Mesh.start("cpu")).fit()
    names = [p.name for p in checkpoints(tmp_path / "run" / "checkpoints")]
    assert names == ["step_00000004", "step_00000005"]
    assert find_checkpoint(tmp_path / "run").name == "step_00000005"


@pytest.mark.parametrize("moment", ["_start", "_write", "entry_of", "_finish", "rename"])
def test_a_crash_while_saving_leaves_the_earlier_checkpoint(trainer, monkeypatch, moment):
    trainer.fit()
    (earlier,) = checkpoints(trainer.checkpoints.folder)

    class Crash(BaseException):
        """As sudden as a power cut: nobody may catch it and tidy up."""

    def crash(*arguments, **options):
        raise Crash

    if moment == "rename":
        monkeypatch.setattr(manager.Path, "rename", crash)
    else:
        owner = manager if moment == "entry_of" else manager.CheckpointManager
        monkeypatch.setattr(owner, moment, crash)
    trainer.state = manager.TrainState(3, 24, trainer.state.fingerprint)
    trainer.save(wait=False)
    with pytest.raises(Crash):
        trainer.checkpoints.wait()
    monkeypatch.undo()
    assert checkpoints(trainer.checkpoints.folder) == [earlier]
    verify(earlier)
    trainer.save(wait=False)  # tidies up what the crash left
    trainer.checkpoints.wait()
    assert not list(trainer.checkpoints.folder.glob("*.unfinished"))
    assert len(checkpoints(trainer.checkpoints.folder)) == 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: f.unlink(), "is missing"),
        (lambda f: f.write_bytes(f.read_bytes()[:-10]), "bytes"),
        (lambda f: f.write_bytes(f.read_bytes()[:-1] + b"\x07"), "checksum"),
        (lambda f: f.write_bytes(pickle.dumps({"model": 1})), "bytes"),
    ],
)
def test_damaged_tensors_are_refused(trainer, damage, message):
    trainer.fit()
    path = find_checkpoint(trainer.checkpoints.folder)
    (file,) = path.glob("*.safetensors")
    damage(file)
    with pytest.raises(UserError, match=message):
        megaswitch.load_model(path)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "[" * 100_000, '{"format": 1}', '{"format": 99, "files": {}, "state": {}}'],
)
def test_a_damaged_state_file_is_refused(trainer, text):
    trainer.fit()
    path = find_checkpoint(trainer.checkpoints.folder)
    (path / "state.json").write_text(text)
    with pytest.raises(UserError, match=r"state\.json|format"):
        megaswitch.load_model(path)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("files", "bytes", "1"),
        ("files", "bytes", float("inf")),
        ("files", "blake3", 1),
        ("state", "step", "x"),
        ("state", "samples", None),
        ("state", "fingerprint", 1),
    ],
)
def test_a_state_file_of_other_types_is_refused(trainer, section, key, value):
    trainer.fit()
    path = find_checkpoint(trainer.checkpoints.folder)
    state = json.loads((path / "state.json").read_text())
    (state["files"]["config.toml"] if section == "files" else state["state"])[key] = value
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"no readable state\.json"):
        verify(path)


def test_a_recorded_name_never_leads_out_of_the_folder(trainer, tmp_path):
    trainer.fit()
    path = find_checkpoint(trainer.checkpoints.folder)
    state = json.loads((path / "state.json").read_text())
    secret = tmp_path / "secret"
    secret.write_text("x")
    state["files"] = {f"../../../{secret.name}": {"bytes": 1, "sha256": "0"}}
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="lie elsewhere"):
        verify(path)


def test_no_checkpoint_is_said_with_the_remedy(tmp_path):
    with pytest.raises(UserError, match="neither a checkpoint nor a run folder"):
        megaswitch.load_model(tmp_path)


def test_tensors_come_back_exactly(trainer):
    trainer.fit()
    model = megaswitch.load_model(find_checkpoint(trainer.checkpoints.folder))
    for name, value in model.named_parameters():
        assert torch.equal(value, trainer.parts.weights[name].local), name


def test_a_tensor_file_that_is_not_listed_is_refused(trainer):
    trainer.fit()
    path = find_checkpoint(trainer.checkpoints.folder)
    save_file({"model.embedding.weight": torch.zeros(1)}, path / "zzz.safetensors")
    with pytest.raises(UserError, match=r"zzz\.safetensors is not part of it"):
        megaswitch.load_model(path)


def test_an_old_checkpoint_that_cannot_be_removed_is_no_reason_to_stop(
    run_options, tmp_path, monkeypatch, capsys
):
    remove = manager.shutil.rmtree

    def busy(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(39, "Directory not empty")
        remove(path, ignore_errors=True)

    monkeypatch.setattr(manager.shutil, "rmtree", busy)
    options = ["--train.steps=4", "--checkpoint.interval=1", "--checkpoint.keep=1"]
    assert Trainer.build(load_config(None, [*run_options, *options]), Mesh.start("cpu")).fit()
    assert "could not be removed" in capsys.readouterr().err
    names = [p.name for p in checkpoints(tmp_path / "run" / "checkpoints")]
    assert names == ["step_00000004"]
