"""A run on several sources: what it logs, and that it goes on exactly, with other weights too."""

import json

import pytest
import torch

from megaswitch.checkpoint.manager import find_checkpoint
from megaswitch.config import load_config
from megaswitch.data.indexed import TokenStore
from megaswitch.log import UserError
from megaswitch.metrics_file import read_metrics
from megaswitch.parallel.mesh import Mesh
from megaswitch.train.corpora import build_loader, micro_batches
from megaswitch.train.trainer import Trainer
from tests.conftest import write_corpus

NAMES = ("de", "en", "fr")


@pytest.fixture(scope="session")
def prefixes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    for number, name in enumerate(NAMES):
        write_corpus(folder / name, 4_000 * (number + 1), seed=number)
        write_corpus(folder / f"{name}-valid", 2_000, seed=10 + number)
    return {name: folder / name for name in NAMES}


@pytest.fixture
def options(run_options, prefixes):
    kept = [o for o in run_options if not o.startswith(("--data.train=", "--data.valid="))]
    kept += [f"--data.train.{name}={prefix}" for name, prefix in prefixes.items()]
    kept += [f"--data.valid.{name}={prefix}-valid" for name, prefix in prefixes.items()]
    return [*kept, "--data.mixture.exponent=0.3", "--data.mixture.block=40"]


def fit(options, *more):
    trainer = Trainer.build(load_config(None, [*options, *more]), Mesh.start("cpu"))
    assert trainer.fit()
    return trainer


def logged(run_dir):
    return read_metrics(run_dir / "metrics.jsonl")


def timeless(metrics):
    speeds = ("tokens_per_second", "tflops_per_second", "mfu")
    return [{k: v for k, v in m.items() if k not in speeds} for m in metrics]


def test_every_source_has_its_loss_and_counters_in_the_metrics(options, tmp_path):
    trainer = fit(options, "--train.log_interval=4")
    training = [m for m in logged(tmp_path / "run") if "loss" in m]
    for m in training:
        assert sum(m[f"samples/{name}"] for name in NAMES) == 8 * m["step"]
        assert len({m[f"loss/{name}"] for name in NAMES}) == 3
    last = training[-1]
    sources = dict(zip(trainer.loader.source_names, trainer.loader.sources, strict=True))
    for name in NAMES:
        expected = last[f"samples/{name}"] / sources[name].samples_per_epoch
        assert last[f"epochs/{name}"] == expected
    # Every target of these samples counts, so the loss is the mean of the sources' by their rows.
    rows = {n: training[1][f"samples/{n}"] - training[0][f"samples/{n}"] for n in NAMES}
    mean = sum(rows[n] * training[1][f"loss/{n}"] for n in NAMES) / sum(rows.values())
    assert mean == pytest.approx(training[1]["loss"], rel=1e-6)


def test_a_source_that_a_step_did_not_see_has_no_loss_there(options, prefixes, tmp_path):
    weights = "--data.mixture.weights={en = 1, de = 0, fr = 1}"
    fit([o for o in options if "exponent" not in o], weights, "--train.steps=2")
    last = logged(tmp_path / "run")[-2]
    assert {key for key in last if key.startswith("loss/")} == {"loss/en", "loss/fr"}
    assert last["samples/de"] == last["epochs/de"] == 0


def test_validation_is_of_each_source_and_of_all(options, tmp_path):
    fit(options, "--train.steps=2", "--train.valid_interval=2")
    (valid,) = (m for m in logged(tmp_path / "run") if "valid/loss" in m)
    mean = sum(valid[f"valid/loss/{name}"] for name in NAMES) / 3  # equally many samples of each
    assert valid["valid/loss"] == pytest.approx(mean, rel=1e-6)
    assert {f"valid/content_loss/{name}" for name in NAMES} < valid.keys()


def test_a_killed_mixture_goes_on_as_if_nothing_had_been(options, tmp_path):
    fit(options, f"--train.run_dir={tmp_path / 'straight'}")
    fit(options, "--train.steps=5", "--train.valid_interval=500")
    trainer = fit(options, "--data.loader_threads=3", "--data.access=pread")
    state = json.loads((find_checkpoint(tmp_path / "run") / "state.json").read_text())["state"]
    assert state["mixture"] == [[0, *trainer.loader.segments[0].quotas]]
    straight = timeless(logged(tmp_path / "straight"))
    resumed = [m for m in timeless(logged(tmp_path / "run")) if m["step"] > 5 or "loss" in m]
    assert resumed == straight


def test_new_weights_act_from_where_the_run_stands_and_are_remembered(options, tmp_path):
    by_size = [o for o in options if "exponent" not in o]
    before = fit(by_size, "--train.steps=3").loader.segments
    weights = "--data.mixture.weights={en = 1, de = 1, fr = 0}"
    fit(by_size, weights, "--train.steps=6")
    trainer = fit(by_size, weights, "--train.steps=8")
    assert trainer.loader.segments[:-1] == before
    assert trainer.loader.segments[-1].start == 24
    assert trainer.loader.segments[-1].quotas == (20, 20, 0)
    by_step = {m["step"]: m for m in logged(tmp_path / "run") if "loss" in m}
    assert by_step[8]["samples/fr"] == by_step[3]["samples/fr"] > 0
    assert by_step[8]["samples/en"] - by_step[3]["samples/en"] == 20  # of the 40 since then
    straight = fit(by_size, weights, "--train.steps=8", f"--train.run_dir={tmp_path / 'other'}")
    assert straight.loader.segments != trainer.loader.segments


def test_a_run_does_not_go_on_with_other_sources_or_blocks(options, prefixes, tmp_path):
    fit(options, "--train.steps=1")
    for change, message in [
        (f"--data.train.fr={prefixes['en']}", "was trained on other data"),
        (f"--data.train.es={prefixes['en']}", "was trained on other data"),
        ("--data.mixture.block=41", "data.mixture.block was 40 and is 41"),
    ]:
        with pytest.raises(UserError, match=message):
            fit(options, change)


def test_one_source_needs_no_mixture(run_options, prefixes, tmp_path):
    trainer = fit(run_options, "--train.steps=2")
    assert trainer.state.mixture == []
    assert not any("/" in key for m in logged(tmp_path / "run") for key in m if "samples" in key)


# ---------------------------------------------------------------- global batches


class Rank:
    """As much of a mesh as the plan of a run asks for."""

    def __init__(self, rank, size):
        self.dp = self
        self.rank, self.size = rank, size


def global_batches(options, dp, micro, steps, samples=0, threads=1, **changes):
    """Rows of each step in their order, put together from all ranks."""
    extra = [f"--{key.replace('__', '.')}={value}" for key, value in changes.items()]
    settings = [*options, "--train.batch_size=24", f"--train.micro_batch_size={micro}", *extra]
    config = load_config(None, settings, world_size=dp)
    parts = []
    for rank in range(dp):
        loader = build_loader(config, "train")
        plan = micro_batches(config, Rank(rank, dp), samples)
        with loader.stream(plan, threads=threads, ahead=threads + 2) as stream:
            rows = [next(stream) for _ in range(steps * 24 // dp // micro)]
        parts.append(torch.cat([all_of(b) for b in rows]).view(steps, 24 // dp, -1))
    return torch.cat(parts, 1)


def all_of(batch):
    """Everything that a sample holds, a row each; its index comes last."""
    fields = [batch.encoder_tokens, batch.decoder_tokens, batch.decoder_targets]
    segments = [batch.encoder_segments, batch.decoder_segments]
    columns = [batch.source, batch.sample_index]
    fields += [field for field in segments if field is not None]
    return torch.cat([*fields, *(c[:, None] for c in columns if c is not None)], 1)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("mixed", [True, False])
def test_global_batches_are_the_same_for_every_layout_and_after_every_resume(
    options, run_options, mixed, packed
):
    given = options if mixed else run_options
    given = [*given, "--model.moe.group_size=64", *(["--data.packing=true"] if packed else [])]
    expected = global_batches(given, 1, 24, steps=10)
    assert expected[:, :, -1].flatten().tolist() == list(range(240))
    for dp, micro, threads in [(1, 1, 4), (2, 3, 1), (3, 8, 2), (4, 2, 3), (8, 1, 2), (8, 3, 1)]:
        found = global_batches(given, dp, micro, 10, threads=threads)
        assert torch.equal(found, expected), (dp, micro, threads)
    resumed = global_batches(given, 4, 6, 7, samples=72, train__steps=5_000, data__access="pread")
    assert torch.equal(resumed, expected[3:])


def test_a_ramp_of_the_batch_size_skips_and_repeats_nothing(run_options):
    ramp = ["--train.rampup_batch_size=4", "--train.rampup_increment=4"]
    ramp += ["--train.rampup_samples=32", "--train.micro_batch_size=2"]
    config = load_config(None, [*run_options, *ramp], world_size=2)
    taken = []
    for rank in range(2):
        plan = micro_batches(config, Rank(rank, 2), 0)
        taken += [index for _ in range(40) for index in next(plan)]
    assert sorted(taken) == list(range(len(taken)))


def test_the_loader_feeds_no_rank_another_rows(run_options, corpus):
    """What a rank trains on is text of its corpus: a last look at the whole path by hand."""
    config = load_config(None, run_options)
    loader = build_loader(config, "train")
    (batch,) = loader.stream([range(5, 6)])
    text = TokenStore(corpus).tokens(loader.sample_start(5), loader.tokens_per_sample).tolist()
    kept = [t for t in batch.encoder_tokens[0].tolist() if 3 <= t < 92]
    masked = [t for t in batch.decoder_targets[0].tolist() if 3 <= t < 92]
    assert sorted(kept + masked) == sorted(text)
    assert kept
    assert masked
