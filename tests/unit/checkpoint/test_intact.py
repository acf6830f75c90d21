"""A run goes on from the newest checkpoint that is whole, and never from a damaged one."""

import pytest

from megaswitch.checkpoint.manager import checkpoints
from megaswitch.config import load_config
from megaswitch.log import UserError
from megaswitch.parallel.mesh import Mesh
from megaswitch.train.trainer import Trainer


@pytest.fixture
def fit(run_options):
    def run(*more):
        options = [*run_options, "--checkpoint.interval=2", "--train.valid_interval=1000", *more]
        trainer = Trainer.build(load_config(None, options), Mesh.start("cpu"))
        trainer.fit()
        return trainer

    return run


def cut(path):
    (shard,) = path.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-100])


def alter(path):
    (shard,) = path.glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-50] ^= 4
    shard.write_bytes(data)


def empty_state(path):
    (path / "state.json").write_text("")


def remove_configuration(path):
    (path / "config.toml").unlink()


@pytest.mark.parametrize("damage", [cut, alter, empty_state, remove_configuration])
def test_a_damaged_checkpoint_is_passed_over_and_told(fit, tmp_path, capsys, damage):
    folder = tmp_path / "run" / "checkpoints"
    fit("--train.steps=6", "--checkpoint.keep=3")
    damage(folder / "step_00000006")
    capsys.readouterr()
    trainer = fit("--train.steps=5", "--checkpoint.keep=1")
    told = capsys.readouterr().err
    assert "warning: checkpoint" in told
    assert "It is now step_00000006.damaged, and the checkpoint before it is used" in told
    assert f"resuming from {folder / 'step_00000004'}" in told
    assert trainer.state.step == 5
    # It is none of those to keep, and nothing of it was removed.
    assert [path.name for path in checkpoints(folder)] == ["step_00000005"]
    assert (folder / "step_00000006.damaged").is_dir()


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(fit, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    fit("--train.steps=4", "--checkpoint.keep=2")
    for path in checkpoints(folder):
        cut(path)
    for _ in range(2):  # nothing is renamed, so that a second start says the same
        with pytest.raises(UserError, match=r"none of the 2 checkpoints in .* is intact"):
            fit("--train.steps=6")


def test_checkpoints_of_round_steps_stay(fit, tmp_path):
    fit("--train.steps=10", "--checkpoint.keep=1", "--checkpoint.keep_every=4")
    names = [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")]
    assert names == ["step_00000004", "step_00000008", "step_00000010"]
