"""Transformer Engine and Triton where they are real; skipped without a CUDA device."""

import importlib.util
import inspect

import pytest
import torch

from megaswitch.config import load_config
from megaswitch.layers import te_backend, triton_kernels
from megaswitch.model.dispatch import Dispatch
from megaswitch.parallel.mesh import Mesh
from megaswitch.train.metrics import read_metrics
from megaswitch.train.trainer import Trainer
from tests import fake_te

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_te = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine"
)


@needs_te
@pytest.mark.parametrize("name", ["Linear", "GroupedLinear"])
def test_the_fake_has_the_signatures_of_the_real_one(name):
    te = te_backend.load()
    for method in ("__init__", "forward"):
        real = inspect.signature(getattr(getattr(te, name), method)).parameters
        fake = inspect.signature(getattr(getattr(fake_te, name), method)).parameters
        assert set(fake) - {"others"} <= set(real)


@needs_te
@pytest.mark.parametrize("recipe", ["none", "delayed", "current", "block"])
def test_te_trains_as_torch_does(run_options, tmp_path, recipe):
    curves = []
    for backend in ("torch", "te"):
        options = [f"--train.backend={backend}", "--train.precision=bf16", "--train.device=cuda"]
        options += [f"--train.fp8.recipe={recipe}"] if recipe != "none" else []
        run_dir = tmp_path / backend
        config = load_config(None, [*run_options, *options, f"--train.run_dir={run_dir}"])
        Trainer.build(config, Mesh.start("cuda")).fit()
        curves.append([m["loss"] for m in read_metrics(run_dir / "metrics.jsonl") if "loss" in m])
    assert curves[1] == pytest.approx(curves[0], rel=3e-2 if recipe == "none" else 6e-2)


@pytest.mark.skipif(triton_kernels.missing() is not None, reason="needs Triton")
def test_fused_dispatch_is_that_of_torch():
    generator = torch.Generator("cuda").manual_seed(0)
    expert = torch.randint(64, (65_536,), generator=generator, device="cuda")
    kept = torch.rand(65_536, generator=generator, device="cuda") > 0.1
    plain, fused = (Dispatch.by_expert(expert, kept, 64, fused=f) for f in (False, True))
    for name in ("order", "inverse", "ends"):
        assert torch.equal(getattr(plain, name), getattr(fused, name))
    x = torch.randn(65_536, 768, device="cuda", dtype=torch.bfloat16)
    gate = torch.rand(65_536, device="cuda")
    assert torch.equal(plain.gather(x), fused.gather(x))
    expected = (plain.restore(x).float() * gate[:, None]).bfloat16()
    assert torch.equal(fused.restore_times(x, gate), expected)
