"""Validation against sums made by hand, and greedy decoding against teacher forcing."""

import math

import pytest
import torch

from megaswitch.config import load_config
from megaswitch.data.span_corruption import EOS_ID
from megaswitch.model.switch_transformer import SwitchTransformer
from megaswitch.parallel.mesh import Mesh
from megaswitch.train.evaluate import Validation
from megaswitch.train.generate import greedy
from megaswitch.train.trainer import build_loader
from tests.conftest import SENTINELS, VOCAB_SIZE


@pytest.fixture
def config(run_options):
    return load_config(None, run_options)


@pytest.fixture
def model(config):
    return SwitchTransformer(config.model).initialize(3)


def by_hand(model, loader, samples):
    """Loss sums over all targets and over text, token by token."""
    batch = loader.batch(range(samples))
    model.eval()
    logits = model(batch.encoder_tokens, batch.decoder_tokens).logits
    nats = -torch.log_softmax(logits.double(), -1)
    total, text, counts, right = 0.0, 0.0, {}, 0
    for row in range(samples):
        for place, target in enumerate(batch.decoder_targets[row].tolist()):
            loss = nats[row, place, target].item()
            total += loss
            right += int(logits[row, place].argmax()) == target
            if target != EOS_ID and target < VOCAB_SIZE - SENTINELS:
                text += loss
                counts[target] = counts.get(target, 0) + 1
    tokens, texts = batch.decoder_targets.numel(), sum(counts.values())
    entropy = -sum(n / texts * math.log(n / texts) for n in counts.values())
    return total / tokens, right / tokens, text / texts, entropy


# Micro-batches of whole routing groups (2 rows); the last one is smaller.
@pytest.mark.parametrize("micro_batch_size", [2, 4, 10])
def test_validation_equals_sums_by_hand(config, model, micro_batch_size):
    loader = build_loader(config, "valid")
    validation = Validation(loader, samples=10, micro_batch_size=micro_batch_size)
    model.train()
    metrics = validation.run(model, Mesh.start("cpu"), torch.float32)
    assert model.training
    loss, accuracy, content, entropy = by_hand(model, loader, 10)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert metrics["accuracy"] == pytest.approx(accuracy)
    assert metrics["content_loss"] == pytest.approx(content, rel=1e-5)
    assert metrics["content_unigram_entropy"] == pytest.approx(entropy, rel=1e-9)


def test_validation_takes_what_there_is(config, model):
    loader = build_loader(config, "valid")
    validation = Validation(loader, samples=10**9, micro_batch_size=4)
    assert validation.samples == loader.samples_per_epoch


def test_greedy_takes_the_likeliest_token_and_stops_at_eos(model):
    model.eval()
    encoder = torch.randint(3, 90, (4, 12))
    mask = torch.ones(4, 12, dtype=torch.bool)
    mask[0, 7:] = False
    tokens = greedy(model, encoder, encoder_mask=mask, max_tokens=8)
    start = torch.zeros(4, 1, dtype=torch.int64)
    forced = torch.cat([start, tokens[:, :-1]], 1)
    best = model(encoder, forced, encoder_mask=mask).logits.argmax(-1)
    for row in range(4):
        ended = False
        for place, token in enumerate(tokens[row].tolist()):
            assert token == (0 if ended else best[row, place])
            ended |= token == EOS_ID


def test_greedy_fills_finished_rows_with_padding(model):
    model.eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        model.decoder.final_norm.weight.fill_(1.0)
        model.embedding.weight[0] = 1.0  # the start token, whose likeliest successor …
        model.embedding.weight[EOS_ID] = 2.0  # … is then EOS
    assert greedy(model, torch.full((2, 4), 5), max_tokens=6).tolist() == [[EOS_ID], [EOS_ID]]
