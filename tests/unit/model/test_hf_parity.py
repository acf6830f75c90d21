"""Our model against HF's on the same weights: logits, hidden states, loss, every gradient.

HF agrees with the paper here. Where it does not, see `test_hf_deviations.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.models.t5.modeling_t5 import T5Attention, T5LayerNorm

from megaswitch.checkpoint.huggingface import from_hf, to_hf
from megaswitch.layers.attention import RelativeBias
from megaswitch.layers.norm import RMSNorm
from megaswitch.layers.parameter import Init
from tests.unit.model import hf_reference as ref

FP64_TOLERANCE = 1e-12
FP32_TOLERANCE = 2e-5


@dataclass(frozen=True)
class Case:
    """An HF model, and the routing of ours that must equal its."""

    build: Callable[[], PreTrainedModel]
    moe: dict[str, Any] = field(default_factory=dict)
    drops: bool = False


# Two rows of the 13-token encoder make a group, so the batch's third row is a group of its own.
AMPLE_GROUPS = {"capacity_mode": "group", "group_size": 26, "eval_capacity_factor": 4.0}
CASES = {
    "t5-v1.0": Case(lambda: ref.t5(gated=False)),
    "t5-v1.1": Case(lambda: ref.t5(gated=True)),
    "switch-dropless": Case(lambda: ref.switch(), {"capacity_mode": "dropless"}),
    "switch-dropless-all-sparse": Case(
        lambda: ref.switch(layers=(2, 3), step=1), {"capacity_mode": "dropless"}
    ),
    "switch-groups": Case(lambda: ref.switch(layers=(2, 4)), AMPLE_GROUPS),
    "switch-groups-untied": Case(lambda: ref.switch(tie_word_embeddings=False), AMPLE_GROUPS),
    "switch-hf-drops": Case(
        lambda: ref.switch(layers=(2, 4), expert_capacity=2, seed=4), drops=True
    ),
    "switch-hf-drops-all-sparse-untied": Case(
        lambda: ref.switch(layers=(3, 2), step=1, expert_capacity=1, tie_word_embeddings=False),
        drops=True,
    ),
}


def compare(case: Case, hf: PreTrainedModel, padding: ref.Padding) -> dict[str, float]:
    """Relative error of everything, after checking that the case is what it claims to be."""
    batch = ref.make_batch(padding)
    assert ref.routing_margin(hf, batch) > 1e-4
    model = ref.ours_like(hf, **case.moe)
    expected, _ = ref.run_hf(hf, batch)
    actual, output = ref.run_ours(model, batch)

    in_hf_mode = model.config.moe.num_experts and model.config.moe.capacity_mode == "hf"
    for routing in output.routing.values():
        if in_hf_mode or padding == "none":
            assert routing.kept.all() == (not case.drops)

    encoder, decoder = batch.encoder_mask, batch.decoder_mask
    if padding == "none" or in_hf_mode:
        encoder, decoder = (torch.ones_like(t).bool() for t in (batch.encoder, batch.decoder))
    # Else ours gives padding no expert, as the paper's code, and what stands there is no concern.
    assert encoder is not None
    assert decoder is not None
    assert actual.gradients.keys() >= expected.gradients.keys()
    errors = {
        "logits": ref.error(actual.logits[decoder], expected.logits[decoder]),
        "encoder": ref.error(actual.encoder_hidden[encoder], expected.encoder_hidden[encoder]),
        "loss": ref.error(actual.loss, expected.loss),
    }
    for name, gradient in expected.gradients.items():
        errors[name] = ref.error(actual.gradients[name], gradient)
    return errors


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("name", CASES)
def test_everything_equals_hf_in_fp64(
    name: str, padding: ref.Padding, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = ref.double(CASES[name].build(), monkeypatch)
    errors = compare(CASES[name], hf, padding)
    wrong = {what: value for what, value in errors.items() if not value <= FP64_TOLERANCE}
    assert not wrong


@pytest.mark.parametrize("name", CASES)
def test_everything_equals_hf_as_it_comes_in_fp32(name: str) -> None:
    errors = compare(CASES[name], CASES[name].build(), "right")
    wrong = {what: value for what, value in errors.items() if not value <= FP32_TOLERANCE}
    assert not wrong


def test_router_losses_equal_hf_where_it_has_nothing_to_pool(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One Switch layer in each stack, routed row by row; HF's f is in fp32, so eighths only."""
    coefficients = {"router_aux_loss_coef": 0.3, "router_z_loss_coef": 0.2}
    # Both count f before anything is dropped.
    hf = ref.double(ref.switch(layers=(2, 3), expert_capacity=1, **coefficients), monkeypatch)
    whole = ref.make_batch("none")
    encoder, decoder, labels = (
        tokens[:, :8].contiguous() for tokens in (whole.encoder, whole.decoder, whole.labels)
    )
    batch = ref.Batch(encoder, decoder, None, None, labels)
    assert ref.routing_margin(hf, batch) > 1e-4
    expected, _ = ref.run_hf(hf, batch, output_router_logits=True)
    actual, output = ref.run_ours(ref.ours_like(hf), batch, aux=0.3, z=0.2)
    assert not any(routing.kept.all() for routing in output.routing.values())
    assert ref.error(actual.loss, expected.loss) <= FP64_TOLERANCE
    for name, gradient in expected.gradients.items():
        assert ref.error(actual.gradients[name], gradient) <= FP64_TOLERANCE, name


@pytest.mark.parametrize("name", CASES)
def test_weights_survive_a_round_trip_bit_for_bit(name: str) -> None:
    hf = CASES[name].build()
    model = ref.ours_like(hf)
    back = to_hf(model.state_dict(), model.config)
    unique = dict(hf.named_parameters())
    assert back.keys() >= unique.keys()
    assert all(torch.equal(back[key], hf.state_dict()[key]) for key in back)
    again = from_hf(back, model.config)
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(again[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", CASES)
def test_our_own_initialisation_computes_the_same_in_hf(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = ref.double(CASES[name].build(), monkeypatch)
    model = ref.ours_like(hf, **CASES[name].moe).initialize(5)
    missing, unexpected = hf.load_state_dict(to_hf(model.state_dict(), model.config), strict=False)
    assert not unexpected
    assert set(missing) <= {*ref.STACK_TABLES, "lm_head.weight"}  # aliases of tied tables
    batch = ref.make_batch("right")
    assert ref.routing_margin(hf, batch) > 1e-5
    expected, _ = ref.run_hf(hf, batch)
    actual, _ = ref.run_ours(model, batch)
    counted = batch.labels != -100
    assert ref.error(actual.logits[counted], expected.logits[counted]) <= FP64_TOLERANCE


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(
    ("buckets", "max_distance"), [(32, 128), (8, 9), (4, 8), (32, 20), (64, 1000), (320, 2048)]
)
def test_relative_position_buckets_are_the_same_integers(
    buckets: int, max_distance: int, bidirectional: bool
) -> None:
    relative = torch.arange(-5000, 5001)
    bias = RelativeBias(
        1,
        buckets=buckets,
        max_distance=max_distance,
        bidirectional=bidirectional,
        init=Init("constant", 0.0),
    )
    expected = T5Attention._relative_position_bucket(
        relative, bidirectional=bidirectional, num_buckets=buckets, max_distance=max_distance
    )
    assert torch.equal(bias.bucket(relative), expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_norm_equals_hf(dtype: torch.dtype, tolerance: float) -> None:
    # In bf16 HF rounds once more, before the weight.
    hf = T5LayerNorm(48, eps=1e-3).to(dtype)
    torch.nn.init.normal_(hf.weight, 1.0, 0.5)
    ours = RMSNorm(48, 1e-3).to(dtype)
    ours.load_state_dict(hf.state_dict())
    x = torch.randn(5, 7, 48, dtype=dtype) * torch.logspace(-3, 3, 7)[:, None].to(dtype)
    actual = ours(x)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, hf(x), rtol=tolerance, atol=0.0)
