"""The soft loss against the plain formula over all logits, and its gradient."""

import pytest
import torch

from megaswitch.layers.soft_targets import TopK, soft_losses, top_k, top_k_losses

B, L, V = 3, 5, 41


@pytest.fixture
def logits():
    draw = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(B, L, V, generator=draw, dtype=torch.float64) for _ in "st")
    mask = torch.rand(B, L, generator=draw) < 0.7
    return student.mul(3).requires_grad_(), teacher * 3, mask


def plain(student, teacher, mask, temperature):
    """The textbook: cross-entropy of two softmaxes."""
    q = torch.softmax(teacher / temperature, -1)
    losses = -(q * torch.log_softmax(student / temperature, -1)).sum(-1)
    entropies = -(q * q.log()).sum(-1)
    return losses[mask].sum(), entropies[mask].sum()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_loss_entropy_and_gradient_are_the_formula_s(logits, temperature):
    student, teacher, mask = logits
    found = soft_losses(student, teacher, mask, temperature=temperature)
    (gradient,) = torch.autograd.grad(3 * found.cross_entropy, student)
    loss, entropy = plain(student, teacher, mask, temperature)
    (expected,) = torch.autograd.grad(3 * loss, student)
    assert found.cross_entropy.item() == pytest.approx(loss.item(), rel=1e-13)
    assert found.entropy.item() == pytest.approx(entropy.item(), rel=1e-12)
    assert torch.allclose(gradient, expected, rtol=0, atol=1e-13)
    assert gradient[~mask].abs().max() == 0


def test_a_student_like_its_teacher_has_the_entropy_and_no_gradient(logits):
    _, teacher, mask = logits
    student = teacher.clone().requires_grad_()
    found = soft_losses(student, teacher, mask, temperature=1.7)
    assert found.cross_entropy.item() == pytest.approx(found.entropy.item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(found.cross_entropy, student)
    assert gradient.abs().max() < 1e-14


def coarse(student, teacher, mask, temperature, k):
    """The textbook over k tokens and one outcome for all others."""
    p, q = (torch.softmax(x / temperature, -1) for x in (student, teacher))
    tokens = q.topk(k, -1).indices
    pairs = [torch.cat([x.gather(-1, tokens), 1 - x.gather(-1, tokens).sum(-1, keepdim=True)], -1)
             for x in (p, q)]  # fmt: skip
    return -(pairs[1] * pairs[0].log()).sum(-1)[mask].sum()


@pytest.mark.parametrize(("k", "temperature"), [(1, 1.0), (7, 2.0), (V - 1, 1.0)])
def test_all_tokens_beyond_the_first_k_are_one_outcome(logits, k, temperature):
    student, teacher, mask = logits
    known = top_k(teacher, k, temperature=temperature, vocab_size=V)
    found = top_k_losses(student, known, mask, temperature=temperature, vocab_size=V)
    (gradient,) = torch.autograd.grad(found.cross_entropy, student)
    loss = coarse(student, teacher, mask, temperature, k)
    (expected,) = torch.autograd.grad(loss, student)
    assert found.cross_entropy.item() == pytest.approx(loss.item(), rel=1e-12)
    assert torch.allclose(gradient, expected, rtol=0, atol=1e-12)
    full = soft_losses(student, teacher, mask, temperature=temperature)
    assert found.cross_entropy <= full.cross_entropy


def test_with_all_tokens_it_is_the_full_loss(logits):
    student, teacher, mask = logits
    known = top_k(teacher, V, temperature=2.0, vocab_size=V)
    assert known.rest.abs().max() == 0
    found = top_k_losses(student, known, mask, temperature=2.0, vocab_size=V)
    full = soft_losses(student, teacher, mask, temperature=2.0)
    assert found.cross_entropy.item() == pytest.approx(full.cross_entropy.item(), rel=1e-12)
    assert found.entropy.item() == pytest.approx(full.entropy.item(), rel=1e-12)
    gradients = (torch.autograd.grad(x.cross_entropy, student)[0] for x in (found, full))
    assert torch.allclose(*gradients, rtol=0, atol=1e-13)


def test_a_student_like_what_is_known_has_no_gradient(logits):
    _, teacher, mask = logits
    known = top_k(teacher, 4, temperature=1.0, vocab_size=V)
    student = teacher.clone().requires_grad_()
    found = top_k_losses(student, known, mask, temperature=1.0, vocab_size=V)
    (gradient,) = torch.autograd.grad(found.cross_entropy, student)
    assert gradient.abs().max() < 1e-14
    assert found.cross_entropy.item() == pytest.approx(found.entropy.item(), rel=1e-12)


def test_extreme_logits_give_finite_numbers():
    student = torch.tensor([[[200.0, 0.0, -200.0, -300.0]]], requires_grad=True)
    teacher = torch.tensor([[[-300.0, 0.0, 300.0, 0.0]]])
    mask = torch.ones(1, 1, dtype=torch.bool)
    known = top_k(teacher, 2, temperature=1.0, vocab_size=4)
    for found in (
        soft_losses(student, teacher, mask, temperature=1.0),
        top_k_losses(student, known, mask, temperature=1.0, vocab_size=4),
    ):
        (gradient,) = torch.autograd.grad(found.cross_entropy, student)
        assert found.cross_entropy.item() == pytest.approx(400)
        assert gradient.isfinite().all()


def test_bf16_logits_are_summed_in_fp32(logits):
    student, teacher, mask = (x.detach() for x in logits)
    low = student.bfloat16().requires_grad_(), teacher.bfloat16()
    found = soft_losses(*low, mask, temperature=1.0)
    expected, _ = plain(low[0].double(), low[1].double(), mask, 1.0)
    assert found.cross_entropy.dtype == torch.float32
    assert found.cross_entropy.item() == pytest.approx(expected.item(), rel=1e-5)
    found.cross_entropy.backward()
    assert low[0].grad.dtype == torch.bfloat16


def test_what_was_kept_travels_to_another_device():
    known = TopK(torch.ones(1, 1, 2).long(), torch.ones(1, 1, 2), torch.ones(1, 1))
    assert known.to(torch.device("meta")).tokens.device.type == "meta"
