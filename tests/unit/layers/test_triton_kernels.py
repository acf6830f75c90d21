"""Triton's kernels against plain torch, under its interpreter where there is no GPU."""

from collections.abc import Iterator

import pytest
import torch

from megaswitch.config import load_config
from megaswitch.layers import triton_kernels
from megaswitch.layers.backend import check_dispatch
from megaswitch.layers.noise import Noise
from megaswitch.log import UserError
from megaswitch.model.dispatch import Dispatch
from megaswitch.model.moe import SwitchFFN

triton = pytest.importorskip("triton", reason="CUDA builds of torch bring Triton")


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # whose interpreter conftest.py sets


@pytest.fixture(autouse=True)
def _on_the_device() -> Iterator[None]:
    with torch.device(DEVICE):
        yield


@pytest.mark.parametrize("tokens", [1, 127, 300])
@pytest.mark.parametrize("experts", [1, 5, 64])
def test_sorting_is_that_of_dispatch(tokens, experts):
    generator = torch.Generator(DEVICE).manual_seed(tokens)
    expert = torch.randint(experts, (tokens,), generator=generator)
    kept = torch.rand(tokens, generator=generator) > 0.2
    if experts == 5:
        expert[:] = 3  # all to one
    plain = Dispatch.by_expert(expert, kept, experts)
    key = torch.where(kept, expert, experts)
    order, inverse, ends = triton_kernels.sort_by_expert(key, experts)
    assert torch.equal(order, plain.order)
    assert torch.equal(inverse, plain.inverse)
    assert torch.equal(ends, plain.ends)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 40])
def test_rows_and_gradients_are_those_of_plain_indexing(dtype, width):
    generator = torch.Generator(DEVICE).manual_seed(0)
    order = torch.randperm(17, generator=generator)
    inverse = torch.argsort(order)
    x, grad = (torch.randn(17, width, generator=generator).to(dtype) for _ in range(2))
    weight = torch.rand(17, generator=generator)
    weight[::5] = 0.0

    def run(fused: bool):
        inputs, gates = x.clone().requires_grad_(), weight.clone().requires_grad_()
        if fused:
            rows = triton_kernels.permute_rows(inputs, order, inverse)
            y = triton_kernels.restore_times_gate(rows * 2, gates, order, inverse)
        else:
            rows = inputs[order]
            y = ((rows * 2)[inverse].float() * gates[:, None]).to(dtype)
        y.backward(grad)
        return rows.detach(), y.detach(), inputs.grad, gates.grad

    bound = 1e-6 if dtype == torch.float32 else 2e-2
    for fused, plain in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(fused, plain, rtol=bound, atol=bound)


def test_what_is_missing_is_said(monkeypatch):
    assert triton_kernels.missing() is None
    monkeypatch.setattr(triton_kernels, "triton", None)
    assert "pip install triton" in triton_kernels.missing()


@pytest.mark.parametrize("mode", ["group", "dropless"])
def test_a_switch_layer_with_fused_dispatch_is_the_same(mode):
    options = ["d_model=16", "d_ff=32", "moe.num_experts=4", "moe.group_size=64"]
    options += [f"moe.capacity_mode={mode}"]
    keys = [*(f"--model.{o}" for o in options), "--data.encoder_length=32"]
    config = load_config(None, keys).model
    layer = SwitchFFN(config, "ffn")
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, 0.0, 0.3)
    x = torch.randn(4, 32, 16)
    mask = torch.arange(32).expand(4, 32) < 30
    results = []
    for fused in (False, True):
        layer.fused = fused
        layer.zero_grad()
        inputs = x.clone().requires_grad_()
        y, routing = layer(inputs, mask, 2, Noise(0, 0, torch.arange(4)))
        y.square().sum().backward()
        assert mode == "dropless" or not routing.kept[routing.expert >= 0].all()
        results.append([y.detach(), inputs.grad, *(p.grad.clone() for p in layer.parameters())])
    for plain, found in zip(*results, strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)


def test_where_there_is_no_gpu_a_run_does_not_start():
    with pytest.raises(UserError, match=r"dispatch='triton' cannot run here: it needs a CUDA"):
        check_dispatch("triton", "cpu")
    check_dispatch("torch", "cpu")
