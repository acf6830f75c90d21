"""Compiled regions give what their functions give, and are not compiled for every shape."""

from contextlib import contextmanager

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from megaswitch.layers import backend, compiled
from megaswitch.layers.noise import Noise, draw
from megaswitch.layers.vocab import token_losses
from megaswitch.log import UserError
from tests.unit.model.router_checks import tiny_model

SHAPES = {
    "relu-tied": {"activation": "relu", "tie_embeddings": True},
    "geglu-untied": {"activation": "gated-gelu", "tie_embeddings": False},
}


@contextmanager
def compiling(name):
    """Inside, regions are compiled by a backend of torch, from nothing."""
    torch._dynamo.reset()
    counters.clear()
    compiled._compiled.cache_clear()
    before, compiled.BACKEND = compiled.BACKEND, name
    compiled.compile_regions(True)
    try:
        yield
    finally:
        compiled.compile_regions(False)
        compiled.BACKEND = before
        compiled._compiled.cache_clear()
        torch._dynamo.reset()


def gradients(model, rows, length):
    """Loss and all gradients of a training step on rows × length tokens."""
    generator = torch.Generator().manual_seed(rows)
    tokens = torch.randint(1, 19, (rows, length), generator=generator)
    noise = Noise(1, 2, torch.arange(rows))
    model.zero_grad()
    output = model(tokens, tokens, encoder_mask=tokens > 3, noise=noise)
    losses = token_losses(output.logits, tokens, tokens > 3)
    loss = losses.cross_entropy + losses.log_z_squared + output.aux_loss + output.z_loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters()}


def check(model, name, tolerance):
    plain = {size: gradients(model, *size) for size in ((4, 5), (6, 7), (3, 9))}
    with compiling(name):
        for size, expected in plain.items():
            found = gradients(model, *size)
            for key, value in expected.items():
                torch.testing.assert_close(found[key], value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("shape", "again"),
    [
        ("relu-tied", False),
        ("geglu-untied", "selective"),
        pytest.param("geglu-untied", False, marks=pytest.mark.long),
        pytest.param("relu-tied", True, marks=pytest.mark.long),
    ],
)
def test_a_compiled_model_has_the_same_gradients(shape, again):
    model = tiny_model(**SHAPES[shape], dropout=0.3, moe={"jitter": 0.3}).train()
    model.set_activation_checkpointing(again)
    check(model, "aot_eager", 1e-10)


@pytest.mark.long
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_so_has_one_that_inductor_compiles(shape):
    check(tiny_model(**shape, dropout=0.3, moe={"jitter": 0.3}).train(), "inductor", 1e-9)


def test_no_graph_breaks_and_new_lengths_compile_nothing(monkeypatch):
    model = tiny_model(dropout=0.3, moe={"jitter": 0.3}).train()
    counter = CompileCounterWithBackend("aot_eager")
    with compiling(counter):
        gradients(model, 4, 5)
        gradients(model, 6, 7)
        first = counter.frame_count
        for rows, length in ((3, 9), (8, 4), (5, 11), (7, 13)):
            gradients(model, rows, length)
        assert counter.frame_count == first
        # Norms, activations, softmax, dropout, draws, and two functions of the loss: of two or
        # three dimensions, with a gradient or without.
        assert first <= 16
        assert not counters["graph_break"]


@pytest.mark.parametrize("name", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_compiled_draws_are_the_same_bits(name):
    keys = torch.tensor([0, 5, -(2**63), 2**62 + 12345])
    columns = (range(100), range(7, 40), range(1, 2))
    plain = [draw(keys, some) for some in columns]
    with compiling(name):
        for some, expected in zip(columns, plain, strict=True):
            assert torch.equal(draw(keys, some), expected)


def test_what_is_missing_is_told(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    backend.check_compile(False, "cpu")
    with pytest.raises(UserError, match=r"train.compile=true cannot run here: there is no C"):
        backend.check_compile(True, "cpu")
