"""Loads of routers that send a token to one expert, to several, or to none."""

import pytest
import torch

from megaswitch.config import ModelConfig, MoEConfig
from megaswitch.model.switch_transformer import Inputs, LayerRouting
from megaswitch.parallel.mesh import Mesh
from megaswitch.train.metrics import LayerLoad, RouterMeter, router_metrics
from tests.unit.model.router_checks import tiny_model

NAME = "encoder.1.ffn"
CONFIG = ModelConfig(
    num_encoder_layers=2, num_decoder_layers=1, moe=MoEConfig(num_experts=4, decoder_sparse_step=0)
)


def load_of(expert, gate, kept, mask=None) -> LayerLoad:
    """Of one row of tokens."""
    expert, kept = torch.tensor([expert]), torch.tensor([kept])
    entropy = torch.full(expert.shape[:2], 0.5)
    routing = LayerRouting(expert, torch.tensor([gate]), kept, entropy)
    mask = None if mask is None else torch.tensor([mask])
    shape = torch.Size(expert.shape[:2])
    meter = RouterMeter(CONFIG, torch.device("cpu"))
    meter.add({NAME: routing}, Inputs(shape, shape, mask, None, None))
    return meter.loads(Mesh.start("cpu"))[NAME]


def test_one_expert_for_each_token():
    load = load_of([0, 0, 2, 0], [0.5, 0.7, 0.9, 0.1], [True, False, True, False],
                   [True, True, True, False])  # fmt: skip
    assert (load.tokens, load.kept, load.tokens_per_expert) == (3, 2, [2, 0, 1, 0])
    assert load.dropped_fraction == pytest.approx(1 / 3)
    assert load.load_imbalance == pytest.approx(2 * 4 / 3)
    assert load.router_confidence == pytest.approx(0.7)
    assert load.router_entropy == pytest.approx(0.5)


def test_two_experts_for_each_token():
    # Both kept; the second only; neither, as both were full; no second asked; padding.
    load = load_of(
        [[0, 1], [0, 2], [0, 1], [3, -1], [0, 1]],
        [[0.6, 0.4], [0.7, 0.3], [0.5, 0.5], [0.8, 0.0], [0.9, 0.1]],
        [[True, True], [False, True], [False, False], [True, False], [False, False]],
        [True, True, True, True, False],
    )
    assert (load.tokens, load.kept) == (4, 3)  # a token is dropped if no expert takes it
    assert load.tokens_per_expert == [3, 2, 1, 1]
    assert load.dropped_fraction == pytest.approx(1 / 4)
    assert load.load_imbalance == pytest.approx(3 * 4 / 7)
    assert load.router_confidence == pytest.approx((0.6 + 0.7 + 0.5 + 0.8) / 4)


def test_even_loads_have_imbalance_one_whatever_the_number_of_experts_asked():
    load = load_of([[0, 1], [2, 3]], [[0.5, 0.5]] * 2, [[True, True]] * 2)
    assert load.load_imbalance == 1
    assert load.unused_experts == []


@pytest.mark.parametrize("name", ["switch", "top-2", "ntlb", "expert-choice"])
def test_a_model_is_counted_as_it_routes(name):
    moe = {"router": name, "rounds": 2, "eval_capacity_factor": 0.7}
    model = tiny_model(moe=moe)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 19, (6, 5), generator=generator)
    mask = torch.ones(6, 5, dtype=torch.bool)
    mask[1, 3:] = False
    with torch.no_grad():
        output = model(tokens, tokens, encoder_mask=mask)
    meter = RouterMeter(model.config, torch.device("cpu"))
    meter.add(output.routing, Inputs(tokens.shape, tokens.shape, mask, None, None))
    loads = meter.loads(Mesh.start("cpu"))
    for layer, load in loads.items():
        routing = output.routing[layer]
        real = mask if layer.startswith("encoder") else torch.ones_like(mask)
        assert not routing.kept[~real].any()
        kept = routing.kept if routing.kept.ndim == 2 else routing.kept.any(-1)
        assert (load.tokens, load.kept) == (int(real.sum()), int(kept.sum()))
        asked = routing.expert[real]
        assert load.tokens_per_expert == torch.bincount(asked[asked >= 0], minlength=3).tolist()
    metrics = router_metrics(loads)
    assert 0 < metrics["dropped_fraction"] < 1
    assert metrics["load_imbalance"] >= 1
    if name == "expert-choice":  # experts take as many each, group by group
        assert max(load.load_imbalance for load in loads.values()) == 1
