"""The loss over the vocabulary against its definition, step by step under autograd."""

import pytest
import torch

from megaswitch.layers import vocab
from megaswitch.layers.vocab import token_losses

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
    assert vocab.rows_in_cache(torch.empty(10, 1 << 20, device="meta")) == 10
