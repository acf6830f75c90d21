"""Fine-tuning: what it starts from, what it trains, what it remembers."""

from decimal import Decimal
from pathlib import Path

import pytest
import torch

import megaswitch
from megaswitch.checkpoint.manager import checkpoints, find_checkpoint
from megaswitch.config import load_config
from megaswitch.data.mixture import quotas
from megaswitch.log import ConfigError, UserError
from megaswitch.metrics_file import read_metrics
from megaswitch.parallel.mesh import Mesh
from megaswitch.train.finetune import finetune_config
from megaswitch.train.launch import launch
from megaswitch.train.merge import merge_checkpoint
from megaswitch.train.trainer import Trainer

LOSSES_ALONE = "--train.valid_metrics=false"  # where answers prove nothing


def tune(options, *more):
    trainer = Trainer.build(finetune_config(None, [*options, *more]), Mesh.start("cpu"))
    return trainer, trainer.fit()


def state(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def history(folder, prefix="valid/task/"):
    lines = read_metrics(folder / "metrics.jsonl")
    return {(m["step"], k): v for m in lines for k, v in m.items() if k.startswith(prefix)}


def test_the_defaults_are_the_papers(text_run, tasks):
    options = [f"--train.init_from={text_run}/run", f"--data.train.first={tasks}/first_train.jsonl"]
    config = finetune_config(None, options)
    optim, model = config.optim, config.model
    assert (optim.name, optim.schedule, optim.learning_rate, optim.warmup_steps) == (
        *("adafactor", "constant"),
        *(1e-3, 0),
    )
    assert (model.dropout, model.moe.expert_dropout) == (0.1, 0.4)
    assert config.data.mixture.size == "tokens"
    assert config.train.batch_size * config.data.encoder_length == 1 << 20
    assert (config.train.steps, config.train.valid_interval) == (16_000, 200)
    assert config.data.tasks == {"first": "pairs"}
    assert (model.d_model, model.moe.num_experts, model.vocab_size) == (32, 4, 512)
    assert finetune_config(None, [*options, "--data.encoder_length=48"]).model.moe.group_size == 96
    changed = finetune_config(None, [*options, "--model.moe.expert_dropout=0.2"])
    assert changed.model.moe.expert_dropout == 0.2


def test_a_run_starts_from_the_weights_alone(text_run, tuning, tmp_path):
    trainer = Trainer.build(finetune_config(None, tuning), Mesh.start("cpu"))
    trainer.closing().__enter__()
    before = state(megaswitch.load_model(text_run / "run"))
    for name, value in state(trainer.parts.models[0]).items():
        assert torch.equal(value, before[name]), name
    assert trainer.state.step == 0
    assert not trainer.optimizer.state
    trainer.batches.close()
    trainer.log.close()


def test_a_resumed_tuning_equals_a_straight_one_bit_for_bit(tuning, tmp_path):
    straight, _ = tune(tuning, f"--train.run_dir={tmp_path}/straight")
    tune(tuning, "--train.steps=3")
    resumed, complete = tune(tuning)
    assert complete
    expected = state(straight.parts.models[0])
    for name, value in state(resumed.parts.models[0]).items():
        assert torch.equal(value, expected[name]), name
    assert resumed.exam.best.keys() == straight.exam.best.keys()
    scored = history(tmp_path / "tuned")
    for key, value in history(tmp_path / "straight").items():
        if key[0] != 3:
            assert scored[key] == value, key


def test_it_learns_keeps_the_best_and_remembers(text_run, tuning, tmp_path, capfd):
    short = ("--train.valid_interval=20", "--checkpoint.keep=1", "--train.valid_samples=40")
    trainer, _ = tune(tuning, "--train.steps=80", "--train.log_interval=40", *short)
    scores = history(tmp_path / "tuned")
    accuracies = {step: v for (step, key), v in scores.items() if key.endswith("lang/accuracy")}
    assert max(accuracies.values()) > 67.5  # the share of the more frequent label
    record = {s: v for (s, _), v in history(tmp_path / "tuned", "valid/score").items()}
    best = min(s for s, v in record.items() if v == max(record.values()))
    folder = tmp_path / "tuned" / "checkpoints"
    assert (folder / "best").resolve().name == f"step_{best:08d}"
    kept = {p.name for p in checkpoints(folder)}
    assert kept == {f"step_{best:08d}", "step_00000080"}
    assert find_checkpoint(folder / "best") == folder / "best"
    peak = max(accuracies.values())
    assert f"accuracy {peak:.2f} (step " in capfd.readouterr().err
    assert trainer.exam.best["task/lang/accuracy"][0] == peak
    # Going on does not forget the best, nor call something worse by its name.
    again, _ = tune(tuning, "--train.steps=81", "--train.log_interval=40", *short)
    assert again.exam.best["score"][0] >= max(record.values())


def test_shares_by_tokens_are_exact(tuning):
    trainer = Trainer.build(finetune_config(None, tuning), Mesh.start("cpu"))
    loader = trainer.loader
    sizes = [sum(s.num_tokens for s in source.stores) for source in loader.sources]
    assert loader.source_names == ("first", "lang")
    assert loader.segments[0].quotas == quotas([Decimal(n) for n in sizes], 1 << 16)
    assert sizes[0] != loader.sources[0].samples_per_epoch
    trainer.batches.close()
    trainer.log.close()


@pytest.mark.parametrize(
    ("choice", "trained"),
    [
        (["--optim.train_only=['decoder.*']"], lambda n: n.startswith("decoder.")),
        (["--optim.freeze=['*.experts.*', '*.router.*']"],
         lambda n: ".experts." not in n and ".router." not in n),
        (["--model.lora.rank=2"], lambda n: ".adapter." in n),
        (["--model.lora.rank=2", "--optim.train_only=['*.adapter.*', '*norm*']"],
         lambda n: ".adapter." in n or "norm" in n),
    ],
    ids=["train_only", "freeze", "adapters", "both"],
)  # fmt: skip
def test_frozen_parameters_stay_bit_for_bit(text_run, tuning, choice, trained):
    trainer, _ = tune(tuning, *choice, "--train.steps=2", LOSSES_ALONE)
    before = state(megaswitch.load_model(text_run / "run"))
    optimized = {p for group in trainer.optimizer.param_groups for p in group["params"]}
    for name, weight in trainer.parts.weights.items():
        assert (weight.local in optimized) == trained(name), name
        assert (weight.local in trainer.optimizer.state) == trained(name), name
        assert weight.parameter.grad is None
        if not trained(name):
            assert torch.equal(weight.local, before[name]), name
        elif name in before and ".experts." not in name:
            assert not torch.equal(weight.local, before[name]), name


def test_adapters_merge_into_a_plain_run(tuning, tmp_path):
    options = [*tuning, "--model.lora.rank=4", "--model.lora.targets=['*']", LOSSES_ALONE]
    tune(options, "--train.steps=4")
    tune(options)  # goes on with the adapters' own state
    merge_checkpoint(tmp_path / "tuned", tmp_path / "merged")
    adapted = megaswitch.load_model(tmp_path / "tuned")
    merged = megaswitch.load_model(tmp_path / "merged")
    assert merged.config.lora.rank == 0
    tokens = torch.randint(3, 400, (4, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = [model(tokens, tokens[:, :6]).logits for model in (adapted, merged)]
    plain = [p for n, p in adapted.named_parameters() if n.endswith("adapter.b")]
    assert max(p.abs().max() for p in plain) > 1e-4
    assert torch.allclose(*outputs, atol=2e-5)
    for name in ("tuned", "merged"):
        with pytest.raises(UserError, match=r"exists already|no adapters"):
            merge_checkpoint(tmp_path / name, tmp_path / "tuned")
    again = [f"--train.init_from={tmp_path}/tuned", f"--train.run_dir={tmp_path}/again"]
    config = finetune_config(None, [*again, *tuning[2:]])
    with pytest.raises(UserError, match="merge them first"):
        launch(config)


def test_what_cannot_work_is_refused_at_once(text_run, tuning, tmp_path):
    refused = [
        (["--model.d_ff=128"], UserError, "holds another model: model.d_ff was 64 and is 128"),
        (["--optim.freeze=['encodr.*']"], ConfigError, "'encodr.*', which matches no parameter"),
        (["--optim.freeze=['*']"], ConfigError, "leave no parameter to train"),
        (["--data.tasks.lang=sst-2"], UserError, "did you mean sst2"),
        (["--data.train.lang=nowhere.jsonl"], UserError, "no task file 'nowhere.jsonl'"),
    ]
    for more, kind, message in refused:
        with pytest.raises(kind) as caught:
            launch(finetune_config(None, [*tuning, *more]))
        assert message in str(caught.value)
    for more, message in (
        (["--data.tasks.other=sst2"], "data.tasks names 'other', which is no source"),
        (["--parallel.pp=2"], "train.valid_metrics=True needs all layers on each rank"),
        (["--optim.train_only=[]"], "optim.train_only=[] matches no parameter"),
        (["--model.lora.alpha=3"], "model.lora.alpha=3.0 would be ignored"),
    ):
        with pytest.raises(ConfigError) as caught:
            finetune_config(None, [*tuning, *more], world_size=2)
        assert message in str(caught.value)
    with pytest.raises(UserError, match="give --from RUN"):
        finetune_config(None, tuning[1:])
    with pytest.raises(UserError, match="must be a table of tasks"):
        finetune_config(None, [tuning[0], "--data.train=x"])
    assert not Path(tmp_path / "tuned").exists()


def test_task_files_become_corpora_once(tuning, tmp_path, capfd):
    tune(tuning, "--train.steps=1", LOSSES_ALONE)
    folder = tmp_path / "tuned" / "tasks"
    made = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.bin")}
    assert len(made) == 8
    capfd.readouterr()
    tune(tuning, "--train.steps=2", LOSSES_ALONE)
    assert {p.name: p.stat().st_mtime_ns for p in folder.glob("*.bin")} == made
    (folder / next(iter(made))).write_bytes(b"")  # cut by a crash
    tune(tuning, "--train.steps=3", LOSSES_ALONE)


def test_plain_training_takes_tasks_too(text_run, tasks, tmp_path):
    """The baseline from scratch: the same files, without a pre-trained model."""
    base = load_config(Path(text_run / "run" / "config.toml"))
    options = [
        f"--data.train={{lang = '{tasks}/lang_train.jsonl'}}",
        f"--data.valid={{lang = '{tasks}/lang_valid.jsonl'}}",
        f"--data.tasks.lang={tasks}/lang.toml",
        *("--data.objective=text-to-text", "--data.decoder_length=8"),
        *(f"--train.run_dir={tmp_path}/scratch", "--train.steps=2", "--train.valid_samples=8"),
    ]
    stored = (text_run / "run" / "config.toml").read_text()
    kept = [
        line for line in stored.splitlines() if not line.startswith(("noise", "mean", "random"))
    ]
    (tmp_path / "base.toml").write_text("\n".join(kept))
    assert launch(load_config(tmp_path / "base.toml", options))
    assert (2, "valid/task/lang/accuracy") in history(tmp_path / "scratch")
    assert base.data.objective == "span-corruption"
