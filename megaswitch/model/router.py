"""Which expert each token goes to, and the losses that keep the load even.

Shapes: G groups of S tokens, E experts, d = d_model; see `groups.py`. The other routers are in
`top_2.py`, `ntlb.py` and `expert_choice.py`, and `routers.py` lists all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import register_dataclass

from megaswitch.config import ModelConfig, MoEConfig
from megaswitch.layers.noise import drop
from megaswitch.layers.norm import at_least_fp32
from megaswitch.layers.parameter import parameter, scaled
from megaswitch.model.dispatch import queue_positions
from megaswitch.model.groups import Draws, TokenGroups
from megaswitch.parallel.regions import named
from megaswitch.parallel.tensor_parallel import ALONE, TensorParallel


@dataclass(frozen=True)
class Choices:
    """Which tokens go to which experts: one expert for each token, or K columns of n pairs.

    A token is at most once in a column. A pair that nobody asked for has expert -1.

    Attributes:
        expert: [G, S] int64, of dropped tokens too; or [G, K, n].
        gate: in the router's precision, what the expert's output is multiplied by: [G, S], or
            [G·S/tp] of this rank's tokens; or [G, K, n], for work that tp ranks divide.
        kept: like `expert`, bool: False where the expert's slots were taken and, but in HF capacity
            mode, on padding.
        token: the token of each pair, [G, K, n] int64, counted through all groups; None: each token
            has one expert.
        first: [G, S] int64, the expert that counts for the load-balancing loss; None: there is no
            such loss.
    """

    expert: Tensor
    gate: Tensor
    kept: Tensor
    token: Tensor | None
    first: Tensor | None

    def by_token(self, values: Tensor, tokens: int) -> Tensor:
        """`values`, like `expert`, of the first so many tokens: [tokens], or [tokens, K].

        Where a token is not in a column there is 0, and of experts -1.
        """
        if self.token is None:
            return values.flatten()[:tokens]
        columns = self.token.shape[1]
        empty = -1 if values.dtype == torch.int64 else 0
        table = values.new_full((tokens + 1, columns), empty)  # the last row takes all filler
        column = torch.arange(columns, device=values.device)[:, None].expand_as(self.token)
        table[self.token.clamp(max=tokens), column] = values
        return table[:tokens]


@dataclass(frozen=True)
class Routing(Choices):
    """What a router decided.

    Attributes:
        probabilities: [G, S, E], or [G·S/tp, E] of this rank's tokens.
        aux_loss: scalar, mean over groups of E·Σ f·P (1 when even).
        z_loss: scalar, mean over groups of mean log²Z.
        slots: most tokens that any expert keeps of all groups; None: nothing is dropped.
    """

    probabilities: Tensor
    aux_loss: Tensor
    z_loss: Tensor
    slots: int | None


# FSDP2 of torch 2.11 finds the tensors of an output only if it is a pytree.
register_dataclass(Routing)


def expert_capacity(group_tokens: int, num_experts: int, factor: float, minimum: int) -> int:
    """Slots per expert in a group (Mesh-TF `transformer_moe_layer_v1`; floor rounding)."""
    return max(min(group_tokens, math.floor(group_tokens * factor / num_experts)), minimum)


class Router(nn.Module):
    """What all routers share. `weight` [E, d_model]; computes in at least fp32 unless bf16 is set.

    A router of another kind says which tokens go where in `choose`, and how many experts work on a
    token in `experts_per_token`.
    """

    tp: TensorParallel = ALONE

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config.moe
        shape = (config.moe.num_experts, config.d_model)
        self.weight = parameter(shape, (None, None), scaled(config.init_scale, config.d_model))

    @staticmethod
    def experts_per_token(config: MoEConfig) -> float:
        """Most experts that work on a token; on average, where experts choose."""
        raise NotImplementedError

    def choose(
        self, probabilities: Tensor, logits: Tensor, groups: TokenGroups, draws: Draws | None
    ) -> Choices:
        """Decide.

        Args:
            probabilities: [G, S, E], or [G·S/tp, E] of this rank's tokens.
            logits: likewise.
            groups: which tokens count.
            draws: see `forward`.
        """
        raise NotImplementedError

    @named("router")
    def forward(self, x: Tensor, groups: TokenGroups, draws: Draws | None) -> Routing:
        """Route.

        Args:
            x: [G, S, d_model] in any floating dtype, or [G·S/tp, d_model] of this rank's tokens.
            groups: which tokens count.
            draws: randomness for these tokens; None where nothing is random.
        """
        with torch.autocast(x.device.type, enabled=False):
            bf16 = self.config.router_precision == "bf16"
            rounded = x.bfloat16() if bf16 else at_least_fp32(x)
            logits = self._logits(rounded, draws)
            probabilities = torch.softmax(logits, -1)
            choices = self.choose(probabilities, logits, groups, draws)
            aux_loss, z_loss = self._losses(probabilities, logits, choices.first, groups)
            slots = self._slots(groups)
            return Routing(
                **vars(choices),
                probabilities=probabilities,
                aux_loss=aux_loss,
                z_loss=z_loss,
                slots=None if slots is None else sum(slots),
            )

    def _logits(self, x: Tensor, draws: Draws | None) -> Tensor:
        """[..., E] of x [..., d_model], whose dtype decides the precision; explores in training."""
        config = self.config
        if draws is not None and draws.noise is not None:
            if config.exploration == "jitter" and config.jitter:
                x = x * self._jitter_factors(x, draws).to(x.dtype)
            elif config.exploration == "input-dropout":
                uniform = draws.uniform(".input_dropout", x.shape[-1], x.device)
                x = drop(x, uniform, config.input_dropout)
        return F.linear(x, self.weight.to(x.dtype))

    def _jitter_factors(self, x: Tensor, draws: Draws) -> Tensor:
        """U(1 - jitter, 1 + jitter), like x."""
        uniform = draws.uniform("", x.shape[-1], x.device).view(x.shape)
        return 1.0 + self.config.jitter * (2.0 * uniform - 1.0)

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

    def _candidates(self, groups: TokenGroups) -> Tensor:
        """[G, S] bool: the tokens that may go to an expert."""
        # HF routes padding like any other token; the paper's code masks it out of dispatch.
        return groups.exists if self.config.capacity_mode == "hf" else groups.real

    def _kept(self, expert: Tensor, candidates: Tensor, slots: list[int] | None) -> Tensor:
        """[G, A] bool: the first of each expert's queue, of choices [G, A] that queue in order."""
        if slots is None:
            return candidates
        position = queue_positions(expert, candidates, self.config.num_experts)
        return candidates & (position < per_group(slots, expert.device))

    def _of_all_tokens(self, own: Tensor, groups: TokenGroups) -> Tensor:
        """[G, S, k] of all tokens from [G, S, k], or [n, k] of this rank's; without gradient."""
        if own.ndim == 3:
            return own.detach()
        return self.tp.all_tokens(own.flatten()).view(*groups.real.shape, -1)

    def _for_features(self, own: Tensor, groups: TokenGroups) -> Tensor:
        """Likewise, for work in which each tp rank has some features; its gradient is summed."""
        return self.tp.for_features(own, parts=own.ndim == 2).view(*groups.real.shape, -1)

    def _counted(self, groups: TokenGroups, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[G, S] weight of each token in its group's means, and [G] weight of each group."""
        real, exists = groups.real.to(dtype), groups.exists.to(dtype)
        if self.config.aux_loss_padding == "excluded":
            counted, share = real, torch.ones_like(real[:, 0])
        else:
            counted, share = exists, real.sum(1) / exists.sum(1)
        return counted / counted.sum(1, keepdim=True).clamp(min=1), share

    def _losses(
        self, probabilities: Tensor, logits: Tensor, expert: Tensor | None, groups: TokenGroups
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
        z_loss = (per_group * share).mean()
        if expert is None:
            return z_loss.new_zeros(()), z_loss
        density = torch.zeros_like(proxy).scatter_add_(1, expert, weight)
        balance = (density * proxy).sum(1) * self.config.num_experts
        return (balance * share).mean(), z_loss

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


def per_group(slots: list[int], device: torch.device) -> Tensor:
    """`slots` to compare places with: [1], or [G, 1] where groups differ."""
    if len(set(slots)) == 1:
        return torch.full((1,), slots[0], device=device)
    return torch.tensor(slots, device=device)[:, None]


class SwitchRouter(Router):
    """Top-1 routing (paper §2.1): the gate is the expert's probability, not renormalised."""

    @staticmethod
    def experts_per_token(config: MoEConfig) -> float:
        """One."""
        return 1.0

    def choose(
        self, probabilities: Tensor, logits: Tensor, groups: TokenGroups, draws: Draws | None
    ) -> Choices:
        """The most probable expert, or one that is sampled; who comes first is served first."""
        if self.config.exploration == "sample" and draws is not None and draws.noise is not None:
            own = self._sample(logits, draws)
            gate = probabilities.gather(-1, own[..., None]).squeeze(-1)
        else:
            gate, own = probabilities.max(-1)
        expert = self.tp.all_tokens(own).view(groups.real.shape)
        kept = self._kept(expert, self._candidates(groups), self._slots(groups))
        return Choices(expert=expert, gate=gate, kept=kept, token=None, first=expert)

    def _sample(self, logits: Tensor, draws: Draws) -> Tensor:
        """Experts drawn from softmax(logits / temperature) (Mesh-TF `_switch_gating`), like logits.

        By Gumbel's trick, which needs no sum over experts.
        """
        uniform = draws.uniform(".sample", logits.shape[-1], logits.device)
        # A draw is a multiple of 2⁻²⁴; 0 stands for what is below half of that.
        gumbel = -torch.log(-torch.log(uniform.clamp(min=2.0**-25).view(logits.shape)))
        return (logits.detach() / self.config.temperature + gumbel).argmax(-1)
