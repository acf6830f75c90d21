"""Known wrong routers, most of them published ones: each must fail the checks that are about it."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from megaswitch.layers.noise import Noise
from megaswitch.model import moe, router
from megaswitch.model.router import SwitchRouter
from megaswitch.model.switch_transformer import Stack, SwitchTransformer
from tests.unit.model.router_checks import CHECKS


def replace_routing(patch, change):
    """Let `change(router, routing, x, groups, draws)` give other fields for the `Routing`."""
    forward = SwitchRouter.forward

    def mutated(self, x, groups, draws):
        routing = forward(self, x, groups, draws)
        return dataclasses.replace(routing, **change(self, routing, x, groups, draws))

    patch.setattr(SwitchRouter, "forward", mutated)


def replace_positions(patch, change):
    """Let `change(true positions, expert, candidates, num_experts)` be the queue positions."""
    true = router.queue_positions
    patch.setattr(router, "queue_positions", lambda *args: change(true, *args))


def last_tokens_first(patch):
    def backwards(true, expert, candidates, num_experts):
        return true(expert.flip(1), candidates.flip(1), num_experts).flip(1)

    replace_positions(patch, backwards)


def one_slot_too_many(patch):
    """Position ≤ C."""
    replace_positions(patch, lambda true, *args: true(*args) - 1)


def one_slot_too_few(patch):
    """An inclusive cumsum compared with <, as in the paper's Figure 15."""
    replace_positions(patch, lambda true, *args: true(*args) + 1)


def queue_over_all_experts(patch):
    replace_positions(patch, lambda true, expert, *rest: true(torch.zeros_like(expert), *rest))


def capacity_rounds_up(patch):
    def up(tokens, experts, factor, minimum):
        return max(min(tokens, math.ceil(tokens * factor / experts)), minimum)

    patch.setattr(router, "expert_capacity", up)


def capacity_rounds_to_nearest(patch):
    """Flaxformer's rule."""

    def nearest(tokens, experts, factor, minimum):
        return max(min(tokens, round(tokens * factor / experts)), minimum)

    patch.setattr(router, "expert_capacity", nearest)


def padding_takes_slots(patch):
    candidates = SwitchRouter._candidates

    def change(self, routing, x, groups, draws):
        right = candidates(self, groups)
        filled = self._kept(routing.expert, groups.exists, self._slots(groups))
        return {"kept": filled & right}

    replace_routing(patch, change)


def hf_mode_skips_padding(patch):
    patch.setattr(SwitchRouter, "_candidates", lambda self, groups: groups.real)


def balance_of_kept_tokens_only(patch):
    def change(self, routing, x, groups, draws):
        chosen = F.one_hot(routing.expert, self.config.num_experts) * routing.kept[..., None]
        f, p = chosen.double().mean(1), routing.probabilities.mean(1)
        share = groups.real.double().mean(1)
        return {"aux_loss": ((f * p).sum(1) * share).mean() * self.config.num_experts}

    replace_routing(patch, change)


def balance_over_all_groups_at_once(patch):
    losses = SwitchRouter._losses

    def mutated(self, probabilities, logits, expert, groups):
        merged = dataclasses.replace(
            groups, exists=groups.exists.flatten()[None], real=groups.real.flatten()[None]
        )
        flat = (t.flatten(0, 1)[None] for t in (probabilities, logits, expert))
        return losses(self, *flat, merged)

    patch.setattr(SwitchRouter, "_losses", mutated)


def balance_not_scaled_by_the_real_share(patch):
    losses = SwitchRouter._losses

    def mutated(self, probabilities, logits, expert, groups):
        filled = dataclasses.replace(groups, real=groups.exists)
        return losses(self, probabilities, logits, expert, filled)

    patch.setattr(SwitchRouter, "_losses", mutated)


def losses_averaged_over_layers(patch):
    """T5X."""
    patch.setattr(SwitchTransformer, "reduce", lambda self, losses: torch.stack(losses).mean())


def gate_renormalised(patch):
    """What top-2 code does when k is 1."""
    replace_routing(patch, lambda self, routing, *_: {"gate": routing.gate / routing.gate.detach()})


def dropped_tokens_pass_through(patch):
    """HF 4.x gave a dropped token its probability times itself."""
    forward = moe.SwitchFFN.forward

    def mutated(self, x, mask, rows_per_group, noise, first=0):
        y, routing = forward(self, x, mask, rows_per_group, noise, first)
        rows, length = mask.shape
        kept, gate = (
            t.flatten()[: mask.numel()].view(rows, length, 1) for t in (routing.kept, routing.gate)
        )
        return torch.where(kept, y, gate * x), routing

    patch.setattr(moe.SwitchFFN, "forward", mutated)


def bf16_router(patch):
    patch.setattr(router, "at_least_fp32", lambda x: x)


def jitter_in_evaluation(patch):
    forward = Stack.forward

    def mutated(self, x, shape, mask, rows_per_group, noise, *rest, **others):
        noise = noise or Noise(0, 0, torch.arange(len(x)))
        return forward(self, x, shape, mask, rows_per_group, noise, *rest, **others)

    patch.setattr(Stack, "forward", mutated)


def jitter_leaks_into_the_experts(patch):
    """HF multiplies in place."""
    forward = SwitchRouter.forward

    def mutated(self, x, groups, draws):
        if draws is not None and draws.noise is not None:
            x.mul_(self._jitter_factors(x, draws))
        return forward(self, x, groups, None)

    patch.setattr(SwitchRouter, "forward", mutated)


def jitter_added_to_the_logits(patch):
    """The paper's Figure 15."""

    def change(self, routing, x, groups, draws):
        if draws is None or draws.noise is None:
            return {}
        logits = F.linear(x, self.weight.to(x.dtype))
        factors = self._jitter_factors(x, draws)[..., : logits.shape[-1]]
        return {"probabilities": torch.softmax(logits + factors, -1)}

    replace_routing(patch, change)


MUTATIONS = {
    last_tokens_first: "check_queue_is_first_come_first_served",
    one_slot_too_many: "check_queue_is_first_come_first_served",
    one_slot_too_few: "check_queue_is_first_come_first_served",
    queue_over_all_experts: "check_queue_is_first_come_first_served",
    capacity_rounds_up: "check_capacity_rounds_down",
    capacity_rounds_to_nearest: "check_capacity_rounds_down",
    padding_takes_slots: "check_padding_takes_no_slot",
    hf_mode_skips_padding: "check_hf_padding_takes_slots",
    balance_of_kept_tokens_only: "check_balance_counts_dropped_tokens",
    balance_over_all_groups_at_once: "check_balance_is_per_group",
    balance_not_scaled_by_the_real_share: "check_balance_with_padding_scaled",
    losses_averaged_over_layers: "check_losses_are_summed_over_layers",
    gate_renormalised: "check_output_is_gate_times_expert",
    dropped_tokens_pass_through: "check_dropped_tokens_give_zero",
    bf16_router: "check_router_computes_in_fp32",
    jitter_in_evaluation: "check_evaluation_has_no_jitter",
    jitter_leaks_into_the_experts: "check_jitter_spares_the_experts",
    jitter_added_to_the_logits: "check_jitter_multiplies_the_input",
}


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
