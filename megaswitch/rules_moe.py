"""Rules of mixtures of experts: which routers go with which options. Needs no process group."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megaswitch.schema import RunConfig
    from megaswitch.schema_moe import MoEConfig


def check_moe(config: RunConfig) -> Iterator[str]:
    """Problems of `config.model.moe`."""
    moe = config.model.moe
    if not moe.num_experts:
        return
    yield from _check_router(moe)
    yield from _check_top_2(moe)
    if moe.exploration == "sample" and moe.router != "switch":
        yield (
            f"model.moe.exploration='sample' draws one expert, and model.moe.router={moe.router!r} "
            "ranks them; use jitter, input-dropout or argmax, or router='switch'"
        )
    if moe.router_precision == "fp32" and config.train.precision == "fp32":
        yield (
            "model.moe.router_precision='fp32' would be ignored because train.precision='fp32' "
            "computes everything so; use 'selective', or train.precision='bf16'"
        )
    no_hidden_units = moe.attention == "linear" and not moe.feed_forward
    if moe.expert_dropout is not None and no_hidden_units:
        yield (
            f"model.moe.expert_dropout={moe.expert_dropout} would be ignored because model.moe."
            "attention='linear' with feed_forward=false leaves experts without hidden units; "
            "remove it"
        )


def _check_router(moe: MoEConfig) -> Iterator[str]:
    if moe.router in ("ntlb", "top-2") and moe.num_experts < 2:
        yield (
            f"model.moe.router={moe.router!r} asks a second expert, and model.moe.num_experts="
            f"{moe.num_experts}; use 2 or more, or router='switch'"
        )
    elif moe.router == "ntlb" and moe.rounds > moe.num_experts:
        yield (
            f"model.moe.rounds={moe.rounds} must not exceed model.moe.num_experts="
            f"{moe.num_experts}, as no expert is asked twice; use 2 … {moe.num_experts}"
        )
    if moe.router == "ntlb" and moe.capacity_mode == "dropless":
        yield (
            "model.moe.router='ntlb' looks for experts with a slot left, and model.moe."
            "capacity_mode='dropless' has no slots; use router='switch', or capacity_mode='group'"
        )
    if moe.router == "expert-choice" and moe.capacity_mode != "group":
        yield (
            f"model.moe.router='expert-choice' takes as many tokens as an expert has slots, and "
            f"model.moe.capacity_mode={moe.capacity_mode!r} gives none that grow with the group; "
            "use capacity_mode='group'"
        )


def _check_top_2(moe: MoEConfig) -> Iterator[str]:
    if moe.router != "top-2":
        return
    policies = {moe.train_second_policy, moe.eval_second_policy}
    if moe.second_threshold != 0.2 and not policies & {"threshold", "random"}:
        yield (
            f"model.moe.second_threshold={moe.second_threshold} would be ignored because neither "
            "second policy is 'threshold' or 'random'; remove it"
        )
