"""Which optimizer is built, what decays, and clipping by the global norm."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megaswitch.log import UserError
from megaswitch.optim.adafactor import Adafactor
from megaswitch.optim.build import build_optimizer, clip_gradients, set_learning_rate
from megaswitch.parallel.shard import declare


def config(**changes):
    values = {
        "name": "adafactor",
        "learning_rate": 0.5,
        "weight_decay": 0.1,
        "beta1": 0.8,
        "beta2": 0.9,
        "epsilon": 1e-7,
        "decay_exponent": 0.7,
        "clip_threshold": 2.0,
        "epsilon1": 1e-20,
        "epsilon2": 1e-2,
        "factored_min_dim": 64,
        "scale_by_parameter": False,
        "expert_statistics": "joint",
    }
    return SimpleNamespace(**(values | changes))


AXES = {
    "embedding.weight": (None, None),
    "encoder.relative_bias.weight": (None, None),
    "encoder.block.0.norm.scale": (None,),
    "encoder.block.0.q.weight": ("tp", None),
    "encoder.block.1.wi": ("ep", None, None),
    "encoder.block.1.bias": ("ep", None),
}


def parameters():
    return {
        name: declare(
            nn.Parameter(torch.ones([2] * len(axes))), *axes, is_bias=name.endswith("bias.weight")
        )
        for name, axes in AXES.items()
    }


def test_adafactor_receives_every_number():
    named = parameters()
    optimizer = build_optimizer(named.values(), config())
    assert isinstance(optimizer, Adafactor)
    for group, decay in zip(optimizer.param_groups, (0.1, 0.0), strict=True):
        options = {key: value for key, value in group.items() if key != "params"}
        assert options == {
            "lr": 0.5,
            "weight_decay": decay,
            "decay_exponent": 0.7,
            "clip_threshold": 2.0,
            "epsilon1": 1e-20,
            "epsilon2": 1e-2,
            "factored_min_dim": 64,
            "scale_by_parameter": False,
            "expert_statistics": "joint",
        }


def test_adamw_is_fused_and_receives_every_number():
    optimizer = build_optimizer(parameters().values(), config(name="adamw"))
    assert type(optimizer) is torch.optim.AdamW
    for group in optimizer.param_groups:
        assert group["fused"] is True
        assert (group["lr"], group["betas"], group["eps"]) == (0.5, (0.8, 0.9), 1e-7)


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_only_matrices_decay(name):
    named = parameters()
    named["frozen"] = declare(nn.Parameter(torch.ones(2, 2), requires_grad=False), None, None)
    names = {id(p): key for key, p in named.items()}
    optimizer = build_optimizer(named.values(), config(name=name))
    groups = {
        group["weight_decay"]: [names[id(p)] for p in group["params"]]
        for group in optimizer.param_groups
    }
    assert groups == {
        0.1: ["embedding.weight", "encoder.block.0.q.weight", "encoder.block.1.wi"],
        0.0: ["encoder.relative_bias.weight", "encoder.block.0.norm.scale", "encoder.block.1.bias"],
    }


def test_empty_groups_are_left_out_and_an_empty_model_is_refused():
    named = parameters()
    only = [named["encoder.block.0.q.weight"]]
    assert len(build_optimizer(only, config()).param_groups) == 1
    with pytest.raises(UserError, match="every parameter is frozen"):
        build_optimizer([], config())


def test_set_learning_rate_reaches_all_groups():
    optimizer = build_optimizer(parameters().values(), config())
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def with_gradients(*values):
    pair = [nn.Parameter(torch.zeros(len(value))) for value in values]
    for p, value in zip(pair, values, strict=True):
        p.grad = torch.tensor(value)
    return [*pair, nn.Parameter(torch.zeros(3))]


@pytest.mark.parametrize(("max_norm", "factor"), [(None, 1.0), (26.0, 1.0), (13.0, 0.5)])
def test_clip_gradients(max_norm, factor):
    trained = with_gradients([3.0, 4.0], [12.0, 0.0], [0.0, 22.5166604984])
    norm = clip_gradients(iter(trained), max_norm)
    assert norm.item() == pytest.approx(26.0)
    assert trained[0].grad.tolist() == pytest.approx([3.0 * factor, 4.0 * factor])
    assert trained[1].grad.tolist() == pytest.approx([12.0 * factor, 0.0])
    assert trained[3].grad is None


def test_a_norm_that_is_not_finite_is_returned():
    assert clip_gradients(with_gradients([1.0, float("inf")]), None).isinf()
