"""Runs on documents: every objective learns, is validated, and goes on where it stopped."""

import json

import numpy as np
import pytest

from megaswitch.config import load_config
from megaswitch.data.indexed import IndexedWriter
from megaswitch.log import ConfigError, UserError
from megaswitch.metrics_file import read_metrics
from megaswitch.parallel.mesh import Mesh
from megaswitch.train.trainer import Trainer

OBJECTIVES = {
    "packed": ["--data.packing=true"],
    "prefix-lm": ["--data.objective=prefix-lm"],
    "pairs": ["--data.objective=text-to-text", "--data.decoder_length=20"],
    "packed pairs": [
        "--data.objective=text-to-text", "--data.decoder_length=20", "--data.packing=true"
    ],
}  # fmt: skip


@pytest.fixture
def options(run_options, tmp_path):
    """A run on documents of which each repeats two ids of its own."""
    random = np.random.default_rng(0)
    for name in ("corpus", "corpus_inputs", "corpus_targets"):
        with IndexedWriter(tmp_path / name, "<u2") as writer:
            for _ in range(300):
                ids = random.integers(3, 30, 2)
                writer.add_document(np.tile(ids, random.integers(2, 12)))
    data = [f"--data.{split}={tmp_path / 'corpus'}" for split in ("train", "valid")]
    return [*run_options, *data, "--model.dropout=0.1"]


def fit(options, *more):
    trainer = Trainer.build(load_config(None, [*options, *more]), Mesh.start("cpu"))
    trainer.fit()
    return trainer


def losses(run_dir):
    return {m["step"]: m["loss"] for m in read_metrics(run_dir / "metrics.jsonl") if "loss" in m}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_resumed_run_equals_a_straight_one(options, tmp_path, name):
    options = [*options, *OBJECTIVES[name]]
    trainer = fit(options, f"--train.run_dir={tmp_path / 'straight'}")
    assert (trainer.loader.batch([0]).encoder_segments is not None) == ("packed" in name)
    fit(options, "--train.steps=5")
    fit(options)
    straight = losses(tmp_path / "straight")
    assert losses(tmp_path / "run") == straight
    assert straight[12] < straight[1]
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["valid/content_loss"] > 0


def test_another_objective_is_another_run(options, tmp_path):
    fit(options, *OBJECTIVES["packed"], "--train.steps=2")
    with pytest.raises(UserError, match=r"data\.objective was .* and is 'prefix-lm'"):
        fit(options, *OBJECTIVES["prefix-lm"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--data.objective=text-to-text"], "needs it, as targets have no natural length; set it"),
        (
            ["--data.objective=prefix-lm", "--data.packing=true"],
            "data.packing=True does not go with data.objective='prefix-lm'",
        ),
        (
            ["--data.objective=prefix-lm", "--data.noise_density=0.3"],
            "data.noise_density=0.3 would be ignored",
        ),
        (["--data.objective=mlm"], "data.objective='mlm' is wrong"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(ConfigError) as caught:
        load_config(None, changes)
    assert message in " ".join(str(caught.value).split())


def test_the_command_line_writes_pairs(tmp_path, text_run):
    from click.testing import CliRunner

    from megaswitch.cli import cli
    from megaswitch.data.indexed import TokenStore

    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"inputs": "ba da", "targets": "ka"}) + "\n", encoding="utf-8")
    model = str(text_run / "spm.model")
    arguments = ["preprocess", str(path), "--tokenizer", model, "--output", str(tmp_path / "c")]
    result = CliRunner().invoke(cli, [*arguments, "--pairs"])
    assert result.exit_code == 0, result.output
    assert TokenStore(tmp_path / "c_inputs").num_documents == 1
    assert TokenStore(tmp_path / "c_targets").num_documents == 1
    result = CliRunner().invoke(cli, [*arguments, "--pairs", "--seed=3"])
    assert result.exit_code == 2
    assert "leave out the others" in result.output
