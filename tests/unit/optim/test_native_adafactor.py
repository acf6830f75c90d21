"""The core's update of Adafactor: torch's, for any shape and number of threads."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from megaswitch import native
from megaswitch.optim import native_adafactor
from megaswitch.optim.adafactor import Adafactor
from megaswitch.parallel.shard import declare

NUMBERS = {
    "learning_rate": 0.01,
    "beta2": 0.5,
    "clip_threshold": 1.0,
    "epsilon1": 1e-30,
    "epsilon2": 1e-3,
    "keep": 1.0,
    "scale_by_parameter": True,
}


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def train(shape, dtype, steps=4, scale=3.0, **options):
    """A stack of experts, and what was remembered of it."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    weight = declare(nn.Parameter(values), "ep", None, None)
    optimizer = Adafactor([weight], lr=0.02, factored_min_dim=1, **options)
    for step in range(steps):
        gradient = torch.randn(shape, generator=generator, dtype=torch.float64) * scale**step
        weight.grad = (gradient * torch.arange(1, shape[1] + 1)[:, None]).to(dtype)
        optimizer.step()
    return weight.detach(), optimizer.state[weight]


SHAPES = [(1, 1, 1), (2, 3, 15), (3, 64, 16), (2, 65, 33), (1, 5000, 40), (5, 7, 1030)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.3}, {"scale_by_parameter": False}])
def test_the_core_does_what_torch_does(shape, dtype, options, monkeypatch):
    weight, state = train(shape, dtype, **options)
    with monkeypatch.context() as patch:
        patch.setattr(native_adafactor, "suits", lambda *_: False)
        want, wanted = train(shape, dtype, **options)
    bound = 2e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(weight, want, rtol=bound, atol=bound)
    for name in ("row", "column", "step"):
        torch.testing.assert_close(state[name], wanted[name], rtol=bound, atol=0.0)


@pytest.mark.parametrize("shape", [(1, 3000, 100), (2, 3000, 100), (7, 300, 100)])
def test_threads_change_nothing(shape, threads):
    threads(1)
    weight, state = train(shape, torch.float32)
    for number in (2, 5):
        threads(number)
        other, same = train(shape, torch.float32)
        assert torch.equal(weight, other)
        assert all(torch.equal(state[name], same[name]) for name in state)


def test_long_columns_lose_no_digits():
    """Of 40,000 numbers added up one by one in single precision, four digits would be lost."""
    ones = torch.full((1, 40_000, 3), 1.1)
    weight, row, column = torch.zeros_like(ones), torch.zeros(1, 40_000), torch.zeros(1, 3)
    arrays = (t.numpy() for t in (weight, ones, row, column))
    native.adafactor(*arrays, **{**NUMBERS, "beta2": 0.0}, threads=1)
    for moment in (row, column):
        torch.testing.assert_close(moment, torch.full_like(moment, 1.1**2), rtol=2e-6, atol=0.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_spreads_as_in_torch(bad, monkeypatch):
    def broken():
        weight = declare(nn.Parameter(torch.ones(2, 4, 5)), "ep", None, None)
        weight.grad = torch.ones(2, 4, 5)
        weight.grad[0, 1, 2] = bad
        Adafactor([weight], lr=0.1, factored_min_dim=1).step()
        return weight.detach().isfinite()

    ours = broken()
    monkeypatch.setattr(native_adafactor, "suits", lambda *_: False)
    assert torch.equal(ours, broken())
    assert ours[1].all()  # the other expert goes on


def test_autograd_sees_that_the_weight_changed():
    weight = declare(nn.Parameter(torch.ones(4, 5)), None, None)
    loss = (weight * weight).sum()
    weight.grad = torch.ones(4, 5)
    Adafactor([weight], lr=0.1, factored_min_dim=1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def arrays(dtype=np.float32):
    shapes = {"parameter": (2, 3, 4), "gradient": (2, 3, 4), "row": (2, 3), "column": (2, 4)}
    return {name: np.ones(shape, dtype=dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("name", ["parameter", "gradient", "row", "column"])
def test_the_core_checks_what_it_gets(name):
    native.adafactor(**arrays(), **NUMBERS, threads=1)
    for change, error in (
        (lambda a: a[:, :2], TypeError),  # not contiguous
        (lambda a: a[:1], ValueError),
        (lambda a: a[None], ValueError),
        (lambda a: a.ravel(), ValueError),
        (lambda a: a.astype(np.float64), TypeError),
        (lambda a: a.astype(np.float16), TypeError),
    ):
        given = arrays()
        given[name] = change(given[name])
        with pytest.raises(error):
            native.adafactor(**given, **NUMBERS, threads=1)
    if name != "gradient":
        given = arrays()
        given[name].flags.writeable = False
        with pytest.raises(ValueError, match="not writeable"):
            native.adafactor(**given, **NUMBERS, threads=1)


def test_the_core_refuses_nothing_at_all():
    given = {name: array[:0] for name, array in arrays().items()}
    with pytest.raises(ValueError, match="must not be empty"):
        native.adafactor(**given, **NUMBERS, threads=1)


@pytest.mark.long
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_sanitizers_find_nothing_in_draws_and_updates(sanitizer, tmp_path):
    root, program = Path(__file__).parents[3], tmp_path / "stress"
    sources = [root / "csrc/adafactor.cpp", root / "csrc/draws.cpp"]
    compiler = ["g++", "-std=c++17", "-g", "-O1", "-pthread", f"-fsanitize={sanitizer}"]
    compiler += ["-fno-sanitize-recover=all", f"-I{root / 'csrc'}"]
    stress = root / "tests/native/numbers_stress.cpp"
    subprocess.run([*compiler, stress, *sources, "-o", program], check=True)
    # The thread sanitizer does not know the random layouts of memory of newer kernels.
    result = subprocess.run(["setarch", "-R", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout == "done\n"
