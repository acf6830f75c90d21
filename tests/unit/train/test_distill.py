"""Distillation as a run: weights copied, teachers live and kept, resumed, refused."""

import json

import pytest
import torch

import megaswitch
from megaswitch.config import load_config
from megaswitch.log import ConfigError, UserError
from megaswitch.metrics_file import read_metrics
from megaswitch.parallel.mesh import Mesh
from megaswitch.train.cache_logits import cache_logits
from megaswitch.train.distill import check_teacher
from megaswitch.train.logit_cache import LogitCache
from megaswitch.train.trainer import Trainer
from tests.unit.cli.commands import refusal

ALONE = Mesh.start("cpu")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, corpus):
    """A Switch model of forty steps."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    options = [
        *("--model.vocab_size=192", "--model.d_model=32", "--model.d_kv=8", "--model.d_ff=64"),
        *("--model.num_heads=4", "--model.num_encoder_layers=2", "--model.num_decoder_layers=2"),
        *("--model.moe.num_experts=4", "--model.moe.group_size=128", "--data.encoder_length=64"),
        *(f"--data.train={corpus}", f"--train.run_dir={folder}", "--train.steps=40"),
        *("--train.batch_size=8", "--train.micro_batch_size=4", "--train.device=cpu"),
        *("--optim.learning_rate=0.05", "--optim.schedule=constant", "--optim.warmup_steps=0"),
    ]
    assert Trainer.build(load_config(None, options), ALONE).fit()
    return folder


@pytest.fixture
def student(run_options, teacher, tmp_path):
    """Options of a dense student of that teacher."""
    return [
        *(option for option in run_options if ".moe." not in option),
        f"--distill.teacher={teacher}",
        "--distill.temperature=1.5",
        "--train.steps=6",
        "--train.micro_batch_size=8",
    ]


def build(options, *more):
    return Trainer.build(load_config(None, [*options, *more]), ALONE)


def fit(options, *more):
    trainer = build(options, *more)
    assert trainer.fit()
    return trainer


def weights_of(options, *more):
    """What a run starts with."""
    trainer = build(options, *more)
    trainer.batches.close()
    trainer.log.close()
    return parameters(trainer)


def parameters(trainer):
    return {n: w.local.detach().clone() for n, w in trainer.parts.weights.items()}


def curve(run_dir, key="loss"):
    return [m[key] for m in read_metrics(run_dir / "metrics.jsonl") if key in m]


def test_a_student_starts_with_all_weights_of_its_teacher_that_are_no_experts(
    student, teacher, tmp_path, capsys
):
    theirs = dict(megaswitch.load_model(teacher).named_parameters())
    fresh = weights_of(student, "--distill.copy_weights=false")
    started = weights_of(student)
    for name, value in started.items():
        source = theirs if name in theirs else fresh
        assert torch.equal(value, source[name]), name
    names = sorted(started.keys() - theirs.keys())
    left = ", ".join(name.removesuffix(".weight") for name in names)
    assert left.count(".layers.1.ffn.") == 4  # wi and wo of two layers, where the teacher is sparse
    told = capsys.readouterr().err
    assert f"copied {len(started) - 4} of {len(started)} weights from {teacher}" in told
    assert f"; fresh: {left}\n" in told
    with pytest.raises(UserError, match="no weight of"):
        weights_of(student, "--model.d_model=48", "--model.num_heads=3", "--model.d_kv=4")


def test_the_loss_is_a_mixture_of_hard_and_soft(student, tmp_path):
    more = ("--distill.copy_weights=false", "--distill.soft_weight=1.0", "--train.steps=30")
    fit(student, *more, f"--train.run_dir={tmp_path / 'soft'}")
    fit(student, "--distill.soft_weight=0.0", f"--train.run_dir={tmp_path / 'hard'}")
    late = ("--distill.start_step=5", "--distill.soft_weight=1.0")
    fit(student, *late, f"--train.run_dir={tmp_path / 'late'}")
    divergence = curve(tmp_path / "soft", "teacher_divergence")
    assert len(divergence) == 30
    assert 0 < divergence[-1] < divergence[0] / 2
    hard, late_losses = curve(tmp_path / "hard"), curve(tmp_path / "late")
    # Without a teacher that is heard, all is as in a plain run from the same weights.
    assert late_losses[:5] == pytest.approx(hard[:5], rel=1e-6)
    assert len(curve(tmp_path / "late", "soft_loss")) == 1


def test_a_distilled_run_goes_on_bit_for_bit_with_the_same_teacher_only(
    student, teacher, run_options, tmp_path
):
    student = [*student, "--train.micro_batch_size=4"]  # two to a step
    straight = fit(student, f"--train.run_dir={tmp_path / 'straight'}")
    fit(student, "--train.steps=3")
    assert parameters(straight).keys() == (resumed := parameters(fit(student))).keys()
    assert all(torch.equal(v, resumed[n]) for n, v in parameters(straight).items())
    assert curve(tmp_path / "run") == curve(tmp_path / "straight")
    other = tmp_path / "other"
    fit(run_options, "--train.steps=1", f"--train.run_dir={other}")
    with pytest.raises(UserError, match="taught by another teacher"):
        build(student, f"--distill.teacher={other}", "--train.steps=7")


def test_kept_probabilities_teach_as_the_teacher_does(student, tmp_path):
    kept = [*student, f"--distill.logits={tmp_path / 'kept'}", "--distill.top_k=192"]
    cache_logits(load_config(None, kept), ALONE)
    live = fit(student, f"--train.run_dir={tmp_path / 'live'}")
    cached = fit(kept)
    for name, value in parameters(live).items():
        assert torch.allclose(value, parameters(cached)[name], rtol=0, atol=2e-5), name
    for key in ("loss", "soft_loss", "teacher_divergence"):
        expected = curve(tmp_path / "live", key)
        assert curve(tmp_path / "run", key) == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_a_cache_grows_and_is_finished_after_a_stop(student, tmp_path, monkeypatch):
    folder = tmp_path / "kept"
    options = [*student, f"--distill.logits={folder}", "--distill.top_k=5", "--train.steps=40"]
    from megaswitch.train import cache_logits as module

    written = []

    def stop_at_the_second(path, *rest):
        if len(written) == 1:
            raise OSError(28, "No space left on device")
        written.append(path)
        return original(path, *rest)

    original = module.write_file
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_file", stop_at_the_second)
        with pytest.raises(UserError, match="No space left"):
            cache_logits(load_config(None, options), ALONE)
    with pytest.raises(UserError, match=r"has no cache\.json"):
        build(options)
    first = written[0].stat().st_mtime_ns
    cache_logits(load_config(None, options), ALONE)
    assert written[0].stat().st_mtime_ns == first
    assert len(list(folder.glob("samples_*.bin"))) == 2  # of 256 samples; 320 are needed
    with pytest.raises(UserError, match=r"has 512 samples, and train\.steps=80 take 640"):
        build(options, "--train.steps=80")
    cache_logits(load_config(None, [*options, "--train.steps=80"]), ALONE)
    assert build(options, "--train.steps=80").distillation.cache.samples == 768


@pytest.fixture
def kept(student, tmp_path):
    options = [*student, f"--distill.logits={tmp_path / 'kept'}", "--distill.top_k=5"]
    cache_logits(load_config(None, options), ALONE)
    return options


def test_what_was_kept_is_not_trusted(kept, tmp_path):
    folder = tmp_path / "kept"
    with pytest.raises(UserError, match=r"temperature is 1\.5 there, not 2\.0"):
        build(kept, "--distill.temperature=2.0")
    with pytest.raises(UserError, match="top_k is 5 there, not 6"):
        build(kept, "--distill.top_k=6")
    path = folder / "samples_0000000.bin"
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    with pytest.raises(UserError, match=r"samples_0000000\.bin has \d+ of \d+ bytes"):
        build(kept)
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(UserError, match="does not match its checksum"):
        build(kept)
    path.write_bytes(good)
    trainer = build(kept)
    cache = trainer.distillation.cache
    assert cache.read(torch.tensor([3, 1])).tokens.shape[0] == 2
    path.write_bytes(good[:100])
    with pytest.raises(UserError, match="was cut while it was read"):
        cache.read(torch.tensor([0]))
    trainer.batches.close()
    for damage in ({"top_k": 10**12}, {"decoder_length": -1}, {"format": 2}, {"more": 1}):
        plan = folder / "plan.json"
        before = plan.read_text()
        plan.write_text(json.dumps(json.loads(before) | damage))
        with pytest.raises(UserError, match=r"plan\.json is damaged or of another version"):
            build(kept)
        plan.write_text(before)


def test_a_token_outside_the_vocabulary_is_refused(kept):
    trainer = build(kept)
    cache = trainer.distillation.cache
    rows = cache._map(0).copy()
    rows["tokens"][2, 0, 0] = 192
    cache._maps[0] = rows
    assert isinstance(cache, LogitCache)
    with pytest.raises(UserError, match="token 192 outside the vocabulary"):
        cache.read(torch.tensor([2]))
    trainer.batches.close()


def test_all_that_is_wrong_with_a_teacher_is_said_at_once(student, teacher):
    options = [*student, "--model.vocab_size=256", "--train.micro_batch_size=1"]
    with pytest.raises(ConfigError) as caught:
        check_teacher(load_config(None, options), 1)
    text = str(caught.value)
    assert "model.vocab_size=256 must be the 192 of" in text
    assert f"of distill.teacher={teacher}: train.micro_batch_size=1 must be a multiple" in text
    with pytest.raises(UserError, match="neither a checkpoint nor a run folder"):
        check_teacher(load_config(None, [*student, "--distill.teacher=nowhere"]), 1)
    spread = [*student, "--parallel.ep=3", "--train.batch_size=24"]
    with pytest.raises(ConfigError, match=r"ep=3 must divide model\.moe\.num_experts=4"):
        check_teacher(load_config(None, spread, world_size=3), 3)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--distill.temperature=2.0"], "would be ignored because distill.teacher=None"),
        (["--distill.teacher=x", "--distill.top_k=3"], "ignored because distill.logits"),
        (
            ["--distill.teacher=x", "--distill.start_step=1000"],
            "must be less than train.steps=1000",
        ),
        (["--distill.teacher=x", "--train.init_from=y"], "both give the student its first"),
        (
            ["--distill.teacher=x", "--distill.logits=y", "--distill.top_k=40000"],
            "must not exceed model.vocab_size=32128",
        ),
    ],
)
def test_rules(options, problem):
    with pytest.raises(ConfigError, match=problem):
        load_config(None, options)


def test_a_teacher_does_not_run_in_a_pipeline():
    options = ["--distill.teacher=x", "--parallel.pp=2", "--train.batch_size=64"]
    with pytest.raises(ConfigError, match="does not run along in a pipeline"):
        load_config(None, options, world_size=2)
    load_config(None, [*options, "--distill.logits=y"], world_size=2)


def test_the_command_needs_a_teacher_and_for_a_cache_a_folder(tmp_path):
    path = tmp_path / "student.toml"
    path.write_text("")
    assert "distill.teacher is not set" in refusal("distill", path)
    message = refusal("distill", path, "--cache")
    assert "distill.logits is not set" in message
    assert "2 problems" in message
