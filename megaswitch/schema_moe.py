"""Every configuration key of `model.moe`: the mixtures of experts."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from megaswitch.schema_keys import STRICT, only_if


def _switch_only(default: Any, description: str, **rules: Any) -> Any:
    extra = rules.pop("json_schema_extra", only_if("model.moe.num_experts"))
    return Field(default=default, description=description, json_schema_extra=extra, **rules)


def _router(*names: str) -> dict[str, Any]:
    return only_if("model.moe.router", *names)


_LIMITED = only_if("model.moe.capacity_mode", "group")
_TOP_2 = _router("top-2")
# Experts that choose have an even load.
_BALANCED = _router("switch", "top-2", "ntlb")
_SecondPolicy = Literal["all", "none", "threshold", "random"]
_EXPERT_ATTENTION = only_if("model.moe.attention", "linear", "ffn")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MoEConfig:
    """The mixtures of experts. With `num_experts` 0 the model is a dense T5. Source: paper §2."""

    num_experts: int = Field(default=0, ge=0, description="experts per Switch layer; 0: dense")
    encoder_sparse_step: int = _switch_only(
        2, "every n-th encoder layer (n-1, 2n-1, …) is sparse; 0: none", ge=0
    )
    decoder_sparse_step: int = _switch_only(
        2, "every n-th decoder layer (n-1, 2n-1, …) is sparse; 0: none", ge=0
    )
    feed_forward: bool = _switch_only(
        True,
        "sparse layers have experts in their FFN; false: in their attention alone (Table 10)",
        json_schema_extra=_EXPERT_ATTENTION,
    )
    attention: Literal["none", "linear", "ffn"] = _switch_only(
        "none",
        "experts that make queries, and keys that are values too, in the self-attention of sparse "
        "layers: none, linear maps, or FFNs (Switch attention, appendix A)",
    )
    router: Literal["switch", "top-2", "ntlb", "expert-choice"] = _switch_only(
        "switch",
        "switch: top-1; top-2: Mesh-TF's mixture of experts, the paper's baseline; ntlb: No Token "
        "Left Behind, overflow goes to the next choice (appendix B); expert-choice: experts choose "
        "tokens (2202.09368), later ones too, so it is not causal in a decoder",
    )
    train_second_policy: _SecondPolicy = _switch_only(
        "random",
        "which tokens go to a second expert in training: all, none, those whose second gate is "
        "above second_threshold, or each with probability gate / second_threshold",
        json_schema_extra=_TOP_2,
    )
    eval_second_policy: _SecondPolicy = _switch_only(
        "random",
        "the same in evaluation, where the place in the row decides what is random",
        json_schema_extra=_TOP_2,
    )
    second_threshold: float = _switch_only(
        0.2, "of the second gate, renormalised", gt=0, le=0.5, json_schema_extra=_TOP_2
    )
    rounds: int = _switch_only(
        4,
        "experts that a token may ask, one after another",
        ge=2,
        json_schema_extra=_router("ntlb"),
    )
    router_precision: Literal["selective", "bf16", "fp32"] = _switch_only(
        "selective",
        "selective: routers compute in fp32, what travels in train.precision; bf16: routers too, "
        "which is unstable; fp32: routers, exchange and experts (Table 2)",
    )
    capacity_mode: Literal["group", "hf", "dropless"] = _switch_only(
        "group", "group: the paper's; hf: fixed slots per row and expert; dropless: no limit"
    )
    group_size: int = _switch_only(
        1024,
        "encoder tokens routed together; a group holds group_size / encoder_length whole rows",
        gt=0,
        json_schema_extra=only_if("model.moe.capacity_mode", "group", "dropless"),
    )
    train_capacity_factor: float = _switch_only(
        1.25,
        "slots per expert in training, as a multiple of an even share",
        gt=0,
        json_schema_extra=_LIMITED,
    )
    eval_capacity_factor: float = _switch_only(
        2.0,
        "the same in evaluation",
        gt=0,
        json_schema_extra=_LIMITED,
    )
    min_capacity: int = _switch_only(
        4,
        "fewest slots per expert and group",
        ge=0,
        json_schema_extra=_LIMITED,
    )
    hf_capacity: int = _switch_only(
        64,
        "slots per row and expert (HF's expert_capacity)",
        gt=0,
        json_schema_extra=only_if("model.moe.capacity_mode", "hf"),
    )
    exploration: Literal["argmax", "sample", "input-dropout", "jitter"] | None = _switch_only(
        None,
        "noise of routers in training (Table 11): none, sampling experts, dropout or jitter of the "
        "input; unset: jitter, but argmax where router is top-2 or expert-choice",
    )
    jitter: float = _switch_only(
        1e-2,
        "router input is multiplied by U(1-jitter, 1+jitter) in training",
        ge=0,
        lt=1,
        json_schema_extra=only_if("model.moe.exploration", "jitter"),
    )
    temperature: float = _switch_only(
        1.0,
        "experts are sampled from softmax(logits / temperature)",
        gt=0,
        json_schema_extra=only_if("model.moe.exploration", "sample"),
    )
    input_dropout: float = _switch_only(
        0.1,
        "dropout of the router's input",
        gt=0,
        lt=1,
        json_schema_extra=only_if("model.moe.exploration", "input-dropout"),
    )
    aux_loss_weight: float = _switch_only(
        1e-2, "weight α of the load-balancing loss", ge=0, json_schema_extra=_BALANCED
    )
    aux_loss_reduction: Literal["sum", "mean"] = _switch_only(
        "sum", "over layers: sum as Mesh-TF (the paper's code), mean as T5X"
    )
    aux_loss_padding: Literal["scaled", "excluded"] = _switch_only(
        "scaled",
        "scaled: padding counts, the loss is scaled by the rest's share (Mesh-TF); "
        "excluded: padding does not count",
    )
    z_loss_weight: float = _switch_only(0.0, "weight of the router z-loss (ST-MoE; 0: off)", ge=0)
    expert_dropout: float | None = _switch_only(
        None, "dropout inside the experts; unset: model.dropout (the paper fine-tunes with 0.4)",
        ge=0, lt=1,
    )  # fmt: skip

    def __post_init__(self) -> None:
        """Give `exploration` the default of the router: Mesh-TF perturbs top-1 routing alone."""
        if self.exploration is None:
            usual = "jitter" if self.router in ("switch", "ntlb") else "argmax"
            object.__setattr__(self, "exploration", usual)

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts of a sparse layer that are mixtures: "self_attention", "ffn", or both."""
        attention = () if self.attention == "none" else ("self_attention",)
        return (*attention, "ffn") if self.feed_forward else attention
