"""With a capacity, nothing from router to combine is read by the host: a CUDA graph can hold it."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megaswitch.config import load_config
from megaswitch.layers.kernels import rehearse
from megaswitch.layers.noise import Noise
from megaswitch.model.moe import SwitchFFN
from tests.unit.model.router_checks import tiny_model

aten = torch.ops.aten
# What waits for the device, has a shape that values decide, or takes values from the host.
READS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten.unique_consecutive.default,
    aten._unique2.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,
    aten.lift_fresh.default,  # torch.tensor([...])
}


class Watch(TorchDispatchMode):
    """Keeps what runs, with the shapes of what comes out, and what of it the host had a hand in."""

    def __init__(self):
        super().__init__()
        self.trace, self.reads = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        results = result if isinstance(result, (tuple, list)) else [result]
        shapes = [tuple(t.shape) for t in results if isinstance(t, torch.Tensor)]
        self.trace.append((str(function), shapes))
        indices = args[1] if function in (aten.index.Tensor, aten.index_put_.default) else ()
        by_mask = any(t is not None and t.dtype == torch.bool for t in indices)
        if function in READS or by_mask:
            self.reads.append(str(function))
        return result


def layer(router, exploration, activation="relu"):
    options = {"num_experts": 4, "router": router, "capacity_mode": "group", "min_capacity": 1}
    if exploration:
        options["exploration"] = exploration
    flags = [f"--model.moe.{k}={v}" for k, v in options.items()]
    sizes = ["--model.d_model=16", "--model.d_ff=32", f"--model.activation={activation}"]
    model = load_config(None, [*flags, *sizes, "--model.dropout=0.1"]).model
    made = SwitchFFN(model, "encoder.1.ffn")
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    return made.train()


def watch(made, x):
    """Forward and backward pass of x [B, L, d], the way a GPU takes; and the routing."""
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    noise = Noise(0, 0, torch.arange(len(x)))
    x = x.requires_grad_()
    made.zero_grad()
    with rehearse("cuda"), Watch() as seen:
        y, routing = made(x, mask, 2, noise)
        (y.sum() + routing.aux_loss + routing.z_loss).backward()
    return seen, routing


KINDS = [
    ("switch", "jitter", "relu"),
    ("switch", "sample", "gated-gelu"),
    ("ntlb", None, "relu"),
    ("top-2", None, "relu"),
    ("expert-choice", None, "relu"),
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(filter(None, kind)))
def test_no_value_is_read_by_the_host_and_no_shape_depends_on_one(kind):
    made = layer(*kind)
    generator = torch.Generator().manual_seed(0)
    spread, routing = watch(made, torch.randn(8, 12, 16, generator=generator))
    assert spread.reads == []
    # All tokens alike: a few experts are asked by all, and most tokens are dropped.
    crowded, other = watch(made, torch.ones(8, 12, 16))
    assert crowded.reads == []
    assert spread.trace == crowded.trace
    if kind[0] == "switch":
        assert routing.kept.sum() > other.kept.sum()


def test_of_a_whole_model_nothing_is_read_either():
    moe = {"jitter": 0.1, "capacity_mode": "group"}
    model = tiny_model(d_model=8, d_ff=16, dropout=0.1, moe=moe).float().train()
    tokens = torch.arange(20).view(4, 5) % 19
    noise = Noise(0, 0, torch.arange(4))
    with rehearse("cuda"), Watch() as seen:
        output = model(tokens, tokens, noise=noise)
        loss = output.logits.logsumexp(-1).sum() + output.aux_loss + output.z_loss
        loss.backward()
    assert seen.reads == []


def read_a_value(x):
    return x.sum().item()


def index_by_mask(x):
    return x[x > 0]


def make_of_host_values(x):
    return x + torch.tensor([1.0, 2.0])


@pytest.mark.parametrize("planted", [read_a_value, index_by_mask, make_of_host_values])
def test_what_is_planted_is_seen(planted):
    with Watch() as seen:
        planted(torch.ones(2))
    assert len(seen.reads) == 1
