"""Linear maps; above all `grouped_linear` against one plain matrix product an expert."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from megaswitch.layers import linear
from megaswitch.layers.linear import GroupedLinear, Linear, grouped_linear
from megaswitch.layers.parameter import Init
from megaswitch.parallel.shard import spec_of

COUNTS = [
    [3, 1, 4],
    [0, 5, 0],  # empty experts at both ends
    [0, 0, 0],
    [7, 0, 0],
    [1, 1, 1],
    [6],
]


def reference(x, weight, counts):
    """Each row times its expert's matrix, through a mask per expert."""
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    owner = F.pad(owner, (0, len(x) - len(owner)), value=-1)
    return sum((x * (owner == e)[:, None]) @ matrix.T for e, matrix in enumerate(weight.unbind(0)))


def operands(counts, extra, inputs=5, outputs=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = {"dtype": torch.float64, "generator": generator}
    x = torch.randn(sum(counts) + extra, inputs, **made).requires_grad_()
    weight = torch.randn(len(counts), outputs, inputs, **made).requires_grad_()
    return x, weight, torch.tensor(counts).cumsum(0).int()


def assert_equal_to_reference(counts, extra, seed=0):
    x, weight, ends = operands(counts, extra, seed=seed)
    grad = torch.randn(len(x), 4, dtype=torch.float64)
    results = []
    for y in (grouped_linear(x, weight, ends), reference(x, weight, counts)):
        results.append([y, *torch.autograd.grad(y, (x, weight), grad)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("counts", COUNTS)
def test_grouped_linear_equals_the_loop(counts, extra):
    assert_equal_to_reference(counts, extra)


@settings(max_examples=60, deadline=None, database=None)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=6), st.integers(0, 5), st.integers(0, 2**31)
)
def test_grouped_linear_equals_the_loop_for_any_counts(counts, extra, seed):
    assert_equal_to_reference(counts, extra, seed)


@pytest.mark.parametrize("counts", COUNTS)
def test_gradcheck(counts):
    x, weight, ends = operands(counts, 2)
    assert torch.autograd.gradcheck(lambda x, w: grouped_linear(x, w, ends), (x, weight))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_rows_past_the_last_offset_are_zero_whatever_they_hold(poison):
    x, weight, ends = operands([2, 0, 1], 3)
    clean = torch.autograd.grad(grouped_linear(x, weight, ends)[:3].sum(), (x, weight))
    with torch.no_grad():
        x[3:] = poison
    y = grouped_linear(x, weight, ends)
    grad = torch.ones_like(y)
    grad[3:] = poison
    x_grad, weight_grad = torch.autograd.grad(y, (x, weight), grad)
    assert y[3:].eq(0).all()
    assert x_grad[3:].eq(0).all()
    assert torch.equal(x_grad, clean[0])
    assert torch.equal(weight_grad, clean[1])


class _PoisonOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, end):
        y[end:] = float("nan")
        return y

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _PoisonGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, end):
        ctx.end = end
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad[ctx.end :] = float("nan")
        return grad, None


def test_kernel_branch_hides_what_the_kernel_leaves_uninitialised(monkeypatch):
    # The branch that runs on CUDA, with a kernel that fills with NaN what the real one leaves open.
    kernel = F.grouped_mm

    def poisoned(x, weight, *, offs):
        end = int(offs[-1])
        return _PoisonOutput.apply(kernel(_PoisonGradient.apply(x, end), weight, offs=offs), end)

    monkeypatch.setattr(F, "grouped_mm", poisoned)
    counts = [3, 0, 2]
    x, weight, ends = operands(counts, 3, inputs=8, outputs=4)
    x, weight = (t.detach().float().requires_grad_() for t in (x, weight))
    grad = torch.randn(8, 4)
    results = []
    for y in (linear._grouped_mm(x, weight, ends), reference(x, weight, counts)):
        results.append([y, *torch.autograd.grad(y, (x, weight), grad)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_experts_without_rows_get_zero_gradients():
    x, weight, ends = operands([0, 3, 0], 1)
    grouped_linear(x, weight, ends).sum().backward()
    assert weight.grad[[0, 2]].eq(0).all()
    assert weight.grad[1].ne(0).all()


@pytest.mark.parametrize("needs", ["x", "weight"])
def test_gradient_of_one_operand_alone(needs):
    x, weight, ends = operands([2, 3], 1)
    both = torch.autograd.grad(grouped_linear(x, weight, ends).sum(), (x, weight))
    frozen = weight if needs == "x" else x
    frozen.requires_grad_(False)
    grouped_linear(x, weight, ends).sum().backward()
    assert frozen.grad is None
    asked, expected = (x, both[0]) if needs == "x" else (weight, both[1])
    assert torch.equal(asked.grad, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtype_follows_x(dtype):
    x, weight, ends = operands([2, 3], 1)
    y = grouped_linear(x.to(dtype), weight.to(dtype), ends)
    assert y.dtype == dtype
    tolerance = {torch.bfloat16: 0.1, torch.float32: 1e-5, torch.float64: 0}[dtype]
    expected = reference(x, weight, [2, 3])
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance or 1e-12)


def test_autocast_computes_in_bf16_and_keeps_the_gradients_dtype():
    x, weight, ends = operands([2, 3], 1)
    x, weight = (t.detach().float().requires_grad_() for t in (x, weight))
    with torch.autocast("cpu", torch.bfloat16):
        y = grouped_linear(x, weight, ends)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, grouped_linear(x.bfloat16(), weight.bfloat16(), ends))
    y.sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32


def test_expanded_and_strided_gradients_are_accepted():
    x, weight, ends = operands([2, 3], 0)
    expanded = torch.autograd.grad(grouped_linear(x, weight, ends).sum(), (x, weight))
    strided = torch.ones(4, 5, dtype=torch.float64).T
    for grads in zip(
        expanded,
        torch.autograd.grad(grouped_linear(x, weight, ends), (x, weight), strided),
        strict=True,
    ):
        assert torch.equal(*grads)


@pytest.mark.parametrize(
    ("shard", "dense", "grouped"),
    [("column", ("tp", None), ("ep", "tp", None)), ("row", (None, "tp"), ("ep", None, "tp"))],
)
def test_modules_declare_their_slices(shard, dense, grouped):
    one = Linear(3, 5, shard=shard, init=Init("constant", 1.0))
    many = GroupedLinear(2, 3, 5, shard=shard, init=Init("constant", 1.0))
    assert spec_of(one.weight).axes == dense
    assert spec_of(many.weight).axes == grouped
    assert one.weight.shape == (5, 3)
    assert many.weight.shape == (2, 5, 3)


def test_modules_multiply_by_the_transpose():
    one = Linear(2, 3, shard="row", init=Init("constant", 1.0))
    many = GroupedLinear(2, 2, 3, shard="row", init=Init("constant", 1.0))
    matrix = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    with torch.no_grad():
        one.weight.copy_(matrix)
        many.weight[0], many.weight[1] = matrix, -matrix
    x = torch.tensor([[1.0, 10.0], [1.0, 10.0]])
    assert one(x).tolist() == [[21.0, 43.0, 65.0]] * 2
    ends = torch.tensor([1, 2], dtype=torch.int32)
    assert many(x, ends).tolist() == [[21.0, 43.0, 65.0], [-21.0, -43.0, -65.0]]
