"""No Token Left Behind: who finds an expert full asks the next one (paper, appendix B)."""

from __future__ import annotations

import torch
from torch import Tensor

from megaswitch.config import MoEConfig
from megaswitch.model.dispatch import queue_positions
from megaswitch.model.groups import Draws, TokenGroups
from megaswitch.model.router import Choices, Router, per_group


class NoTokenLeftBehindRouter(Router):
    """Top-1 routing in rounds (Mesh-TF `_ntlb_gating`).

    In round i those still without an expert queue for their i-th choice, behind all whom it took
    before. The gate is the probability of the expert that took the token. The load-balancing loss
    is Switch's, of first choices; Mesh-TF's, by broadcasting, averages f over the choices.
    """

    @staticmethod
    def experts_per_token(config: MoEConfig) -> float:
        """One."""
        return 1.0

    def choose(
        self, probabilities: Tensor, logits: Tensor, groups: TokenGroups, draws: Draws | None
    ) -> Choices:
        """The best expert with a slot left; without one, the first choice and not kept."""
        # A stable sort, so that of equals the lower index comes first.
        ranked = probabilities.detach().sort(stable=True, dim=-1, descending=True).indices
        choices = self._of_all_tokens(ranked[..., : self.config.rounds], groups)
        first = choices[..., 0]
        slots, candidates = self._slots(groups), self._candidates(groups)
        expert, kept = first, candidates
        if slots is not None:
            expert, kept = self._rounds(choices, candidates, per_group(slots, first.device))
        own = expert
        if probabilities.ndim == 2:
            own = expert.flatten()[self.tp.tokens(probabilities, expert.numel())]
        gate = probabilities.gather(-1, own[..., None]).squeeze(-1)
        return Choices(expert=expert, gate=gate, kept=kept, token=None, first=first)

    def _rounds(self, choices: Tensor, candidates: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Expert and whether it keeps the token, [G, S], from choices [G, S, rounds]."""
        num_experts = self.config.num_experts
        expert, waiting = choices[..., 0], candidates
        taken = expert.new_zeros(len(expert), num_experts)
        for choice in choices.unbind(-1):
            place = queue_positions(choice, waiting, num_experts) + taken.gather(1, choice)
            served = waiting & (place < slots)
            expert = torch.where(served, choice, expert)
            taken = taken.scatter_add(1, choice, served.long())
            waiting = waiting & ~served
        return expert, candidates & ~waiting
