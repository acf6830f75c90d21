"""Sums of bits, and what is said of replicas that differ."""

import pytest
import torch

from megaswitch.parallel.replicas import Difference, bit_sum, describe


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_every_bit_counts(dtype):
    size = torch.tensor([], dtype=dtype).element_size()
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    tensor = (torch.arange(1, 61).reshape(6, 10) * 3).to(dtype)
    before = bit_sum(tensor).item()
    for bit in range(size * 8):
        flipped = tensor.clone()
        mask = 1 << bit if bit < size * 8 - 1 or integers is torch.uint8 else -(1 << bit)
        flipped.view(integers)[4, 7] ^= mask
        assert bit_sum(flipped).item() != before
    assert bit_sum(tensor.flip(0)).item() != before
    assert bit_sum(tensor.T).item() == bit_sum(tensor.T.contiguous()).item()


def test_differences_in_words():
    one = Difference("a.weight", (2,), (0, 1, 2, 3))
    two = Difference("b.weight", (), (0, 1))
    assert describe([one]) == "rank 2 holds other bits of a.weight than ranks 0-1, 3"
    assert describe([two, one]) == (
        "ranks 0-1 hold different bits of b.weight, and of 1 more parameters"
    )
