"""The mixture of experts that the paper compares itself with: two experts for each token."""

from __future__ import annotations

import torch
from torch import Tensor

from megaswitch.config import MoEConfig
from megaswitch.model.groups import Draws, TokenGroups
from megaswitch.model.router import Choices, Router


class Top2Router(Router):
    """Top-2 routing (Mesh-TF `_top_2_gating`; Table 1's MoE-Base).

    Gates are the two best probabilities divided by their sum, whether or not both experts then take
    the token. Capacity is that of top-1: second choices queue behind all first ones of the group.
    The load-balancing loss looks at first choices alone.

    Where Mesh-TF's second expert could be the first again, because all other probabilities
    underflow to 0, ours is another one.
    """

    @staticmethod
    def experts_per_token(config: MoEConfig) -> float:
        """Two, unless second experts are never asked in training."""
        return 1.0 if config.train_second_policy == "none" else 2.0

    def choose(
        self, probabilities: Tensor, logits: Tensor, groups: TokenGroups, draws: Draws | None
    ) -> Choices:
        """The two most probable experts, the second where the policy wants it."""
        first_gate, first = probabilities.max(-1)
        second_gate, second = probabilities.scatter(-1, first[..., None], -1.0).max(-1)
        gates = torch.stack([first_gate, second_gate], -1)
        gates = gates / (first_gate + second_gate + 1e-9)[..., None]
        second = torch.where(self._wanted(gates.detach()[..., 1], draws), second, -1)

        chosen = self._of_all_tokens(torch.stack([first, second], -1), groups)
        expert = chosen.transpose(1, 2)
        candidates = self._candidates(groups)[:, None] & (expert >= 0)
        kept = self._kept(expert.flatten(1), candidates.flatten(1), self._slots(groups))
        token = torch.arange(groups.real.numel(), device=expert.device)
        return Choices(
            expert=expert,
            gate=self._for_features(gates, groups).transpose(1, 2),
            kept=kept.view_as(expert),
            token=token.view(len(expert), 1, -1).expand_as(expert),
            first=chosen[..., 0],
        )

    def _wanted(self, gate: Tensor, draws: Draws | None) -> Tensor:
        """Whether a second expert is asked, bool like its renormalised gate."""
        config = self.config
        policy = config.train_second_policy if self.training else config.eval_second_policy
        if policy in ("all", "none"):
            return torch.full_like(gate, policy == "all", dtype=torch.bool)
        if policy == "threshold":
            return gate > config.second_threshold
        assert draws is not None, "the random policy needs draws"
        uniform = draws.uniform(".second", 1, gate.device).view(gate.shape)
        return uniform < gate / config.second_threshold

    def _counted(self, groups: TokenGroups, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """As `Router._counted`; but Mesh-TF's top-2 code masks padding out before it takes means.

        So with "scaled" f and P shrink by the share of real tokens, each.
        """
        if self.config.aux_loss_padding == "excluded":
            return super()._counted(groups, dtype)
        real, exists = groups.real.to(dtype), groups.exists.to(dtype)
        return real / exists.sum(1, keepdim=True), torch.ones_like(real[:, 0])
