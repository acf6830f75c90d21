"""The loss over the vocabulary against its definition, step by step under autograd."""

from typing import Any

import pytest
import torch

from megaswitch.config import load_config
from megaswitch.layers import vocab
from megaswitch.layers.noise import Noise
from megaswitch.layers.vocab import token_losses
from megaswitch.parallel.mesh import Mesh
from megaswitch.train.objectives import BatchSize, MicroBatch
from megaswitch.train.parts import build_parts
from megaswitch.train.runner import Runner
from tests.distributed.equality import batch

VOCAB = 13


def operands(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, VOCAB, dtype=torch.float64, generator=generator).mul_(3).to(dtype)
    targets = torch.randint(VOCAB, (3, 5), generator=generator)
    mask = torch.rand(3, 5, generator=generator) > 0.3
    return logits.requires_grad_(), targets, mask


def reference(logits, targets, mask):
    """Cross-entropy and Σ log²Z."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_z = wide.logsumexp(-1)
    chosen = wide.gather(-1, targets[..., None])[..., 0]
    return ((log_z - chosen) * mask).sum(), (log_z.square() * mask).sum()


@pytest.fixture(params=[1, 4, 15, 100], ids=lambda rows: f"{rows} rows at a time")
def _rows_at_a_time(request, monkeypatch):
    monkeypatch.setattr(vocab, "rows_in_cache", lambda logits: request.param)


@pytest.mark.usefixtures("_rows_at_a_time")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_losses_and_gradients_are_those_of_the_definition(dtype):
    results = []
    for function in (token_losses, reference):
        logits, targets, mask = operands(dtype)
        sums = function(logits, targets, mask)
        if function is token_losses:
            sums = (sums.cross_entropy, sums.log_z_squared)
        (sums[0] + 0.1 * sums[1]).backward()
        results.append((*sums, logits.grad))
        assert logits.grad.dtype == dtype
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_gradcheck():
    logits, targets, mask = operands()

    def losses(logits):
        sums = token_losses(logits, targets, mask)
        return sums.cross_entropy, sums.log_z_squared

    assert torch.autograd.gradcheck(losses, (logits,))


def test_masked_rows_get_no_gradient():
    logits, targets, mask = operands()
    token_losses(logits, targets, mask).cross_entropy.backward()
    assert logits.grad[~mask].eq(0).all()
    assert logits.grad[mask].ne(0).all()


def test_counts():
    logits, targets, mask = operands()
    sums = token_losses(logits, targets, mask)
    assert sums.tokens == mask.sum()
    assert sums.correct == ((logits.argmax(-1) == targets) & mask).sum()
    assert token_losses(logits, logits.argmax(-1), mask).correct == mask.sum()


def test_a_cpu_takes_about_a_megabyte_and_never_less_than_a_row():
    assert vocab.rows_in_cache(torch.empty(10, 32768)) == 8
    assert vocab.rows_in_cache(torch.empty(10, 1 << 20)) == 1
    assert vocab.rows_in_cache(torch.empty(10, 1 << 20, device="meta")) == 64  # of 256 megabytes


@pytest.mark.parametrize("rows", [1, 4, 15, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_logits_that_the_loss_makes_give_the_same(rows, dtype, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 5, 8, generator=generator, dtype=torch.float64).to(dtype)
    head = vocab.Embedding(VOCAB, 8)
    head.weight.data = torch.randn(VOCAB, 8, generator=generator, dtype=torch.float64).to(dtype)
    _, targets, mask = operands()
    results, made = [], []
    scores = vocab._scores_of
    monkeypatch.setattr(vocab, "_scores_of", lambda x, *a: made.append(len(x)) or scores(x, *a))
    for lazy in (True, False):
        head.weight.grad, x = None, hidden.clone().requires_grad_()
        logits = vocab.LazyLogits.of(x, head, rows) if lazy else vocab.tied_logits(x, head)
        sums = token_losses(logits, targets, mask)
        (sums.cross_entropy + 0.1 * sums.log_z_squared).backward()
        numbers = (sums.cross_entropy, sums.log_z_squared, sums.correct, sums.by_row)
        results.append((*numbers, x.grad, head.weight.grad))
        if lazy:
            assert max(made) == min(rows, 15)
    bound = 3e-2 if dtype == torch.bfloat16 else 1e-5
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=bound, atol=bound)


def test_a_model_whose_loss_makes_its_logits_has_the_same_gradients(run_options):
    gradients = []
    for more in ([], ["--train.loss_tokens=7"]):
        config = load_config(None, [*run_options, *more])
        mesh = Mesh(0, 1, torch.device("cpu"), None)
        parts = build_parts(config, mesh)
        parts.initialize(0)
        parts.train()
        micro = MicroBatch.of(batch(range(4), (64, 20)), mesh.device, Noise(0, 0, torch.arange(4)))
        outputs: list[Any] = []
        record = lambda output, *_, kept=outputs: kept.append(output)  # noqa: E731
        Runner(config, mesh, parts).backward([micro], BatchSize(4, 80), record)
        assert [output.logits is None for output in outputs] == [bool(more)]
        gradients.append({name: w.parameter.grad for name, w in parts.weights.items()})
        parts.train(False)
        with torch.no_grad():
            output = parts.models[0](micro.batch.encoder_tokens, micro.batch.decoder_tokens)
        assert output.logits is not None
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)
