"""Literal tables for the routers that are not Switch's, run on them and on mutations of them."""

from __future__ import annotations

import torch
from torch import Tensor

from megaswitch.layers.noise import Noise
from megaswitch.model.groups import Draws
from megaswitch.model.moe import group_tokens
from megaswitch.model.router import Routing
from tests.unit.model.router_checks import PROBABILITIES, close, identity_router

ALL = [True] * 6
TWO_PADS = [False, True, True, True, False, True]


def route(logits: Tensor, name: str, **moe) -> Routing:
    """Route logits [B, L, E], a group for each row, in training and without noise."""
    moe = {"train_second_policy": "all", "exploration": "argmax", "min_capacity": 0} | moe
    router = identity_router(logits.shape[-1], router=name, training=True, **moe)
    return router(logits, group_tokens(torch.ones(logits.shape[:2]) > 0, 1), None)


def route_table(name: str, mask: list[bool] = ALL, slots: int = 2, **moe) -> Routing:
    """Route the table of `router_checks` as one row of six tokens over three experts."""
    moe = {"train_second_policy": "all", "exploration": "argmax", "min_capacity": 0} | moe
    router = identity_router(
        3, router=name, training=True, **{"train_capacity_factor": slots / 2} | moe
    )
    logits = torch.tensor(PROBABILITIES, dtype=torch.float64).log()
    noise = Noise(0, 0, torch.tensor([7]))
    draws = Draws(noise, "site", torch.Size((1, 6)), slice(0, 6), 1)
    return router(logits[None], group_tokens(torch.tensor([mask]), 1), draws)


# Best and second best of each token; of equals the lower index.
FIRST, SECOND = [0, 1, 0, 0, 2, 0], [1, 0, 1, 1, 0, 1]


def check_top_2_choices() -> None:
    assert route_table("top-2").expert.tolist() == [[FIRST, SECOND]]


def check_top_2_gates_are_shares_of_their_sum() -> None:
    second = [3 / 8, 2 / 9, 2 / 8, 35 / 75, 1 / 9, 1 / 2]
    gates = [[[1 - gate for gate in second], second]]
    close(route_table("top-2").gate, gates, 1e-8)  # Mesh-TF adds 1e-9 to the denominator


def check_top_2_second_choices_queue_behind_all_first_ones() -> None:
    # Two slots: experts 0 and 2 have (0, 2) and (4); expert 1 has token 1, then 0 as its second.
    kept = route_table("top-2").kept
    assert kept.tolist() == [[[True, True, True, False, True, False],
                              [True, False, False, False, False, False]]]  # fmt: skip


def check_top_2_capacity_is_that_of_top_1() -> None:
    second = [True, False, True, True, False, False]
    assert route_table("top-2", slots=4).kept.tolist() == [[ALL, second]]
    assert route_table("top-2", slots=3).slots == 3


def check_top_2_padding_takes_no_slot() -> None:
    kept = route_table("top-2", TWO_PADS).kept
    assert kept.tolist() == [[[False, True, True, True, False, False],
                              [False, False, True, False, False, False]]]  # fmt: skip


def check_top_2_balance_is_of_first_choices() -> None:
    close(route_table("top-2").aux_loss, 1.0625)


def check_top_2_balance_with_padding() -> None:
    # Mesh-TF masks f and P, and divides both by all six: f = (3, 1, 0)/6, P = (1.65, 1.7, 0.65)/6.
    close(route_table("top-2", TWO_PADS).aux_loss, 3 * (3 * 1.65 + 1.7) / 36)
    excluded = route_table("top-2", TWO_PADS, aux_loss_padding="excluded")
    close(excluded.aux_loss, 1.246875)


def check_top_2_threshold() -> None:
    routing = route_table("top-2", train_second_policy="threshold", second_threshold=0.23)
    assert routing.expert.tolist() == [[FIRST, [1, -1, 1, 1, -1, 1]]]


def check_top_2_none() -> None:
    routing = route_table("top-2", train_second_policy="none")
    assert routing.expert.tolist() == [[FIRST, [-1] * 6]]
    close(routing.gate[0, 0, 0], 5 / 8, 1e-8)  # still renormalised


def check_top_2_random_compares_draws_with_gate_over_threshold() -> None:
    noise = Noise(0, 0, torch.tensor([7]))
    draws = noise.uniform("site.second", (1, 6))[0]
    routing = route_table("top-2", train_second_policy="random", second_threshold=0.5)
    gates = torch.tensor([3 / 8, 2 / 9, 2 / 8, 35 / 75, 1 / 9, 1 / 2])
    assert (draws - gates / 0.5).abs().min() > 1e-3
    wanted = [s if w else -1 for s, w in zip(SECOND, (draws < gates / 0.5).tolist(), strict=True)]
    assert -1 in wanted
    assert wanted != [-1] * 6
    assert routing.expert[0, 1].tolist() == wanted


def check_ntlb_overflow_goes_to_the_next_choice() -> None:
    # Two slots. First (0, 2), 1 and 4; then 3 and 5 ask expert 1, which has one slot left; and 5
    # asks expert 2.
    routing = route_table("ntlb", rounds=3)
    assert routing.expert.tolist() == [[0, 1, 0, 1, 2, 2]]
    assert routing.kept.tolist() == [ALL]
    close(routing.gate, [[0.50, 0.70, 0.60, 0.35, 0.80, 0.10]])


def check_ntlb_stops_after_its_rounds() -> None:
    routing = route_table("ntlb", rounds=2)
    assert routing.expert.tolist() == [[0, 1, 0, 1, 2, 0]]
    assert routing.kept.tolist() == [[True] * 5 + [False]]


def check_ntlb_first_choices_come_first() -> None:
    # One slot: token 2's second choice, expert 1, was token 1's first, who comes before all.
    logits = torch.tensor([[[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.2, 0.7, 0.1]]]).double().log()
    routing = route(logits, "ntlb", rounds=2, train_capacity_factor=1.0)
    assert routing.expert.tolist() == [[0, 0, 1]]
    assert routing.kept.tolist() == [[True, False, True]]


def check_ntlb_balance_is_of_first_choices() -> None:
    close(route_table("ntlb", rounds=3).aux_loss, 1.0625)


def check_expert_choice_takes_the_likeliest_tokens() -> None:
    routing = route_table("expert-choice")
    assert routing.token.tolist() == [[[2, 0], [1, 5], [4, 3]]]
    assert routing.expert.tolist() == [[[0, 0], [1, 1], [2, 2]]]
    close(routing.gate, [[[0.60, 0.50], [0.70, 0.45], [0.80, 0.25]]])


def check_expert_choice_takes_no_padding() -> None:
    routing = route_table("expert-choice", TWO_PADS)
    assert routing.token.tolist() == [[[2, 5], [1, 5], [3, 2]]]
    assert routing.kept.all()


def check_expert_choice_prefers_earlier_tokens_of_equals() -> None:
    routing = route(torch.zeros(1, 6, 3, dtype=torch.float64), "expert-choice",
                    train_capacity_factor=1.0)  # fmt: skip
    assert routing.token.tolist() == [[[0, 1]] * 3]


def check_expert_choice_has_no_balance_loss() -> None:
    assert route_table("expert-choice").aux_loss == 0


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]
