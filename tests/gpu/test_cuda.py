"""What only a CUDA device can show; skipped without one."""

import pytest
import torch

from megaswitch.config import load_config
from megaswitch.layers.linear import grouped_linear
from megaswitch.layers.noise import Noise
from megaswitch.metrics_file import read_metrics
from megaswitch.model.moe import SwitchFFN
from megaswitch.parallel.mesh import Mesh
from megaswitch.train.trainer import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[64, 64, 64, 64], [0, 200, 0, 16], [7, 1, 0, 33], [0, 0, 0, 0]])
def test_grouped_linear_equals_the_cpu(dtype, counts):
    generator = torch.Generator().manual_seed(0)
    rows = sum(counts) + 24  # the last 24 were dropped, and hold nothing that may matter
    x = torch.randn(rows, 64, generator=generator)
    x[sum(counts) :] = float("nan")
    weight = torch.randn(len(counts), 32, 64, generator=generator)
    grad = torch.randn(rows, 32, generator=generator)
    ends = torch.tensor(counts).cumsum(0).int()
    results = []
    for device in ("cpu", "cuda"):
        inputs = [t.to(device, dtype).requires_grad_() for t in (x, weight)]
        y = grouped_linear(*inputs, ends.to(device))
        y.backward(grad.to(device, dtype))
        results.append([t.detach().cpu().float() for t in (y, inputs[0].grad, inputs[1].grad)])
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    for on_cpu, on_cuda in zip(*results, strict=True):
        torch.testing.assert_close(on_cuda, on_cpu, rtol=tolerance, atol=tolerance * 8)


def test_noise_is_the_same_on_both_devices():
    samples = torch.tensor([0, 5, 2**40])
    on_cpu = Noise(7, 3, samples).uniform("site", (3, 10, 4))
    on_cuda = Noise(7, 3, samples.cuda()).uniform("site", (3, 10, 4))
    assert torch.equal(on_cuda.cpu(), on_cpu)


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_on_cuda_follows_one_on_the_cpu(run_options, tmp_path, optimizer, precision):
    curves = []
    for device in ("cpu", "cuda"):
        run_dir = tmp_path / device
        options = [f"--optim.name={optimizer}", "--optim.learning_rate=0.01"]
        options += [f"--train.precision={precision}", f"--train.device={device}"]
        config = load_config(None, [*run_options, *options, f"--train.run_dir={run_dir}"])
        Trainer.build(config, Mesh.start(device)).fit()
        curves.append([m["loss"] for m in read_metrics(run_dir / "metrics.jsonl") if "loss" in m])
    assert curves[1] == pytest.approx(curves[0], rel=1e-3 if precision == "fp32" else 3e-2)


def test_a_layer_with_a_capacity_is_replayed_from_a_graph():
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("torch's grouped GEMM is a loop here, which reads its sizes on the host")
    options = [
        *("--model.d_model=256", "--model.d_ff=1024", "--model.moe.num_experts=8"),
        "--model.moe.capacity_mode=group",
    ]
    layer = SwitchFFN(load_config(None, options).model, "encoder.1.ffn").cuda().train()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.05)
    mask = torch.ones(8, 128, dtype=torch.bool, device="cuda")
    noise = Noise(0, 0, torch.arange(8, device="cuda"))
    x = torch.randn(8, 128, 256, device="cuda", requires_grad=True)

    def step() -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            y, routing = layer(x, mask, 8, noise)
        loss = y.float().square().mean() + 0.01 * routing.aux_loss
        (x.grad,) = torch.autograd.grad(loss, x)
        return y

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    grad = x.grad
    for seed in range(3):  # other tokens, other experts, others that are dropped
        values = torch.randn(8, 128, 256, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            x.copy_(values)
        graph.replay()
        found = captured.clone(), grad.clone()
        torch.testing.assert_close(found[0], step())
        torch.testing.assert_close(found[1], x.grad)
