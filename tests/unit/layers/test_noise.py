"""Counted randomness: uniform, independent of layout, different wherever it should differ."""

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megaswitch import native
from megaswitch.layers.kernels import rehearse
from megaswitch.layers.noise import Noise, draw, dropout
from megaswitch.layers.parameter import stable_hash


def noise(*, seed=0, step=0, samples=range(64)):
    return Noise(seed, step, torch.tensor(list(samples)))


def correlation(a, b):
    a, b = a.double().flatten(), b.double().flatten()
    return torch.corrcoef(torch.stack([a, b]))[0, 1].abs().item()


@pytest.mark.parametrize("seed", [0, 1, 2**62 - 1])
@pytest.mark.parametrize("bins", [2, 64, 1000])
def test_draws_are_uniform(seed, bins):
    draws = noise(seed=seed).uniform("site", (64, 4096)).double().flatten()
    assert draws.min() >= 0
    assert draws.max() < 1
    expected = len(draws) / bins
    counts = torch.histc(draws, bins, 0, 1)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = bins - 1
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5 + 4  # four deviations


def test_each_row_and_each_column_is_uniform():
    draws = noise(samples=range(1024)).uniform("site", (1024, 1024)).double()
    for mean in (draws.mean(0), draws.mean(1)):
        # 1024 means of 1024 draws, of deviation 1/√(12·1024) each; none is further than 5 of those.
        assert (mean - 0.5).abs().max() < 5 / (12 * 1024) ** 0.5


def test_draws_are_fp32_of_24_bits():
    draws = noise().uniform("site", (64, 100))
    assert draws.dtype == torch.float32
    assert torch.equal(draws * 2**24, (draws * 2**24).round())
    assert (draws * 2**24).long().bitwise_and(1).float().mean().sub(0.5).abs() < 0.05


def test_neighbours_are_not_correlated():
    draws = noise(samples=range(256)).uniform("site", (256, 1024))
    bound = 5 / draws.numel() ** 0.5
    assert correlation(draws[:, :-1], draws[:, 1:]) < bound  # elements
    assert correlation(draws[:-1], draws[1:]) < bound  # samples
    assert correlation(draws[:-1, :-1], draws[1:, 1:]) < bound
    for other in (
        noise(samples=range(256), step=1).uniform("site", (256, 1024)),
        noise(samples=range(256), seed=1).uniform("site", (256, 1024)),
        noise(samples=range(256)).uniform("site2", (256, 1024)),
    ):
        assert correlation(draws, other) < bound


@pytest.mark.parametrize(
    "other",
    [
        noise(seed=1).uniform("a", (64, 32)),
        noise(step=1).uniform("a", (64, 32)),
        noise().uniform("b", (64, 32)),
        noise(samples=range(64, 128)).uniform("a", (64, 32)),
    ],
    ids=["seed", "step", "site", "samples"],
)
def test_streams_differ(other):
    draws = noise().uniform("a", (64, 32))
    assert (draws == other).float().mean() < 0.01


@pytest.mark.parametrize("split", [[1] * 8, [3, 5], [8]])
def test_rows_do_not_depend_on_the_micro_batch(split):
    whole = noise(samples=range(8)).uniform("site", (8, 5, 7))
    parts = torch.arange(8).split(split)
    drawn = [Noise(0, 0, part).uniform("site", (len(part), 5, 7)) for part in parts]
    assert torch.equal(torch.cat(drawn), whole)


def test_rows_follow_their_sample():
    order = [5, 2, 2**40, 0]
    draws = noise(samples=order).uniform("site", (4, 9))
    for row, sample in enumerate(order):
        assert torch.equal(draws[row], noise(samples=[sample]).uniform("site", (1, 9))[0])


def test_literal_draws():
    # The stream is part of what a checkpoint continues: changing it changes running trainings.
    draws = Noise(1234, 5, torch.tensor([0, 7])).uniform("encoder.0.ffn", (2, 3))
    assert (draws * 2**24).long().tolist() == [
        [7609572, 331261, 9456010],
        [2246334, 3281119, 7260069],
    ]


def split_mix(x):
    """SplitMix64's finaliser, on Python's integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return x ^ (x >> 31)


@pytest.mark.parametrize("kernels", ["cpu", "cuda"])
@pytest.mark.parametrize("threads", [1, 3])
def test_draws_are_those_of_split_mix(kernels, threads):
    samples = [0, 3, 2**40 + 1, 2**63 - 1]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with rehearse(kernels):  # the core's, or torch's operations as on a GPU
            draws = noise(seed=7, step=2, samples=samples).uniform("a", (4, 5, 21)).flatten(1)
    finally:
        torch.set_num_threads(before)
    golden, base = 0x9E3779B97F4A7C15, stable_hash(7, 2, "a")
    for sample, row in zip(samples, draws, strict=True):
        key = split_mix((sample * golden + base) % 2**64)
        counters = [(key + element * golden) % 2**64 for element in range(1, 106)]
        assert (row * 2**24).tolist() == [split_mix(c) >> 40 for c in counters]


@pytest.mark.parametrize("shape", [(700, 411), (3, 150_001), (0, 5), (5, 0)])
def test_the_core_draws_what_torch_would(shape):
    keys = torch.randint(-(2**63), 2**63 - 1, (2 * shape[0],))[::2]  # not contiguous
    columns = range(2**31, 2**31 + shape[1])
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        ours = draw(keys, columns)
    finally:
        torch.set_num_threads(before)
    with rehearse("cuda"):
        assert torch.equal(ours, draw(keys, columns))
    assert ours.shape == shape


def test_the_core_checks_what_it_gets():
    keys, out = np.zeros(3, dtype=np.int64), np.zeros((3, 4), dtype=np.float32)
    native.draw(keys, 0, out, threads=1)
    for wrong in (out[:2], out.reshape(3, 4, 1), out[0]):
        with pytest.raises(ValueError, match=r"wrong shape|out \[N, n\]"):
            native.draw(keys, 0, wrong, threads=1)
    for wrong in (out[:, ::2], out.astype(np.float64)):
        with pytest.raises(TypeError):
            native.draw(keys, 0, wrong, threads=1)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="not writeable"):
        native.draw(keys, 0, out, threads=1)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_expectation(rate):
    y = dropout(torch.ones(64, 4096), rate, "site", noise()).double()
    kept = y.ne(0).double().mean().item()
    assert abs(kept - (1 - rate)) < 5 * (rate * (1 - rate) / y.numel()) ** 0.5
    assert y[y != 0].unique().item() == pytest.approx(1 / (1 - rate), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dropout_keeps_the_dtype_and_the_mask(dtype):
    y = dropout(torch.ones(4, 50, dtype=dtype), 0.3, "site", noise(samples=range(4)))
    assert y.dtype == dtype
    expected = noise(samples=range(4)).uniform("site", (4, 50)) >= 0.3
    assert torch.equal(y != 0, expected)


def test_dropout_without_noise_or_rate_returns_its_input():
    x = torch.randn(4, 3)
    assert dropout(x, 0.5, "site", None) is x
    assert dropout(x, 0.0, "site", noise(samples=range(4))) is x


def test_dropout_gradient_goes_through_the_mask():
    x = torch.randn(4, 50, dtype=torch.float64, requires_grad=True)
    y = dropout(x, 0.3, "site", noise(samples=range(4)))
    y.sum().backward()
    assert torch.equal(x.grad != 0, y != 0)


def test_recomputation_draws_the_same():
    source = noise(samples=range(4))

    def block(x):
        return dropout(dropout(x, 0.5, "first", source).exp(), 0.5, "second", source)

    x = torch.randn(4, 50, dtype=torch.float64)
    grads = []
    for recompute in (False, True):
        leaf = x.clone().requires_grad_()
        if recompute:
            y = checkpoint(block, leaf, use_reentrant=False, preserve_rng_state=False)
        else:
            y = block(leaf)
        torch.rand(100)  # torch's own generator moves on and is no matter
        y.square().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_from_torch_follows_torchs_seed():
    def draws(seed):
        torch.manual_seed(seed)
        return Noise.from_torch(3, torch.device("cpu")).uniform("site", (3, 8))

    assert torch.equal(draws(1), draws(1))
    assert not torch.equal(draws(1), draws(2))
    assert len(draws(1).unique(dim=0)) == 3
