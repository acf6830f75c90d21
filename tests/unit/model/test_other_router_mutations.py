"""Wrong top-2, NTLB and expert-choice routers: each must fail the check that is about it."""

import dataclasses

import pytest
import torch

from megaswitch.model import ntlb
from megaswitch.model.expert_choice import ExpertChoiceRouter
from megaswitch.model.ntlb import NoTokenLeftBehindRouter
from megaswitch.model.router import Router
from megaswitch.model.top_2 import Top2Router
from tests.unit.model.other_router_checks import CHECKS


def changed(patch, router, change):
    """Let `change(router, choices, probabilities, groups)` give other fields for the `Choices`."""
    choose = router.choose

    def mutated(self, probabilities, logits, groups, draws):
        choices = choose(self, probabilities, logits, groups, draws)
        return dataclasses.replace(choices, **change(self, choices, probabilities, groups))

    patch.setattr(router, "choose", mutated)


def gates_not_renormalised(patch):
    changed(patch, Top2Router, lambda self, c, p, g: {
        "gate": p.gather(-1, c.expert.clamp(min=0).transpose(1, 2)).transpose(1, 2)
    })  # fmt: skip


def second_choices_queue_by_token(patch):
    """A token's second choice goes before the next token's first."""

    def change(self, choices, probabilities, groups):
        by_token = choices.expert.transpose(1, 2).flatten(1)
        candidates = groups.real[..., None].expand(-1, -1, 2).flatten(1) & (by_token >= 0)
        kept = self._kept(by_token, candidates, self._slots(groups))
        return {"kept": kept.view(len(kept), -1, 2).transpose(1, 2)}

    changed(patch, Top2Router, change)


def second_choices_have_slots_of_their_own(patch):
    def change(self, choices, probabilities, groups):
        slots = self._slots(groups)
        kept = [
            self._kept(e, groups.real & (e >= 0), slots) for e in choices.expert.unbind(1)
        ]  # fmt: skip
        return {"kept": torch.stack(kept, 1)}

    changed(patch, Top2Router, change)


def capacity_for_two(patch):
    """GShard's."""
    slots = Top2Router._slots
    patch.setattr(Top2Router, "_slots", lambda self, groups: [2 * n for n in slots(self, groups)])


def padding_takes_slots(patch):
    patch.setattr(Top2Router, "_candidates", lambda self, groups: groups.exists)


def balance_of_second_choices(patch):
    changed(patch, Top2Router, lambda self, c, p, g: {"first": c.expert[:, 1].clamp(min=0)})


def balance_scaled_as_switch_does(patch):
    patch.setattr(Top2Router, "_counted", Router._counted)


def threshold_before_renormalising(patch):
    wanted = Top2Router._wanted

    def mutated(self, gate, draws):
        return wanted(self, gate * 0.8, draws)

    patch.setattr(Top2Router, "_wanted", mutated)


def random_policy_compares_with_the_gate_alone(patch):
    wanted = Top2Router._wanted

    def mutated(self, gate, draws):
        if self.config.train_second_policy == "random":
            gate = gate * self.config.second_threshold
        return wanted(self, gate, draws)

    patch.setattr(Top2Router, "_wanted", mutated)


def later_rounds_forget_who_was_taken(patch):
    """Each round has all slots anew."""

    def mutated(self, choices, candidates, slots):
        expert, waiting = choices[..., 0], candidates
        for choice in choices.unbind(-1):
            place = ntlb.queue_positions(choice, waiting, self.config.num_experts)
            served = waiting & (place < slots)
            expert = torch.where(served, choice, expert)
            waiting = waiting & ~served
        return expert, candidates & ~waiting

    patch.setattr(NoTokenLeftBehindRouter, "_rounds", mutated)


def one_round_only(patch):
    rounds = NoTokenLeftBehindRouter._rounds
    patch.setattr(
        NoTokenLeftBehindRouter,
        "_rounds",
        lambda self, choices, *rest: rounds(self, choices[..., :1], *rest),
    )


def gate_of_the_first_choice(patch):
    changed(patch, NoTokenLeftBehindRouter, lambda self, c, p, g: {
        "gate": p.gather(-1, c.first[..., None]).squeeze(-1)
    })  # fmt: skip


def balance_of_final_experts(patch):
    changed(patch, NoTokenLeftBehindRouter, lambda self, c, p, g: {"first": c.expert})


def experts_choose_padding(patch):
    patch.setattr(ExpertChoiceRouter, "_candidates", lambda self, groups: groups.exists)


def tokens_in_order_instead_of_the_likeliest(patch):
    def change(self, choices, probabilities, groups):
        token = choices.token.sort(-1).values
        return {"token": token, "gate": probabilities.transpose(1, 2).gather(2, token)}

    changed(patch, ExpertChoiceRouter, change)


def softmax_over_tokens(patch):
    changed(patch, ExpertChoiceRouter, lambda self, c, p, g: {
        "gate": (p / p.sum(1, keepdim=True)).transpose(1, 2).gather(2, c.token)
    })  # fmt: skip


MUTATIONS = {
    gates_not_renormalised: "check_top_2_gates_are_shares_of_their_sum",
    second_choices_queue_by_token: "check_top_2_second_choices_queue_behind_all_first_ones",
    second_choices_have_slots_of_their_own: "check_top_2_capacity_is_that_of_top_1",
    capacity_for_two: "check_top_2_capacity_is_that_of_top_1",
    padding_takes_slots: "check_top_2_padding_takes_no_slot",
    balance_of_second_choices: "check_top_2_balance_is_of_first_choices",
    balance_scaled_as_switch_does: "check_top_2_balance_with_padding",
    threshold_before_renormalising: "check_top_2_threshold",
    random_policy_compares_with_the_gate_alone:
        "check_top_2_random_compares_draws_with_gate_over_threshold",
    later_rounds_forget_who_was_taken: "check_ntlb_overflow_goes_to_the_next_choice",
    one_round_only: "check_ntlb_overflow_goes_to_the_next_choice",
    gate_of_the_first_choice: "check_ntlb_overflow_goes_to_the_next_choice",
    balance_of_final_experts: "check_ntlb_balance_is_of_first_choices",
    experts_choose_padding: "check_expert_choice_takes_no_padding",
    tokens_in_order_instead_of_the_likeliest: "check_expert_choice_takes_the_likeliest_tokens",
    softmax_over_tokens: "check_expert_choice_takes_the_likeliest_tokens",
}  # fmt: skip


def failing() -> set[str]:
    """Names of the checks that do not hold now."""
    names = set()
    for check in CHECKS:
        try:
            check()
        except AssertionError:
            names.add(check.__name__)
    return names


def test_the_package_passes():
    assert failing() == set()


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_mutation_is_caught(mutate, monkeypatch):
    mutate(monkeypatch)
    caught = failing()
    assert MUTATIONS[mutate] in caught
    assert len(caught) < len(CHECKS) / 2, "it should break one rule, not the code"
