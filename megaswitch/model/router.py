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
from torch.utils._pytree import register_dataclass

from megaswitch.config import ModelConfig
from megaswitch.layers.norm import at_least_fp32
from megaswitch.layers.parameter import parameter, scaled
from megaswitch.model.dispatch import queue_positions
from megaswitch.parallel.tensor_parallel import ALONE, TensorParallel


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
        gate: in at least fp32, the chosen expert's probability, not renormalised: [G, S], or
            [G·S/tp] of this rank's tokens.
        kept: [G, S] bool, False where the expert's slots were taken and, but in HF capacity mode,
            on padding.
        probabilities: [G, S, E], or [G·S/tp, E] of this rank's tokens.
        aux_loss: scalar, mean over groups of E·Σ f·P (1 when even).
        z_loss: scalar, mean over groups of mean log²Z.
        slots: most tokens that any expert keeps of all groups; None: nothing is dropped.
    """

    expert: Tensor
    gate: Tensor
    kept: Tensor
    probabilities: Tensor
    aux_loss: Tensor
    z_loss: Tensor
    slots: int | None


# FSDP2 of torch 2.11 finds the tensors of an output only if it is a pytree.
register_dataclass(Routing)


def expert_capacity(group_tokens: int, num_experts: int, factor: float, minimum: int) -> int:
    """Slots per expert in a group (Mesh-TF `transformer_moe_layer_v1`; floor rounding)."""
    return max(min(group_tokens, math.floor(group_tokens * factor / num_experts)), minimum)


class SwitchRouter(nn.Module):
    """Top-1 routing (paper §2.1). `weight` [E, d_model]; computes in at least fp32."""

    tp: TensorParallel = ALONE

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config.moe
        shape = (config.moe.num_experts, config.d_model)
        self.weight = parameter(shape, (None, None), scaled(config.init_scale, config.d_model))

    def forward(self, x: Tensor, groups: TokenGroups, jitter: Tensor | None) -> Routing:
        """Route.

        Args:
            x: [G, S, d_model] in any floating dtype, or [G·S/tp, d_model] of this rank's tokens.
            groups: which tokens count.
            jitter: factors for the router's input in training, like x; else None.
        """
        with torch.autocast(x.device.type, enabled=False):
            wide = at_least_fp32(x)
            if jitter is not None:
                wide = wide * jitter
            logits = F.linear(wide, self.weight.to(wide.dtype))
            probabilities = torch.softmax(logits, -1)
            gate, expert = probabilities.max(-1)
            expert = self.tp.all_tokens(expert).view(groups.real.shape)
            slots = self._slots(groups)
            aux_loss, z_loss = self._losses(probabilities, logits, expert, groups)
            return Routing(
                expert=expert,
                gate=gate,
                kept=self._kept(expert, groups, slots),
                probabilities=probabilities,
                aux_loss=aux_loss,
                z_loss=z_loss,
                slots=None if slots is None else sum(slots),
            )

    def _slots(self, groups: TokenGroups) -> list[int] | None:
        """Slots per expert in each group; None without limit."""
        config = self.config
        if config.capacity_mode == "dropless" or not groups.limited:
            return None
        if config.capacity_mode == "hf":
            return [config.hf_capacity] * len(groups.sizes)
        factor = config.train_capacity_factor if self.training else config.eval_capacity_factor
        return [
            expert_capacity(size, config.num_experts, factor, config.min_capacity)
            for size in groups.sizes
        ]

    def _kept(self, expert: Tensor, groups: TokenGroups, slots: list[int] | None) -> Tensor:
        """[G, S] bool: the first tokens of each expert's queue, in token order."""
        # HF routes padding like any other token; the paper's code masks it out of dispatch.
        candidates = groups.exists if self.config.capacity_mode == "hf" else groups.real
        if slots is None:
            return candidates
        position = queue_positions(expert, candidates, self.config.num_experts)
        if len(set(slots)) == 1:
            return candidates & (position < slots[0])
        return candidates & (position < torch.tensor(slots, device=expert.device)[:, None])

    def _counted(self, groups: TokenGroups, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[G, S] weight of each token in its group's means, and [G] weight of each group."""
        real, exists = groups.real.to(dtype), groups.exists.to(dtype)
        if self.config.aux_loss_padding == "excluded":
            counted, share = real, torch.ones_like(real[:, 0])
        else:
            counted, share = exists, real.sum(1) / exists.sum(1)
        return counted / counted.sum(1, keepdim=True).clamp(min=1), share

    def _losses(
        self, probabilities: Tensor, logits: Tensor, expert: Tensor, groups: TokenGroups
    ) -> tuple[Tensor, Tensor]:
        """The load-balancing loss and the router z-loss.

        The first is the mean over groups of E·Σ_e f_e·P_e, f before any drop (paper eq. 4-6,
        Mesh-TF), the second the mean over groups of the mean of log²Z (ST-MoE).
        """
        weight, share = self._counted(groups, probabilities.dtype)
        squares = torch.logsumexp(logits, -1).square()
        if probabilities.ndim == 3:
            proxy = torch.einsum("gse,gs->ge", probabilities, weight)
            per_group = (squares * weight).sum(1)
        else:
            proxy, per_group = self._sums_of_all_ranks(probabilities, squares, weight)
        density = torch.zeros_like(proxy).scatter_add_(1, expert, weight)
        balance = (density * proxy).sum(1) * self.config.num_experts
        return (balance * share).mean(), (per_group * share).mean()

    def _sums_of_all_ranks(
        self, probabilities: Tensor, squares: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Weighted sums over each group, whose tokens lie on several ranks.

        Args:
            probabilities: [N, E] of this rank's tokens.
            squares: [N].
            weight: [G, S].

        Returns:
            [G, E] and [G].
        """
        tokens = self.tp.tokens(probabilities, weight.numel())
        group = torch.arange(weight.numel(), device=weight.device)[tokens] // weight.shape[1]
        terms = torch.cat([probabilities, squares[:, None]], 1) * weight.flatten()[tokens, None]
        sums = terms.new_zeros(len(weight), terms.shape[1]).index_add(0, group, terms)
        sums = self.tp.sum_terms(sums)
        return sums[:, :-1], sums[:, -1]
