"""Experts that choose tokens: an even load without a loss for it (arXiv 2202.09368)."""

from __future__ import annotations

import torch
from torch import Tensor

from megaswitch.config import MoEConfig
from megaswitch.model.groups import Draws, TokenGroups
from megaswitch.model.router import Choices, Router, per_group


class ExpertChoiceRouter(Router):
    """Each expert takes the tokens of a group that are most probably its own, C of them.

    C is `expert_capacity`, so on average as many experts as the capacity factor says work on a
    token; on some many, on some none. The gate is the token's probability of the expert, a softmax
    over experts. Of equals the earlier token is taken.

    Whether a token is taken depends on all tokens of its group, those after it too: in a decoder
    this is not causal, and its training loss is not that of a model that generates.
    """

    @staticmethod
    def experts_per_token(config: MoEConfig) -> float:
        """On average, in training."""
        return min(config.train_capacity_factor, float(config.num_experts))

    def choose(
        self, probabilities: Tensor, logits: Tensor, groups: TokenGroups, draws: Draws | None
    ) -> Choices:
        """The best tokens of each expert: a column for each, [G, E, C]."""
        slots = self._slots(groups)
        assert slots is not None, "experts that choose need a number of slots"
        scores = self._for_features(probabilities, groups).transpose(1, 2)
        candidates = self._candidates(groups)
        wanted = scores.detach().masked_fill(~candidates[:, None], -1.0)
        most = min(max(slots), candidates.shape[1])
        token = wanted.sort(stable=True, dim=-1, descending=True).indices[..., :most]
        place = torch.arange(most, device=token.device)
        kept = candidates[:, None].expand_as(wanted).gather(2, token)
        kept = kept & (place < per_group(slots, token.device))[..., None, :]
        expert = torch.arange(self.config.num_experts, device=token.device)[:, None]
        start = torch.arange(len(token), device=token.device)[:, None, None] * wanted.shape[2]
        return Choices(
            expert=torch.where(kept, expert, -1),
            gate=scores.gather(2, token),
            kept=kept,
            token=token + start,
            first=None,
        )
