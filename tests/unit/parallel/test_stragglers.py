"""Who is slow, and in what."""

import torch

from megaswitch.parallel.mesh import Mesh
from megaswitch.parallel.stragglers import Straggler, Stragglers, calls, products, slow_ones

PRODUCTS, DATA = 0, 2


class Ranks:
    """A mesh whose other ranks report what is given."""

    rank, size, device = 0, 3, torch.device("cpu")

    def __init__(self, *looks):
        self.looks = iter(looks)

    def sum_all_(self, mine):
        assert (mine[0, :2] > 0).all()
        assert not mine[1:].any()
        return torch.tensor(next(self.looks), dtype=torch.float64)

    def gather(self, value):
        return [value, "node7", "node8"]


def test_a_rank_is_slow_beside_the_median_of_the_others():
    assert set(slow_ones(PRODUCTS, [0.01, 0.031, 0.015, 0.01], 2.0)) == {1}
    assert slow_ones(PRODUCTS, [0.01, 0.019, 0.015, 0.01], 2.0) == {}
    assert set(slow_ones(PRODUCTS, [0.01, 0.003], 2.0)) == {0}
    words = slow_ones(PRODUCTS, [0.01, 0.031, 0.01], 2.0)[1]
    assert words == "needs 3.1 times as long as the others for the same products"


def test_little_waiting_for_data_is_no_harm():
    assert slow_ones(DATA, [0.0, 0.09, 0.0], 2.0) == {}
    assert slow_ones(DATA, [0.1, 0.4, 0.14], 2.0) == {
        1: "waits for data 40% of the time, the others 12%"
    }
    assert slow_ones(DATA, [0.5, 0.6, 0.5], 2.0) == {}  # all wait: no rank is the slow one


def test_a_straggler_is_slow_twice_in_a_row_in_the_same_way():
    calm, in_products, in_calls = [1.0, 1.0, 0.0], [5.0, 1.0, 0.0], [1.0, 5.0, 0.0]
    looks = (in_products, in_calls, calm, in_products, in_products, calm)  # of rank 1
    meter = Stragglers(Ranks(*([calm, look, calm] for look in looks)), 2.0)
    found = [meter.look(0.0) for _ in looks]
    straggler = Straggler(1, "node7", "needs 5.0 times as long as the others for the same products")
    assert found == [[], [], [], [], [straggler], []]


def test_a_process_alone_is_never_slow():
    assert Stragglers(Mesh(0, 1, torch.device("cpu"), None), 2.0).look(1.0) == []


def test_what_is_timed_takes_time():
    assert 0 < products(torch.device("cpu")) < 30
    assert 0 < calls() < 30
