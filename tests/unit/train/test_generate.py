"""Decoding against HF's on the same weights, against itself without a cache, and sampling."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

import megaswitch
from megaswitch.data.span_corruption import EOS_ID, PAD_ID
from megaswitch.layers.noise import Noise
from megaswitch.log import UserError
from megaswitch.model.switch_transformer import SwitchTransformer
from megaswitch.train.generate import Decoding, _draw, generate, stream
from tests.unit.model import hf_reference as ref

MODELS = {
    "t5-v1.0": lambda seed: ref.t5(gated=False, seed=seed),
    "t5-v1.1": lambda seed: ref.t5(gated=True, seed=seed),
    "switch": lambda seed: ref.switch(seed=seed),
    "switch-shallow-encoder": lambda seed: ref.switch(seed=seed, layers=(2, 4)),
    "switch-drops": lambda seed: ref.switch(seed=seed, expert_capacity=2),
    "switch-drops-all-sparse": lambda seed: ref.switch(
        seed=seed, layers=(3, 2), step=1, expert_capacity=2
    ),
}
BEAMS = [
    {"beams": 3, "length_penalty": penalty, "early_stopping": early}
    for penalty, early in itertools.product((1.0, 0.0, 2.0, -1.0), (False, True))
]
SETTINGS: list[dict[str, Any]] = [{}, *BEAMS]
TOKENS = 12


def prompts(padding: str, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens [3, 9] and their mask."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, ref.VOCAB, (3, 9), generator=generator)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    for row, missing in ((0, 3), (2, 5)):
        if padding == "right":
            mask[row, -missing:] = False
        elif padding == "left":
            mask[row, :missing] = False
    return tokens * mask, mask


def without_filler(tokens: Tensor) -> Tensor:
    """HF fills the rows of a beam search up with EOS where the pad id is 0."""
    seen = (tokens == EOS_ID).cumsum(1)
    behind = (seen > 0) & ~((tokens == EOS_ID) & (seen == 1))
    return tokens.masked_fill(behind, PAD_ID)


def theirs(hf: Any, tokens: Tensor, mask: Tensor, *, cache: bool, **settings: Any) -> Tensor:
    settings["num_beams"] = settings.pop("beams", 1)
    options = {"max_new_tokens": TOKENS, "do_sample": False, "use_cache": cache, **settings}
    return without_filler(hf.generate(tokens, attention_mask=mask.long(), **options)[:, 1:])


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_equals_hf(name, padding, cache):
    if cache and name == "switch-shallow-encoder":
        pytest.skip("HF sizes its cache by the encoder and fails on a deeper decoder")
    for seed in range(2):
        hf = MODELS[name](seed)
        model = ref.ours_like(hf)
        tokens, mask = prompts(padding, seed)
        for settings in SETTINGS:
            expected = theirs(hf, tokens, mask, cache=cache, **settings)
            found = generate(
                model, tokens, encoder_mask=mask, max_tokens=TOKENS, cache=cache, **settings
            ).tokens
            assert torch.equal(found, expected), settings


def test_hf_capacity_binds_without_a_cache_only():
    """The models above do overflow, or the comparison with HF would show less than it says."""
    differ = 0
    for seed in range(4):
        model = ref.ours_like(MODELS["switch-drops"](seed))
        tokens, _ = prompts("none", seed)
        with_cache, without = (
            generate(model, tokens, max_tokens=TOKENS, cache=cache).scores
            for cache in (True, False)
        )
        differ += not torch.allclose(with_cache, without)
    assert differ


def switch_model(**moe: Any) -> SwitchTransformer:
    """A model of ours in group capacity mode, where experts overflow."""
    defaults = {"capacity_mode": "group", "group_size": 26, "eval_capacity_factor": 0.5}
    return ref.ours_like(ref.switch(), **defaults | moe)


@pytest.mark.parametrize("settings", [{}, {"beams": 3}, {"temperature": 1.0}], ids=str)
def test_the_cache_changes_nothing(settings):
    model = switch_model()
    tokens, mask = prompts("left", 0)
    cached, plain = (
        generate(model, tokens, encoder_mask=mask, max_tokens=TOKENS, cache=cache, **settings)
        for cache in (True, False)
    )
    assert torch.equal(cached.tokens, plain.tokens)
    torch.testing.assert_close(cached.scores, plain.scores)


@pytest.mark.parametrize("settings", [{}, {"beams": 3}, {"temperature": 1.0}], ids=str)
def test_a_row_does_not_depend_on_the_others(settings):
    model = switch_model()
    tokens, mask = prompts("right", 1)
    together = generate(model, tokens, encoder_mask=mask, max_tokens=TOKENS, **settings)
    for row in range(len(tokens)):
        own = tokens[row : row + 1, mask[row]]
        alone = generate(
            model, own, sample_index=torch.tensor([row]), max_tokens=TOKENS, **settings
        )
        length = alone.tokens.shape[1]
        assert torch.equal(together.tokens[row, :length], alone.tokens[0])
        assert not together.tokens[row, length:].any()
        torch.testing.assert_close(together.scores[row], alone.scores[0])


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.7}, {"beams": 4, "length_penalty": 0.5}], ids=str
)
def test_scores_are_those_of_teacher_forcing(settings):
    model = ref.ours_like(ref.switch(), capacity_mode="dropless")
    tokens, mask = prompts("left", 2)
    result = generate(model, tokens, encoder_mask=mask, max_tokens=TOKENS, **settings)
    start = torch.full((len(tokens), 1), PAD_ID)
    shifted = torch.cat([start, result.tokens[:, :-1]], 1)
    logits = model(tokens, shifted, encoder_mask=mask).logits
    chosen = torch.log_softmax(logits, -1).gather(-1, result.tokens[..., None])[..., 0]
    ended = (result.tokens == EOS_ID).cumsum(1)
    counted = (ended == 0) | ((ended == 1) & (result.tokens == EOS_ID))
    penalty = counted.sum(1) ** settings.get("length_penalty", 0.0)
    torch.testing.assert_close(result.scores, (chosen * counted).sum(1) / penalty)


def test_training_mode_and_autograd_do_not_matter():
    model = switch_model()
    model.config = dataclasses.replace(model.config, dropout=0.5)
    tokens, _ = prompts("none", 0)
    expected = generate(model.eval(), tokens, max_tokens=TOKENS)
    found = megaswitch.generate(model.train(), tokens, max_tokens=TOKENS)
    assert torch.equal(found.tokens, expected.tokens)
    assert not found.scores.requires_grad


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.5}], ids=str)
def test_stream_gives_the_same_tokens(settings):
    model = switch_model()
    tokens, mask = prompts("right", 3)
    options = {"encoder_mask": mask, "max_tokens": TOKENS, **settings}
    steps = list(stream(model, tokens, **options))
    assert torch.equal(torch.stack(steps, 1), generate(model, tokens, **options).tokens)


def test_rows_end_at_eos():
    model = switch_model()
    tokens = torch.randint(2, ref.VOCAB, (16, 9), generator=torch.Generator().manual_seed(0))
    common = generate(model, tokens, max_tokens=10).tokens[:, 5:].mode().values.mode().values
    with torch.no_grad():  # what was said often now ends the text
        model.embedding.weight[EOS_ID] = 1.01 * model.embedding.weight[common]
    for settings in ({}, {"beams": 2}):
        found = generate(model, tokens, max_tokens=40, **settings).tokens
        ended = (found == EOS_ID).any(1)
        assert ended.any()
        assert torch.equal(found, without_filler(found))


def test_sampling_follows_the_softmax():
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0, 0.5]])
    draws = 40_000
    rows = logits.expand(draws, -1)
    for settings in (
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 3},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.5, "top_k": 4, "top_p": 0.7},
    ):
        warped = logits / settings["temperature"]
        if "top_k" in settings:
            warped = TopKLogitsWarper(settings["top_k"])(torch.empty(0), warped)
        if "top_p" in settings:
            warped = TopPLogitsWarper(settings["top_p"])(torch.empty(0), warped)
        expected = torch.softmax(warped, -1)[0]
        noise = Noise(0, 0, torch.arange(draws))
        counts = torch.bincount(_draw(rows, noise, Decoding(**settings)), minlength=5)
        assert not counts[expected == 0].any()
        # Five standard deviations of a binomial.
        tolerance = 5 * (expected * (1 - expected) / draws).sqrt() + 1e-9
        assert ((counts / draws - expected).abs() <= tolerance).all(), settings


def test_draws_differ_by_seed_row_and_position_and_by_nothing_else():
    model = switch_model()
    tokens = torch.full((6, 4), 9)
    settings = {"max_tokens": TOKENS, "temperature": 3.0}
    found = generate(model, tokens, seed=1, **settings).tokens
    assert torch.equal(found, generate(model, tokens, seed=1, **settings).tokens)
    assert len({tuple(row) for row in found.tolist()}) == len(tokens)
    assert not torch.equal(found[:, :4], generate(model, tokens, seed=2, **settings).tokens[:, :4])
    backwards = generate(model, tokens, seed=1, sample_index=torch.arange(6).flip(0), **settings)
    assert torch.equal(backwards.tokens.flip(0), found)


def test_almost_no_temperature_is_greedy():
    model = switch_model()
    tokens, _ = prompts("none", 5)
    greedy = generate(model, tokens, max_tokens=TOKENS)
    for settings in ({"temperature": 1e-4}, {"temperature": 5.0, "top_k": 1}):
        assert torch.equal(
            generate(model, tokens, max_tokens=TOKENS, **settings).tokens, greedy.tokens
        )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_tokens": 0}, ["max_tokens is 0"]),
        ({"beams": 0, "temperature": -1.0}, ["beams is 0", "temperature is -1.0"]),
        ({"top_k": 5}, ["set a temperature"]),
        ({"temperature": 1.0, "top_k": 0, "top_p": 1.5}, ["top_k is 0", "top_p is 1.5"]),
        ({"temperature": float("nan")}, ["temperature is nan"]),
        ({"temperature": 1e-300}, ["at least 0.0001"]),
        ({"beams": 2, "length_penalty": 1000.0}, ["length_penalty is 1000.0"]),
        ({"max_tokens": 1 << 70}, ["max_tokens is"]),
        ({"temperature": 1.0, "beams": 2}, ["beams are not sampled"]),
        ({"length_penalty": 2.0}, ["are of beam search"]),
    ],
)
def test_senseless_settings_are_refused_all_at_once(settings, words):
    with pytest.raises(UserError) as caught:
        Decoding(**settings)
    for word in words:
        assert word in str(caught.value)


def test_beams_cannot_be_streamed():
    with pytest.raises(UserError, match="cannot be streamed"):
        stream(switch_model(), torch.tensor([[5]]), beams=2)


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0}, {"beams": 2}], ids=str)
def test_damaged_weights_are_named(settings):
    model = switch_model()
    with torch.no_grad():
        model.decoder.final_norm.weight[0] = float("nan")
    with pytest.raises(UserError, match="NaN or infinite"):
        generate(model, torch.tensor([[5, 6]]), **settings)
