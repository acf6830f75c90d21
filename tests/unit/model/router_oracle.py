"""Routers in plain loops over Python numbers, from the paper and Mesh-TensorFlow's rules.

`oracle` in `router_checks.py` is the Switch router's. A group is a list of tokens; a result says of
every token which experts were asked, in order, with gate and whether a slot was left.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from megaswitch.config import MoEConfig


@dataclass
class Asked:
    """An expert that a token asked for, or that took it."""

    expert: int
    gate: float
    kept: bool


@dataclass
class Plan:
    """What becomes of a batch: per row and place the experts asked, and the two losses."""

    asked: list[list[list[Asked]]]
    aux: float = 0.0
    z: float = 0.0
    margins: list[float] = field(default_factory=list)

    def sums(self, num_experts: int) -> np.ndarray:
        """[B, L, E], what each expert's output is multiplied by in a token's result."""
        shape = (len(self.asked), len(self.asked[0]), num_experts)
        table = np.zeros(shape)
        for row, places in enumerate(self.asked):
            for place, asked in enumerate(places):
                for one in asked:
                    table[row, place, one.expert] += one.gate * one.kept
        return table


def plan(
    router: str,
    logits: np.ndarray,
    mask: np.ndarray,
    rows_per_group: int,
    moe: MoEConfig,
    train: bool,
    uniform: np.ndarray,
) -> Plan:
    """Route logits [B, L, E] with mask [B, L]; `uniform` [B, L] are the second policy's draws."""
    rows, length, num_experts = logits.shape
    result = Plan([[[] for _ in range(length)] for _ in range(rows)])
    aux, z = [], []
    for start in range(0, rows, rows_per_group):
        places = [(r, t) for r in range(start, min(start + rows_per_group, rows))
                  for t in range(length)]  # fmt: skip
        shifted = [np.exp(logits[at] - logits[at].max()) for at in places]
        p = [e / e.sum() for e in shifted]
        log_z = [logits[at].max() + np.log(e.sum()) for at, e in zip(places, shifted, strict=True)]
        real = [bool(mask[at]) for at in places]
        slots = _slots(moe, len(places), num_experts, train)
        goes = [True] * len(places) if moe.capacity_mode == "hf" else real
        draws = [float(uniform[at]) for at in places]
        asked = _RULES[router](p, goes, slots, moe, train, draws)
        for at, one in zip(places, asked, strict=True):
            result.asked[at[0]][at[1]] = one
        first = [int(np.argmax(one)) for one in p]  # of equals the lowest
        aux.append(_balance(router, p, first, real, moe))
        z.append(_mean(router, [one**2 for one in log_z], real, moe))
    result.aux, result.z = sum(aux) / len(aux), sum(z) / len(z)
    return result


def _slots(moe: MoEConfig, tokens: int, num_experts: int, train: bool) -> int:
    if moe.capacity_mode == "dropless":
        return tokens * num_experts
    if moe.capacity_mode == "hf":
        return moe.hf_capacity
    factor = moe.train_capacity_factor if train else moe.eval_capacity_factor
    return max(min(tokens, int(tokens * factor / num_experts)), moe.min_capacity)


def _switch(p, goes, slots, moe, train, draws):
    taken: dict[int, int] = {}
    return [[_ask(int(np.argmax(one)), one.max(), go, taken, slots)]
            for one, go in zip(p, goes, strict=True)]  # fmt: skip


def _ask(expert, gate, go, taken, slots):
    kept = go and taken.get(expert, 0) < slots
    taken[expert] = taken.get(expert, 0) + kept
    return Asked(expert, float(gate), kept)


def _top_2(p, goes, slots, moe, train, draws):
    policy = moe.train_second_policy if train else moe.eval_second_policy
    ranked = [sorted(range(len(one)), key=lambda e, one=one: (-one[e], e))[:2] for one in p]
    gates = [(one[a] / (one[a] + one[b] + 1e-9), one[b] / (one[a] + one[b] + 1e-9))
             for one, (a, b) in zip(p, ranked, strict=True)]  # fmt: skip
    taken: dict[int, int] = {}
    asked = [[_ask(best[0], gate[0], go, taken, slots)]
             for best, gate, go in zip(ranked, gates, goes, strict=True)]  # fmt: skip
    for token, (best, gate) in enumerate(zip(ranked, gates, strict=True)):
        wants = {
            "all": True,
            "none": False,
            "threshold": gate[1] > moe.second_threshold,
            "random": draws[token] < gate[1] / moe.second_threshold,
        }[policy]
        if wants:
            asked[token].append(_ask(best[1], gate[1], goes[token], taken, slots))
    return asked


def _ntlb(p, goes, slots, moe, train, draws):
    ranked = [sorted(range(len(one)), key=lambda e, one=one: (-one[e], e)) for one in p]
    taken: dict[int, int] = {}
    asked: list[list[Asked]] = [[Asked(best[0], float(one[best[0]]), False)]
                                for one, best in zip(p, ranked, strict=True)]  # fmt: skip
    for choice in range(moe.rounds):
        for token, best in enumerate(ranked):
            if goes[token] and not asked[token][0].kept:
                answer = _ask(best[choice], p[token][best[choice]], True, taken, slots)
                asked[token] = [answer] if answer.kept else asked[token]
    return asked


def _expert_choice(p, goes, slots, moe, train, draws):
    asked: list[list[Asked]] = [[] for _ in p]
    for expert in range(len(p[0])):
        who = [token for token, go in enumerate(goes) if go]
        best = sorted(who, key=lambda t, expert=expert: (-p[t][expert], t))[:slots]
        for token in best:
            asked[token].append(Asked(expert, float(p[token][expert]), True))
    return asked


_RULES = {"switch": _switch, "top-2": _top_2, "ntlb": _ntlb, "expert-choice": _expert_choice}


def _balance(router, p, first, real, moe):
    """E·Σ f·P. Padding, scaled: Switch counts it and scales; Mesh-TF's top-2 leaves it out of both
    sums, which it divides by all tokens."""
    tokens, num_experts = len(p), len(p[0])
    if router == "expert-choice" or not any(real):
        return 0.0
    scaled = moe.aux_loss_padding == "scaled"
    counted = [t for t in range(tokens) if real[t] or (scaled and router != "top-2")]
    size = tokens if scaled else len(counted)
    total = 0.0
    for e in range(num_experts):
        f = sum(first[t] == e for t in counted) / size
        total += num_experts * f * sum(p[t][e] for t in counted) / size
    return total * (sum(real) / tokens if scaled and router != "top-2" else 1.0)


def _mean(router, values, real, moe):
    if not any(real):
        return 0.0
    if moe.aux_loss_padding == "excluded":
        return sum(v for v, r in zip(values, real, strict=True) if r) / sum(real)
    if router == "top-2":
        return sum(v for v, r in zip(values, real, strict=True) if r) / len(real)
    return sum(values) / len(values) * sum(real) / len(real)
