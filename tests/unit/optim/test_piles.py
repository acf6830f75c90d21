"""Parameters that are updated together get the update, to the bit, that each would get alone."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from megaswitch.optim import native_adafactor
from megaswitch.optim import piles as piles_module
from megaswitch.optim.adafactor import Adafactor
from megaswitch.optim.piles import piles
from megaswitch.parallel.shard import declare


@pytest.fixture(autouse=True)
def _by_torch(monkeypatch):
    """As on a GPU: on a CPU the core updates factored parameters where they lie."""
    monkeypatch.setattr(native_adafactor, "suits", lambda *_: False)


SHAPES = [((131, 140), False), ((140, 131), False), ((7, 9), False), ((11,), False), ((), False),
          ((3, 130, 129), True), ((3, 7, 5), True), ((4, 6), True)]  # fmt: skip


def model(dtype=torch.float32):
    """Three parameters of each shape; one more that is as large as a stack of experts."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape, expert in [*SHAPES * 3, ((3, 7, 5), False)]:
        values = torch.randn(shape, generator=generator).to(dtype)
        axes = ["ep" if expert and dim == 0 else None for dim in range(len(shape))]
        made.append(declare(nn.Parameter(values), *axes))
    return made


def train(parameters, grad_dtype=None, **options):
    """Three steps of two groups; from time to time a parameter has no gradient."""
    groups = [{"params": parameters[::2], "weight_decay": 0.1}, {"params": parameters[1::2]}]
    optimizer = Adafactor(groups, lr=0.02, **options)
    generator = torch.Generator().manual_seed(1)
    for step in range(3):
        for index, p in enumerate(parameters):
            gradient = torch.randn(p.shape, generator=generator) * 3.0**step
            p.grad = gradient.to(p.dtype)
            if step == 0 and index % 5 == 0:
                p.grad = None
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mode", ["per-expert", "joint"])
@pytest.mark.parametrize("chunk_bytes", [100_000, 8 << 20])
def test_together_is_alone_to_the_bit(dtype, mode, chunk_bytes, monkeypatch):
    monkeypatch.setattr("megaswitch.optim.adafactor_math._SCRATCH_BYTES_CPU", chunk_bytes)
    together, alone = model(dtype), model(dtype)
    ours = train(together, expert_statistics=mode)
    monkeypatch.setattr(piles_module, "_PILE_BYTES_CPU", 0)
    theirs = train(alone, expert_statistics=mode)
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one, other)
        assert ours.state[one].keys() == theirs.state[other].keys()
        for name, value in ours.state[one].items():
            assert torch.equal(value, theirs.state[other][name])


def made(parameters, **options):
    optimizer = Adafactor(parameters, lr=0.1, **options)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    group = optimizer.param_groups[0]
    return piles((p, group, optimizer.state_of(p, group)) for p in parameters)


def test_what_is_alike_is_put_together(monkeypatch):
    monkeypatch.setattr(piles_module, "_PILE_BYTES_CPU", 1 << 20)
    found = made(model())
    assert sorted(len(p.parameters) for p in found) == [1] + [3] * len(SHAPES)
    assert all(len({p.shape for p in pile.parameters}) == 1 for pile in found)


def test_joint_experts_are_a_pile_of_their_own():
    found = made(model(), expert_statistics="joint")
    assert all(pile.joint == pile.is_expert for pile in found)
    assert all(len(pile.parameters) == 1 for pile in found if pile.joint)


def test_what_is_large_is_updated_where_it_lies(monkeypatch):
    monkeypatch.setattr(piles_module, "_PILE_BYTES_CPU", 2 * 4 * 131 * 140)
    found = made([p for p in model() if p.shape == (131, 140)])
    assert [len(p.parameters) for p in found] == [2, 1]
    one = found[1].slices()
    assert one.parameter.data_ptr() == found[1].parameters[0].data_ptr()
    assert one.row.data_ptr() == found[1].states[0]["row"].data_ptr()


def test_a_pile_takes_as_many_operations_as_one_parameter():
    class Operations(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = Counter()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen[str(func.overloadpacket)] += 1
            return func(*args, **(kwargs or {}))

    def operations(number):
        parameters = [p for p in model() * number if p.shape == (131, 140)][:number]
        optimizer = Adafactor([nn.Parameter(p.detach()) for p in parameters], lr=0.1)
        for p in optimizer.param_groups[0]["params"]:
            declare(p, None, None)
            p.grad = torch.ones_like(p)
        with Operations() as counted:
            optimizer.step()
        own = {"aten.stack", "aten.unbind", "aten.view", "aten._foreach_copy_", "aten.select",
               "aten.zeros", "aten._local_scalar_dense", "aten.promote_types"}  # fmt: skip
        return {name: n for name, n in counted.seen.items() if name not in own}

    assert operations(5) == operations(1)
    assert operations(1)["aten.addcmul_"] == 1
