"""Generation with cached keys and values beside none, and beside HF's on the same weights.

Command: python tools/benchmarks/generate.py --output tools/benchmarks/generate.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from side_by_side import compare, record
from transformers import (
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

import megaswitch
from megaswitch.checkpoint.huggingface import from_hf
from megaswitch.checkpoint.huggingface_config import config_from_hf
from megaswitch.model.switch_transformer import SwitchTransformer

ROWS, PROMPT, NEW = 8, 64, 64
SHAPE: dict[str, Any] = {
    "vocab_size": 32_128,
    "d_kv": 64,
    "num_layers": 6,
    "num_decoder_layers": 6,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}


def models(d_model: int, experts: int) -> tuple[Any, SwitchTransformer]:
    """HF's model at random and ours with its weights; no experts: T5."""
    shape = SHAPE | {"d_model": d_model, "d_ff": 4 * d_model, "num_heads": d_model // 64}
    if experts:
        config = SwitchTransformersConfig(
            **shape,
            num_experts=experts,
            expert_capacity=ROWS * PROMPT,
            num_sparse_encoder_layers=3,
            num_sparse_decoder_layers=3,
        )
        theirs = SwitchTransformersForConditionalGeneration(config).eval()
    else:
        theirs = T5ForConditionalGeneration(T5Config(**shape)).eval()
    with torch.no_grad():
        theirs.get_input_embeddings().weight[1] = 0.0  # EOS never wins, so all texts are as long
    ours_config = config_from_hf(theirs.config.to_dict())
    ours = SwitchTransformer(ours_config)
    ours.load_state_dict(from_hf(theirs.state_dict(), ours_config))
    return theirs, ours.eval()


def variants(theirs: Any, ours: SwitchTransformer, beams: int) -> dict[str, Callable[[], Any]]:
    """The functions to compare; all must find the same texts."""
    tokens = torch.randint(2, SHAPE["vocab_size"], (ROWS, PROMPT))

    def of_theirs(cache: bool) -> torch.Tensor:
        texts = theirs.generate(
            tokens, max_new_tokens=NEW, do_sample=False, num_beams=beams, use_cache=cache
        )
        return texts[:, 1:]

    def of_ours(cache: bool) -> torch.Tensor:
        return megaswitch.generate(ours, tokens, max_tokens=NEW, beams=beams, cache=cache).tokens

    expected = of_theirs(cache=True)
    assert expected.shape == (ROWS, NEW)
    for cache in (True, False):
        assert torch.equal(of_ours(cache), expected)
    compared = {
        "HF, cache": lambda: of_theirs(cache=True),
        "ours, cache": lambda: of_ours(cache=True),
    }
    if beams == 1:  # with beams it only takes longer
        compared["ours, no cache"] = lambda: of_ours(cache=False)
    return compared


def main() -> None:
    """Compare over dense and sparse models, greedy and with beams."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for d_model, experts in ((256, 0), (256, 8), (256, 64), (512, 32)):
        torch.manual_seed(0)
        theirs, ours = models(d_model, experts)
        for beams in (1, 4):
            kind = f"{experts} experts" if experts else "dense"
            name = f"d_model {d_model}, {kind}, {beams} beam(s), {ROWS} × {NEW} tokens"
            print(name)
            results[name] = compare(variants(theirs, ours, beams), rounds=arguments.rounds)
    for result in results.values():
        for of in result.values():
            of["tokens_per_cpu_second"] = ROWS * NEW / of["cpu_seconds"]
    record("tools/benchmarks/generate.py", results, arguments.output)


if __name__ == "__main__":
    main()
