"""Validation against sums made by hand."""

import math

import pytest
import torch

from megaswitch.config import load_config
from megaswitch.data.span_corruption import EOS_ID
from megaswitch.log import UserError
from megaswitch.parallel.mesh import Mesh
from megaswitch.train.metrics import LayerLoad
from megaswitch.train.parts import build_parts
from megaswitch.train.runner import Runner
from megaswitch.train.trainer import build_loader
from megaswitch.train.validation import Validation, measure, open_corpus, validate
from tests.conftest import SENTINELS, VOCAB_SIZE


@pytest.fixture
def config(run_options):
    return load_config(None, run_options)


@pytest.fixture
def runner(config):
    mesh = Mesh.start("cpu")
    parts = build_parts(config, mesh)
    parts.initialize(3)
    return Runner(config, mesh, parts)


@pytest.fixture
def model(runner):
    return runner.parts.models[0]


def by_hand(model, loader, samples):
    """Loss sums over all targets and over text, token by token."""
    batch = loader.batch(range(samples))
    model.eval()
    logits = model(batch.encoder_tokens, batch.decoder_tokens).logits
    nats = -torch.log_softmax(logits.double(), -1)
    total, text, counts, right, right_text = 0.0, 0.0, {}, 0, 0
    for row in range(samples):
        for place, target in enumerate(batch.decoder_targets[row].tolist()):
            loss = nats[row, place, target].item()
            total += loss
            hit = int(logits[row, place].argmax()) == target
            right += hit
            if target != EOS_ID and target < VOCAB_SIZE - SENTINELS:
                text += loss
                right_text += hit
                counts[target] = counts.get(target, 0) + 1
    tokens, texts = batch.decoder_targets.numel(), sum(counts.values())
    entropy = -sum(n / texts * math.log(n / texts) for n in counts.values())
    return total / tokens, right / tokens, text / texts, right_text / texts, entropy


# Micro-batches of whole routing groups (2 rows); the last one is smaller.
@pytest.mark.parametrize("micro_batch_size", [2, 4, 10])
def test_validation_equals_sums_by_hand(config, runner, model, micro_batch_size):
    loader = build_loader(config, "valid")
    validation = Validation(loader, samples=10, micro_batch_size=micro_batch_size)
    model.train()
    metrics = validate(runner, [validation])
    assert model.training
    loss, accuracy, content, content_accuracy, entropy = by_hand(model, loader, 10)
    assert content_accuracy > 0
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert metrics["accuracy"] == pytest.approx(accuracy)
    assert metrics["content_loss"] == pytest.approx(content, rel=1e-5)
    assert metrics["content_perplexity"] == pytest.approx(math.exp(content), rel=1e-4)
    assert metrics["content_accuracy"] == pytest.approx(content_accuracy)
    assert metrics["content_unigram_entropy"] == pytest.approx(entropy, rel=1e-9)


def test_the_total_of_several_sources_counts_tokens(config, runner, model, corpus):
    """Both halves apart and together, against all of them as one."""
    loaders = [open_corpus(config, corpus.with_name(n), None, shuffle=False)
               for n in ("tokens", "tokens-valid")]  # fmt: skip
    sources = [Validation(loaders[0], samples=6, micro_batch_size=2),
               Validation(loaders[1], samples=15, micro_batch_size=4)]  # fmt: skip
    done = []
    one, two, total = measure(runner, sources, total=True, advance=done.append)
    assert sum(done) == 21
    assert (one.samples, two.samples, total.samples) == (6, 15, 21)
    assert total.target_tokens == one.target_tokens + two.target_tokens
    for prefix, tokens in (("", "target_tokens"), ("content_", "content_tokens")):
        for key in ("loss", "accuracy"):
            expected = sum(
                getattr(part, tokens) * part.metrics[prefix + key] for part in (one, two)
            ) / getattr(total, tokens)
            assert total.metrics[prefix + key] == pytest.approx(expected, rel=1e-12)
    targets = torch.cat(
        [
            loader.batch(range(n)).decoder_targets.flatten()
            for loader, n in zip(loaders, (6, 15), strict=True)
        ]
    )
    text = targets[(targets != EOS_ID) & (targets < VOCAB_SIZE - SENTINELS)]
    shares = text.unique(return_counts=True)[1] / len(text)
    assert total.metrics["content_unigram_entropy"] == pytest.approx(
        -(shares * shares.log()).sum().item(), rel=1e-6
    )
    for name, load in total.router.items():
        parts = [one.router[name].tokens_per_expert, two.router[name].tokens_per_expert]
        assert load.tokens_per_expert == [a + b for a, b in zip(*parts, strict=True)]
        assert sum(load.tokens_per_expert) == load.tokens


def test_router_loads_equal_counts_by_hand(config, runner, model):
    loader = build_loader(config, "valid")
    (figures,) = measure(runner, [Validation(loader, samples=8, micro_batch_size=8)])
    batch = loader.batch(range(8))
    model.eval()
    routing = model(batch.encoder_tokens, batch.decoder_tokens).routing
    assert figures.router.keys() == routing.keys()
    for name, load in figures.router.items():
        experts = routing[name].expert.flatten()
        assert load.tokens_per_expert == torch.bincount(experts, minlength=4).tolist()
        assert load.dropped_fraction == pytest.approx(1 - routing[name].kept.double().mean().item())
        assert load.router_entropy == pytest.approx(routing[name].entropy.mean().item(), rel=1e-6)
        assert load.router_confidence == pytest.approx(routing[name].gate.mean().item(), rel=1e-6)
        assert load.load_imbalance == max(load.tokens_per_expert) * 4 / len(experts)


def test_experts_that_got_nothing_are_named():
    load = LayerLoad(6, 6, 0.5, 0.9, [4, 0, 2, 0])
    assert load.unused_experts == [1, 3]
    assert load.load_imbalance == pytest.approx(4 / 1.5)


def test_a_model_goes_back_to_training_when_reading_fails(config, runner, model, monkeypatch):
    loader = build_loader(config, "valid")

    def fail(indices):
        raise UserError("the data is gone")

    monkeypatch.setattr(loader, "batch", fail)
    model.train()
    with pytest.raises(UserError, match="the data is gone"):
        validate(runner, [Validation(loader, samples=4, micro_batch_size=4)])
    assert model.training


def test_a_full_device_is_said_in_words(config, runner, model, monkeypatch):
    def fail(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "forward", fail)
    source = Validation(build_loader(config, "valid"), samples=4, micro_batch_size=4)
    with pytest.raises(UserError, match="not enough memory: 4 samples are too many"):
        validate(runner, [source])


def test_validation_takes_what_there_is(config, runner, model):
    loader = build_loader(config, "valid")
    validation = Validation(loader, samples=10**9, micro_batch_size=4)
    assert validation.samples == loader.samples_per_epoch
