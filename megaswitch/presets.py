"""Named model shapes, as plain `[model]` tables.

Names are those of the public checkpoints. `*-paper` are the shapes of the paper's Table 9 where
they differ from what was released. Group sizes and capacity factors are Flaxformer's
(`t5x/configs/moe`), which the released models were trained with.
"""

from __future__ import annotations

from typing import Any

Table = dict[str, Any]


def _t5(
    d_model: int, d_ff: int, num_heads: int, num_layers: int, *, d_kv: int = 64, **other: Any
) -> Table:
    return {
        "vocab_size": 32128,
        "d_model": d_model,
        "d_ff": d_ff,
        "d_kv": d_kv,
        "num_heads": num_heads,
        "num_encoder_layers": num_layers,
        "num_decoder_layers": num_layers,
        "activation": "relu",
        "tie_embeddings": True,
        "init_scale": 1.0,
    } | other


def _v1_1(d_model: int, d_ff: int, num_heads: int, num_layers: int, **other: Any) -> Table:
    gated: Table = {"activation": "gated-gelu", "tie_embeddings": False}
    return _t5(d_model, d_ff, num_heads, num_layers, **gated | other)


def _switch(dense: Table, num_experts: int, *, every: int = 2, **moe: Any) -> Table:
    defaults: Table = {
        "group_size": 8192,
        "train_capacity_factor": 1.25,
        "eval_capacity_factor": 2.0,
        "min_capacity": 4,
    }
    places = {"encoder_sparse_step": every, "decoder_sparse_step": every}
    return dense | {
        "init_scale": 0.1,
        "moe": {"num_experts": num_experts} | places | defaults | moe,
    }


# A tied table of unit size makes a short run slow to start, so the tiny models have a head.
_TINY = _t5(128, 512, 4, 2, d_kv=32, vocab_size=2048, tie_embeddings=False)
_BASE = _t5(768, 3072, 12, 12)
_LARGE = _t5(1024, 4096, 16, 24)
_XXL = _v1_1(4096, 10240, 64, 24)
# mT5 is T5 v1.1 with 250,112 pieces for 101 languages.
_MT5 = {
    "small": (512, 1024, 6, 8),
    "base": (768, 2048, 12, 12),
    "large": (1024, 2816, 16, 24),
    "xl": (2048, 5120, 32, 24),
    "xxl": (4096, 10240, 64, 24),
}
_MULTILINGUAL: Table = {"vocab_size": 250_112}
_GEGLU_BASE = _t5(768, 2048, 12, 12, activation="gated-gelu")
_GEGLU_LARGE = _t5(1024, 2816, 16, 24, activation="gated-gelu")
_XXL_MOE: Table = {"group_size": 4096, "eval_capacity_factor": 4.0, "min_capacity": 2}
_C_MOE: Table = {"every": 1, "group_size": 2048, "train_capacity_factor": 1.0, "min_capacity": 2}

PRESETS: dict[str, Table] = {
    # For a laptop: the demo's shape, and its dense twin of equal FLOPs per token.
    "switch-tiny": _switch(_TINY, 8, group_size=512),
    "t5-tiny": _TINY,
    "t5-small": _t5(512, 2048, 8, 6),
    "t5-base": _BASE,
    "t5-large": _LARGE,
    "t5-3b": _t5(1024, 16384, 32, 24, d_kv=128),
    "t5-11b": _t5(1024, 65536, 128, 24, d_kv=128),
    "t5-v1_1-small": _v1_1(512, 1024, 6, 8),
    "t5-v1_1-base": _v1_1(768, 2048, 12, 12),
    "t5-v1_1-large": _v1_1(1024, 2816, 16, 24),
    "t5-v1_1-xl": _v1_1(2048, 5120, 32, 24),
    "t5-v1_1-xxl": _XXL,
    **{f"switch-base-{n}": _switch(_BASE, n) for n in (2, 4, 8, 16, 32, 64, 128, 256)},
    # The paper's baseline, top-2 mixtures in the same places; Table 1 has factors 1.0 and 1.25 too.
    "moe-base-128": _switch(_BASE, 128, router="top-2", train_capacity_factor=2.0),
    "switch-large-128": _switch(_LARGE, 128, group_size=4096),
    "switch-xxl-128": _switch(_XXL, 128, **_XXL_MOE),
    **{f"mt5-{size}": _v1_1(*shape, **_MULTILINGUAL) for size, shape in _MT5.items()},
    # mT5-Base with experts (paper §4.3). How many, the paper does not say: as its Switch-Base.
    "mswitch-base-128": _switch(_v1_1(*_MT5["base"], **_MULTILINGUAL), 128),
    # 30 heads as released; the paper says 32.
    "switch-c-2048": _switch(_t5(2080, 6144, 30, 15, tie_embeddings=False), 2048, **_C_MOE),
    # Table 9 to the letter. Its XXL has 64 experts, which cannot give the 395B it states, and its
    # "T5-XXL" is t5-v1_1-xxl.
    "t5-base-paper": _GEGLU_BASE,
    "t5-large-paper": _GEGLU_LARGE,
    "switch-base-128-paper": _switch(_GEGLU_BASE, 128),
    "switch-large-128-paper": _switch(_GEGLU_LARGE, 128, group_size=4096),
    "switch-xxl-64-paper": _switch(_XXL, 64, **_XXL_MOE),
    "switch-c-2048-paper": _switch(_t5(2080, 6144, 32, 15), 2048, **_C_MOE),
}
