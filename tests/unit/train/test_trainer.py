"""The loop: it learns, it stops and goes on without a trace, and it says so when it diverges."""

import json
import math
import os

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import megaswitch
from megaswitch.checkpoint.manager import checkpoints, find_checkpoint, read_config
from megaswitch.config import from_toml, load_config
from megaswitch.log import UserError
from megaswitch.metrics_file import read_metrics
from megaswitch.parallel.mesh import Mesh
from megaswitch.train.trainer import Trainer, batch_size


def fit(options, *more):
    config = load_config(None, [*options, *more])
    trainer = Trainer.build(config, Mesh.start("cpu"))
    return trainer, trainer.fit()


def losses(run_dir):
    return {m["step"]: m["loss"] for m in read_metrics(run_dir / "metrics.jsonl") if "loss" in m}


def parameters(trainer):
    return {name: p.detach().clone() for name, p in trainer.parts.models[0].named_parameters()}


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw"])
def test_the_loss_falls_below_the_unigram_entropy(run_options, tmp_path, optimizer):
    rate = {"adafactor": 0.1, "adamw": 0.01}[optimizer]
    fit(
        run_options,
        f"--optim.name={optimizer}",
        f"--optim.learning_rate={rate}",
        "--train.steps=150",
        "--train.valid_interval=150",
    )
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["valid/content_loss"] < last["valid/content_unigram_entropy"] - 0.3


def test_a_resumed_run_equals_a_straight_one_bit_for_bit(run_options, tmp_path):
    options = [*run_options, "--model.dropout=0.1"]
    straight, _ = fit(options, f"--train.run_dir={tmp_path / 'straight'}")
    fit(options, "--train.steps=5")
    assert len(losses(tmp_path / "run")) == 5
    resumed, complete = fit(options)
    assert complete
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    expected = parameters(straight)
    for name, value in parameters(resumed).items():
        assert torch.equal(value, expected[name]), name
    for name, state in straight.optimizer.state_dict()["state"].items():
        for key, value in resumed.optimizer.state_dict()["state"][name].items():
            assert torch.equal(value, state[key]), (name, key)


def test_micro_batches_add_up_to_the_batch(run_options, tmp_path):
    options = [*run_options, "--model.dropout=0.1", "--train.steps=3"]
    fit(options, f"--train.run_dir={tmp_path / 'whole'}", "--train.micro_batch_size=8")
    fit(options, f"--train.run_dir={tmp_path / 'parts'}", "--train.micro_batch_size=2")
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert whole == pytest.approx(parts, rel=1e-5)


def test_metrics_have_the_same_names_in_both_places(run_options, tmp_path):
    fit(run_options, "--train.steps=6")
    names = set().union(*read_metrics(tmp_path / "run" / "metrics.jsonl")) - {"step"}
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == names
    expected = {
        "loss",
        "grad_norm",
        "learning_rate",
        "tokens_per_second",
        "dropped_fraction",
        "load_imbalance",
        "router_entropy/encoder.1.ffn",
        "router_entropy/decoder.1.ffn",
        "valid/perplexity",
        "valid/accuracy",
        "valid/content_unigram_entropy",
    }
    assert expected <= names
    entropies = events.Scalars("router_entropy/encoder.1.ffn")
    assert all(0 < e.value <= math.log(4) + 1e-6 for e in entropies)


def test_interrupted_metrics_beyond_the_checkpoint_are_dropped(run_options, tmp_path):
    fit(run_options, "--train.steps=4")
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 5, "loss": 0.0}\n{"step": 6, "lo')
    fit(run_options, "--train.steps=6")
    steps = [m["step"] for m in read_metrics(path) if "loss" in m]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert losses(tmp_path / "run")[5] > 0


def test_the_resolved_config_is_stored_in_run_and_checkpoint(run_options, tmp_path):
    trainer, _ = fit(run_options, "--train.steps=2")
    stored = from_toml((tmp_path / "run" / "config.toml").read_text())
    assert stored == trainer.config
    assert read_config(find_checkpoint(tmp_path / "run")) == trainer.config


def test_a_run_goes_on_only_as_the_same_run(run_options, tmp_path):
    fit(run_options, "--train.steps=2")
    with pytest.raises(UserError, match=r"model\.moe\.jitter was 0\.01 and is 0\.5"):
        fit(run_options, "--model.moe.jitter=0.5")
    fit(run_options, "--train.steps=3", "--train.micro_batch_size=2", "--checkpoint.keep=1")
    assert [p.name for p in checkpoints(tmp_path / "run" / "checkpoints")] == ["step_00000003"]


def test_other_data_is_refused(run_options, tmp_path, corpus):
    fit(run_options, "--train.steps=2")
    with pytest.raises(UserError, match="was trained on other data"):
        fit(run_options, f"--data.train={corpus}-valid")


def test_a_loss_that_is_not_finite_stops_before_the_update(run_options, tmp_path):
    fit(run_options, "--train.steps=2", "--optim.name=adamw")
    trainer = Trainer.build(
        load_config(None, [*run_options, "--optim.name=adamw"]), Mesh.start("cpu")
    )
    with torch.no_grad():
        trainer.parts.models[0].embedding.weight[5] = float("nan")
    before = parameters(trainer)
    with pytest.raises(UserError, match=r"the loss is nan .* at step 3.*step_00000002"):
        trainer.fit()
    for name, value in parameters(trainer).items():
        assert torch.equal(value, before[name]) or name == "embedding.weight"
    assert [p.name for p in checkpoints(tmp_path / "run" / "checkpoints")] == ["step_00000002"]


def test_a_finished_run_has_nothing_left_to_do(run_options, tmp_path):
    fit(run_options, "--train.steps=2")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    _, complete = fit(run_options, "--train.steps=2")
    assert complete
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_bf16_stays_near_fp32(run_options, tmp_path):
    fit(run_options, f"--train.run_dir={tmp_path / 'fp32'}")
    fit(run_options, f"--train.run_dir={tmp_path / 'bf16'}", "--train.precision=bf16")
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "fp32"), rel=0.02)


@pytest.mark.parametrize(("samples", "size"), [(0, 8), (29, 8), (30, 16), (60, 24), (90, 32)])
def test_batch_ramp_up(run_options, samples, size):
    ramp = ["--train.batch_size=32", "--train.rampup_batch_size=8"]
    ramp += ["--train.rampup_increment=8", "--train.rampup_samples=90"]
    config = load_config(None, [*run_options, *ramp])
    assert batch_size(config, samples) == size
    assert batch_size(config, 10_000) == 32


def test_a_ramped_run_consumes_what_its_steps_say(run_options, tmp_path):
    ramp = ["--train.rampup_batch_size=4", "--train.rampup_increment=4", "--train.rampup_samples=8"]
    fit(run_options, *ramp, "--train.steps=4")
    state = json.loads((find_checkpoint(tmp_path / "run") / "state.json").read_text())["state"]
    assert state["samples"] == 4 + 4 + 8 + 8


def test_load_model_gives_the_trained_model(run_options, tmp_path):
    trainer, _ = fit(run_options, "--train.steps=3")
    model = megaswitch.load_model(tmp_path / "run")
    assert not model.training
    tokens = torch.randint(3, 90, (3, 64)), torch.randint(3, 90, (3, 9))
    mask = torch.ones(3, 64, dtype=torch.bool)
    mask[1, 40:] = False
    out = model(*tokens, encoder_mask=mask)
    expected = trainer.parts.models[0].eval()(*tokens, encoder_mask=mask)
    assert torch.equal(out.logits, expected.logits)
    assert out.encoder_hidden.shape == (3, 64, 32)
    assert out.aux_loss.ndim == 0
    routing = out.routing["encoder.1.ffn"]
    assert routing.expert.shape == routing.kept.shape == (3, 64)
    assert not routing.kept[1, 40:].any()


def test_only_one_process_trains_in_a_folder(run_options):
    config = load_config(None, run_options)
    first = Trainer.build(config, Mesh.start("cpu"))
    with pytest.raises(UserError, match=rf"another process \(pid {os.getpid()}\) is training in"):
        Trainer.build(config, Mesh.start("cpu"))
    first.log.close()
    fit(run_options, "--train.steps=1")


def test_metrics_that_cannot_be_written_end_the_run(run_options, monkeypatch):
    trainer = Trainer.build(load_config(None, run_options), Mesh.start("cpu"))

    def write(step, metrics):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer.log, "write", write)
    with pytest.raises(UserError, match=r"metrics cannot be written to .* No space left on device"):
        trainer.fit()
    assert trainer.state.step == 1


def test_spoilt_lines_of_metrics_are_left_out(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n\0\0\0\n[]\n{"loss": 1}\n{"step": 2}\n\xff{"st')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}, {"step": 2}]
    assert "line 2 of" in capsys.readouterr().err
