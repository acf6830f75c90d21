"""Which expert each token goes to, and the losses that keep the load even.

Shapes: G groups of S tokens, E experts, d = d_model. A group is R whole consecutive rows of one
stack; nothing in a group depends on how groups are spread over micro-batches or ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaswitch.config import ModelConfig
from megaswitch.layers.norm import at_least_fp32
from megaswitch.layers.parameter import parameter, scaled
from megaswitch.model.dispatch import queue_positions


@dataclass(frozen=True)
class TokenGroups:
    """The tokens of one stack, in routing groups.

    Attributes:
        exists: [G, S] bool, False on the filler that completes a last group of fewer rows.
        real: [G, S] bool, False on filler and on padding.
        sizes: tokens that exist in each group, known without reading the tensors.
        limited: False where experts take all that come, whatever the capacity mode.
    """

    exists: Tensor
    real: Tensor
    sizes: tuple[int, ...]
    limited: bool = True


@dataclass(frozen=True)
class Routing:
    """What a router decided.

    Attributes:
        expert: [G, S] int64, the chosen expert (of dropped tokens too).
        gate: [G, S] in at least fp32, the chosen expert's probability, not renormalised.
        kept: [G, S] bool, False where the expert's slots were taken and, but in HF capacity mode,
            on padding.
        probabilities: [G, S, E].
        aux_loss: scalar, mean over groups of E·Σ f·P (1 when even).
        z_loss: scalar, mean over groups of mean log²Z.
    """

    expert: Tensor
    gate: Tensor
    kept: Tensor
    probabilities: Tensor
    aux_loss: Tensor
    z_loss: Tensor


def expert_capacity(group_tokens: int, num_experts: int, factor: float, minimum: int) -> int:
    """Slots per expert in a group (Mesh-TF `transformer_moe_layer_v1`; floor rounding)."""
    return max(min(group_tokens, math.floor(group_tokens * factor / num_experts)), minimum)


class SwitchRouter(nn.Module):
    """Top-1 routing (paper §2.1). `weight` [E, d_model]; computes in at least fp32."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config.moe
        shape = (config.moe.num_experts, config.d_model)
        self.weight = parameter(shape, (None, None), scaled(config.init_scale, config.d_model))

    def forward(self, x: Tensor, groups: TokenGroups, jitter: Tensor | None) -> Routing:
        """Route.

        Args:
            x: [G, S, d_model] in any floating dtype.
            groups: which tokens count.
            jitter: [G, S, d_model] factors for the router's input in training, else None.
        """
        with torch.autocast(x.device.type, enabled=False):
            wide = at_least_fp32(x)
            if jitter is not None:
                wide = wide * jitter
            logits = F.linear(wide, self.weight.to(wide.dtype))
            probabilities = torch.softmax(logits, -1)
            gate, expert = probabilities.max(-1)
            return Routing(
                expert=expert,
                gate=gate,
                kept=self._kept(expert, groups),
                probabilities=probabilities,
                aux_loss=self._balance(probabilities, expert, groups),
                z_loss=self._log_z(logits, groups),
            )

    def _kept(self, expert: Tensor, groups: TokenGroups) -> Tensor:
        """[G, S] bool: the first tokens of each expert's queue, in token order."""
        mode = self.config.capacity_mode
        # HF routes padding like any other token; the paper's code masks it out of dispatch.
        candidates = groups.exists if mode == "hf" else groups.real
        if mode == "dropless" or not groups.limited:
            return candidates
        position = queue_positions(expert, candidates, self.config.num_experts)
        return candidates & (position < self._capacity(groups))

    def _capacity(self, groups: TokenGroups) -> Tensor | int:
        """Slots per expert: one number, or [G, 1] when the last group has fewer rows."""
        config = self.config
        if config.capacity_mode == "hf":
            return config.hf_capacity
        factor = config.train_capacity_factor if self.training else config.eval_capacity_factor
        slots = [
            expert_capacity(size, config.num_experts, factor, config.min_capacity)
            for size in groups.sizes
        ]
        if len(set(slots)) == 1:
            return slots[0]
        return torch.tensor(slots, device=groups.real.device)[:, None]

    def _counted(self, groups: TokenGroups, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[G, S] weight of each token in its group's means, and [G] weight of each group."""
        real, exists = groups.real.to(dtype), groups.exists.to(dtype)
        if self.config.aux_loss_padding == "excluded":
            counted, share = real, torch.ones_like(real[:, 0])
        else:
            counted, share = exists, real.sum(1) / exists.sum(1)
        return counted / counted.sum(1, keepdim=True).clamp(min=1), share

    def _balance(self, probabilities: Tensor, expert: Tensor, groups: TokenGroups) -> Tensor:
        """Mean over groups of E·Σ_e f_e·P_e, f before any drop (paper eq. 4-6, Mesh-TF)."""
        weight, share = self._counted(groups, probabilities.dtype)
        proxy = torch.einsum("gse,gs->ge", probabilities, weight)
        density = torch.zeros_like(proxy).scatter_add_(1, expert, weight)
        per_group = (density * proxy).sum(1) * self.config.num_experts
        return (per_group * share).mean()

    def _log_z(self, logits: Tensor, groups: TokenGroups) -> Tensor:
        """Mean over groups of the mean of log²Z (ST-MoE's router z-loss)."""
        weight, share = self._counted(groups, logits.dtype)
        per_group = (torch.logsumexp(logits, -1).square() * weight).sum(1)
        return (per_group * share).mean()
