"""Emulated FP8 against plain loops: rounding, scales, and all three products of a linear map."""

import math
from fractions import Fraction

import pytest
import torch

from megaswitch.config import FP8Config
from megaswitch.layers.fp8 import (
    E4M3,
    E5M2,
    Blocks,
    Current,
    Delayed,
    Factor,
    FP8Kernel,
    largest_by_expert,
    rounded,
    scale_of,
)
from megaswitch.layers.kernels import Rows
from megaswitch.layers.linear import GroupedLinear, Linear
from megaswitch.layers.parameter import Init
from megaswitch.layers.torch_backend import TorchBackend
from megaswitch.parallel.mesh import Mesh

ALONE = Mesh(0, 1, torch.device("cpu"), None)
FORMATS = {E4M3: (4, 3, 448.0), E5M2: (5, 2, 57344.0)}


def plain_round(value: float, kind: torch.dtype) -> float:
    """The nearest number with so many bits of exponent and mantissa; ties go to even."""
    exponent_bits, mantissa_bits, largest = FORMATS[kind]
    if value == 0 or math.isnan(value):
        return value
    value = max(-largest, min(largest, value))
    least = 2 - 2 ** (exponent_bits - 1)  # of normal numbers
    exponent = max(math.frexp(value)[1] - 1, least)
    step = Fraction(2) ** (exponent - mantissa_bits)
    return float(round(Fraction(value) / step) * step)  # Python rounds ties to even


@pytest.mark.parametrize("kind", FORMATS)
def test_rounding_is_to_the_nearest_number_of_the_format(kind):
    generator = torch.Generator().manual_seed(0)
    powers = torch.randint(-6, 6, (4000,), generator=generator)
    values = torch.cat(
        [
            torch.randn(4000, generator=generator) * 10.0**powers,
            torch.tensor([0.0, -0.0, 1.0625, 1.1875, 448.0, 464.0, 1e9, -1e9, float("inf")]),
        ]
    )
    found = rounded(values, torch.ones(1), kind)
    assert found.tolist() == [plain_round(v, kind) for v in values.tolist()]


def test_every_number_of_a_format_stays_as_it_is():
    for kind in FORMATS:
        numbers = torch.arange(256, dtype=torch.uint8).view(kind).float()
        numbers = numbers[numbers.isfinite()]
        assert torch.equal(rounded(numbers, torch.ones(1), kind), numbers)


def test_nan_stays_nan_and_a_scale_of_zero_rounds_nothing():
    x = torch.tensor([float("nan"), 1.2345])
    assert rounded(x, torch.ones(1), E4M3)[0].isnan()
    assert torch.equal(rounded(x, torch.zeros(1), E4M3)[1], x[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scales_fill_the_range_and_the_type_is_kept(dtype):
    x = torch.tensor([[1e-3, -2e-3, 1.5e-3]], dtype=dtype)
    scale = scale_of(largest_by_expert(x, None), E4M3)
    found = rounded(x, scale, E4M3)
    assert found.dtype == dtype
    # Its largest number becomes the format's largest, and is kept up to the type's own rounding.
    error = 0 if dtype == torch.bfloat16 else 1e-7
    assert found[0, 1].item() == pytest.approx(x[0, 1].item(), rel=error)
    assert (found - x).abs().max() <= 2e-3 * 2**-4
    half = scale_of(largest_by_expert(x, None), E4M3, margin=1)
    assert torch.equal(half * 2, scale)


ROWS = Rows(torch.tensor([3, 3, 7], dtype=torch.int32), 0)  # the second expert has none


def test_magnitudes_of_experts_leave_out_what_is_no_row():
    x = torch.arange(20.0).view(10, 2) - 9.0
    x[7:] = float("nan")
    assert largest_by_expert(x, ROWS).tolist() == [9.0, 0.0, 4.0]
    weights = torch.stack([torch.eye(2) * -3, torch.eye(2), torch.zeros(2, 2)])
    assert largest_by_expert(weights, ROWS).tolist() == [3.0, 1.0, 0.0]
    assert largest_by_expert(x[:0], None).tolist() == [0.0]


def plain_scale(numbers: torch.Tensor, kind: torch.dtype, *, power: bool = False) -> float:
    largest = numbers.abs().max().item() if numbers.numel() else 0.0
    if largest == 0:
        return 0.0
    scale = torch.tensor(FORMATS[kind][2]) / torch.tensor(largest)
    return 2.0 ** math.floor(math.log2(scale.item())) if power else scale.item()


def plain_rounded(x: torch.Tensor, kind: torch.dtype, scale: float) -> torch.Tensor:
    if scale == 0:
        return x
    values = [plain_round(v, kind) for v in (x.double() * scale).flatten().tolist()]
    return torch.tensor(values, dtype=torch.float64).view(x.shape) / scale


def plain_products(x, weight, grad, kinds, scales):
    """y, x's and weight's gradient of one matrix, its factors rounded with these scales."""
    x, weight, grad = (
        plain_rounded(t, kind, scale)
        for t, kind, scale in zip((x, weight, grad), kinds, scales, strict=True)
    )
    return x @ weight.t(), grad @ weight, grad.t() @ x


def tensors(*shape_of_weight: int, rows: int = 10, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(1)
    *_, outputs, inputs = shape_of_weight
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    return make(rows, inputs), make(*shape_of_weight) * 0.1, make(rows, outputs) * 1e-4


@pytest.mark.parametrize("recipe", ["current", "delayed"])
def test_a_dense_map_multiplies_rounded_factors(recipe):
    x, weight, grad = tensors(6, 5)
    layer = Linear(5, 6, shard="column", init=Init("constant", 0.0)).double()
    layer.weight.data = weight
    fp8 = FP8Config(recipe=recipe, **({"amax_history": 4} if recipe == "delayed" else {}))
    backend = TorchBackend(fp8, ALONE)
    backend.attach({"map": layer})
    kinds = (E4M3, E4M3, E5M2)
    scales = [plain_scale(t, k) for t, k in zip((x, weight, grad), kinds, strict=True)]
    for step in range(2):
        layer.weight.grad = None
        inputs = x.clone().requires_grad_()
        y = layer(inputs)
        y.backward(grad)
        # Delayed scaling knows nothing in the first step, and then the same magnitudes.
        used = [0.0] * 3 if recipe == "delayed" and step == 0 else scales
        expected = plain_products(x, weight, grad, kinds, used)
        for found, plain in zip((y, inputs.grad, layer.weight.grad), expected, strict=True):
            torch.testing.assert_close(found, plain, rtol=1e-6, atol=0)
        backend.finish_step()


def test_a_bad_step_leaves_nothing_in_the_history():
    x, weight, grad = tensors(6, 5)
    layer = Linear(5, 6, shard="column", init=Init("constant", 0.0)).double()
    layer.weight.data = weight
    backend = TorchBackend(FP8Config(recipe="delayed", amax_history=4), ALONE)
    backend.attach({"map": layer})

    def step(rows):
        y = layer(rows.clone().requires_grad_())
        y.backward(grad)
        return y.detach()

    step(x)
    backend.finish_step()
    history = backend.history()["map"].clone()
    good = step(x)
    backend.finish_step(keep=False)
    step(x * float("nan"))
    backend.finish_step(keep=False)
    assert torch.equal(backend.history()["map"], history)
    assert torch.equal(step(x), good)


def test_each_expert_has_scales_of_its_own():
    x, weight, grad = tensors(3, 4, 5)
    x[:3] *= 100
    x[7:], grad[7:] = float("nan"), float("nan")
    layer = GroupedLinear(3, 5, 4, shard="column", init=Init("constant", 0.0)).double()
    layer.weight.data = weight
    TorchBackend(FP8Config(recipe="current"), ALONE).attach({"map": layer})
    inputs = x.clone().requires_grad_()
    y = layer(inputs, ROWS.ends)
    y.backward(grad)
    kinds = (E4M3, E4M3, E5M2)
    for expert, rows in enumerate((slice(0, 3), slice(3, 3), slice(3, 7))):
        parts = (x[rows], weight[expert], grad[rows])
        scales = [plain_scale(t, k) for t, k in zip(parts, kinds, strict=True)]
        expected = plain_products(*parts, kinds, scales)
        found = (y[rows], inputs.grad[rows], layer.weight.grad[expert])
        for mine, plain in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, plain, rtol=1e-6, atol=1e-12)
    assert not y[7:].any()
    assert not inputs.grad[7:].any()


@pytest.mark.parametrize(("size", "square"), [(4, True), (4, False)])
def test_blocks_have_scales_that_are_powers_of_two(size, square):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(6, 10, generator=generator) * 10.0 ** torch.arange(10)
    x[0, :4] = 0.0
    blocks = Blocks(size, square=square)
    for factor in Factor:
        found = blocks.scales(factor, x, None, record=True)
        height = size if square and factor == Factor.WEIGHT else 1
        for row in range(6):
            for column in range(10):
                top, left = row // height * height, column // size * size
                block = x[top : top + height, left : left + size]
                assert found[row, column].item() == plain_scale(block, E4M3, power=True)
        assert blocks.format(factor) == E4M3


def test_delayed_scales_are_of_the_history_and_forget_the_oldest():
    scaling = Delayed(torch.zeros(1, 3, 3), margin=0)
    seen = []
    for largest in (8.0, 2.0, 1.0, 0.5):
        x = torch.tensor([largest, -0.1])
        seen.append(scaling.scales(Factor.INPUT, x, None, record=True).item())
        # What evaluation sees is not remembered.
        scaling.scales(Factor.INPUT, torch.tensor([1e6]), None, record=False)
        scaling.turn()
    assert seen == [0.0, 448 / 8, 448 / 8, 448 / 2]
    scaling.scales(Factor.INPUT, torch.tensor([float("inf"), 3.0]), None, record=True)
    scaling.turn()
    assert scaling.amax[0, Factor.INPUT].tolist() == [0.0, 0.5, 0.0]


def test_recomputing_and_micro_batches_change_no_history():
    x, weight, grad = tensors(6, 5)
    histories = []
    for parts in (1, 2):
        layer = Linear(5, 6, shard="column", init=Init("constant", 0.0)).double()
        layer.weight.data = weight
        backend = TorchBackend(FP8Config(recipe="delayed", amax_history=4), ALONE)
        backend.attach({"map": layer})
        for piece, g in zip(x.chunk(parts), grad.chunk(parts), strict=True):
            backend.recompute(layer, piece.clone().requires_grad_()).backward(g)
        backend.finish_step()
        histories.append(backend.history()["map"])
    assert torch.equal(*histories)
    assert histories[0][0, :, -1].tolist() == pytest.approx(
        [t.abs().max().item() for t in (x, weight, grad)]
    )


def test_a_kernel_works_in_autocasts_type():
    seen = []

    def product(x, weight):
        seen.append((x.dtype, weight.dtype))
        return x @ weight.t()

    with torch.autocast("cpu", torch.bfloat16):
        y = FP8Kernel(Current())(torch.randn(3, 4), torch.randn(2, 4), product)
    assert seen == [(torch.bfloat16, torch.bfloat16)]
    assert y.dtype == torch.bfloat16
