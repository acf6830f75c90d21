"""What plans say of an update, against the update of a whole model."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from megaswitch.config import from_toml
from megaswitch.layers.kernels import rehearse
from megaswitch.optim.build import build_optimizer, clip_gradients
from megaswitch.parallel.absent import absent_peers
from megaswitch.parallel.mesh import Mesh
from megaswitch.parallel.shard import declare_spec
from megaswitch.scale.hardware import load_hardware
from megaswitch.scale.recorder import Recorder, Work
from megaswitch.scale.sizes import parameters
from megaswitch.scale.times import Times
from megaswitch.scale.updates import update_work


def of_a_step(config, device):
    """Of all parameters together, as a run updates them."""
    recorder = Recorder({(0, 1): "dp"})
    item = mock.patch.object(FakeTensor, "item", create=True, return_value=1.0)
    with absent_peers(2, 0), rehearse(device), FakeTensorMode(), recorder, item:
        made = [
            declare_spec(nn.Parameter(torch.empty(p.shape)), p.spec)
            for p in parameters(config.model)
        ]
        optimizer = build_optimizer(made, config.optim)
        mesh = Mesh(0, 2, torch.device("cpu"), dist.group.WORLD)
        for _ in range(2):
            for p in made:
                p.grad = torch.empty_like(p)
            before = recorder.work
            clip_gradients(made, config.optim.clip_grad_norm, mesh)
            optimizer.step()
        return recorder.work - before


@pytest.mark.parametrize("preset", ["switch-tiny", "t5-small", "switch-base-8"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("extra", ["", 'name = "adamw"', 'expert_statistics = "joint"'])
def test_plans_count_what_an_update_does(preset, device, extra):
    config = from_toml(f'[model]\npreset = "{preset}"\n[optim]\n{extra}')
    times = Times(config, 1, (512, 114), replace(load_hardware("h100"), device=device))
    costs, planned = update_work(config, device), Work()
    for way, (numbers, pieces) in times._updated(times.held(0)).items():
        planned += Work(moved=numbers * costs[way].moved, operations=pieces * costs[way].operations)
    real = of_a_step(config, device)
    assert planned.moved == pytest.approx(real.moved, rel=0.1)
    assert planned.operations == pytest.approx(real.operations, rel=0.25)
