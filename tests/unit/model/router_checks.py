"""Checks that decide whether the router is right, and the plain loops they compare it with.

`test_router.py` runs them on the package as it is; `test_router_mutations.py` breaks the package in
named ways and expects them to notice.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from megaswitch.config import ModelConfig, MoEConfig
from megaswitch.layers.noise import Noise
from megaswitch.model.moe import SwitchFFN, group_tokens
from megaswitch.model.router import Router, Routing, SwitchRouter
from megaswitch.model.routers import ROUTERS
from megaswitch.model.switch_transformer import SwitchTransformer

# Six tokens over three experts. Logits are log-probabilities, so that the softmax gives them back
# and log Z is 0. Expert 0 is asked for by tokens 0, 2, 3 and (in a tie with expert 1) 5.
PROBABILITIES = [
    [0.50, 0.30, 0.20],
    [0.20, 0.70, 0.10],
    [0.60, 0.20, 0.20],
    [0.40, 0.35, 0.25],
    [0.10, 0.10, 0.80],
    [0.45, 0.45, 0.10],
]
EXPERTS = [0, 1, 0, 0, 2, 0]
GATES = [0.50, 0.70, 0.60, 0.40, 0.80, 0.45]
WITH_TWO_PADS = [False, True, True, True, False, True]


def config(d_model: int, *, activation: str = "relu", d_ff: int = 5, **moe) -> ModelConfig:
    return ModelConfig(d_model=d_model, d_ff=d_ff, activation=activation, moe=MoEConfig(**moe))


def identity_router(num_experts: int, *, training: bool = False, **moe) -> Router:
    """A router whose input is its logits."""
    shape = config(num_experts, num_experts=num_experts, **moe)
    router = ROUTERS[shape.moe.router](shape).train(training)
    torch.nn.init.eye_(router.weight)
    return router


def route_table(mask: list[bool], *, shift: float = 0.0, **moe) -> Routing:
    """Route the table above as one row of six tokens; `shift` is added to all logits."""
    logits = torch.tensor(PROBABILITIES, dtype=torch.float64).log() + shift
    router = identity_router(3, **{"min_capacity": 0, "eval_capacity_factor": 1.0} | moe)
    return router(logits[None], group_tokens(torch.tensor([mask]), 1), None)


def close(actual: object, expected: object, tolerance: float = 1e-12) -> None:
    expected = torch.as_tensor(np.asarray(expected, dtype=np.float64))
    actual = torch.as_tensor(actual).detach().double()
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def queue(candidates: list[bool], experts: list[int], capacity: int) -> list[bool]:
    """Which tokens of one group get a slot: first come, first served."""
    taken: dict[int, int] = {}
    kept = []
    for candidate, expert in zip(candidates, experts, strict=True):
        kept.append(candidate and taken.get(expert, 0) < capacity)
        taken[expert] = taken.get(expert, 0) + candidate
    return kept


def oracle(logits: np.ndarray, mask: np.ndarray, rows_per_group: int, moe: MoEConfig, train: bool):
    """The paper's router in loops, for logits [B, L, E] and mask [B, L]; kept, expert: [B, L].

    Returns:
        expert, gate, kept, aux loss, z-loss.
    """
    rows, length, num_experts = logits.shape
    expert = np.zeros((rows, length), dtype=np.int64)
    gate = np.zeros((rows, length))
    kept = np.zeros((rows, length), dtype=bool)
    aux, z = [], []
    for start in range(0, rows, rows_per_group):
        stop = min(start + rows_per_group, rows)
        tokens = [(row, place) for row in range(start, stop) for place in range(length)]
        real = [bool(mask[token]) for token in tokens]
        probabilities, log_z = [], []
        for token in tokens:
            top = max(logits[token])
            powers = [math.exp(logit - top) for logit in logits[token]]
            probabilities.append([power / sum(powers) for power in powers])
            log_z.append(top + math.log(sum(powers)))
            expert[token] = next(e for e in range(num_experts) if logits[token][e] == top)
            gate[token] = probabilities[-1][expert[token]]

        factor = moe.train_capacity_factor if train else moe.eval_capacity_factor
        slots = int(len(tokens) * factor / num_experts)
        slots = max(min(len(tokens), slots), moe.min_capacity)
        candidates = real
        if moe.capacity_mode == "hf":
            slots, candidates = moe.hf_capacity, [True] * len(tokens)
        if moe.capacity_mode == "dropless":
            slots = len(tokens)
        chosen = [int(expert[token]) for token in tokens]
        for token, keep in zip(tokens, queue(candidates, chosen, slots), strict=True):
            kept[token] = keep

        counted = [i for i in range(len(tokens)) if real[i] or moe.aux_loss_padding == "scaled"]
        share = sum(real) / len(tokens) if moe.aux_loss_padding == "scaled" else 1.0
        if not counted:
            aux.append(0.0)
            z.append(0.0)
            continue
        balance = 0.0
        for e in range(num_experts):
            f = sum(chosen[i] == e for i in counted) / len(counted)
            p = sum(probabilities[i][e] for i in counted) / len(counted)
            balance += num_experts * f * p
        aux.append(balance * share)
        z.append(sum(log_z[i] ** 2 for i in counted) / len(counted) * share)
    return expert, gate, kept, sum(aux) / len(aux), sum(z) / len(z)


def layer(*, num_experts: int = 3, d_model: int = 4, activation: str = "relu", **moe) -> SwitchFFN:
    """A Switch layer in fp64 with weights of order one."""
    moe = {"num_experts": num_experts, "min_capacity": 0} | moe
    ffn = SwitchFFN(config(d_model, activation=activation, **moe), "encoder.1.ffn").double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in ffn.parameters():
            weight.normal_(generator=generator)
    return ffn


def tiny_model(seed: int = 0, *, double: bool = True, **changes) -> SwitchTransformer:
    """A whole model of some thousand parameters, every other FFN sparse, in evaluation mode."""
    moe = {"num_experts": 3, "group_size": 10, "min_capacity": 0} | changes.pop("moe", {})
    shape = {
        "vocab_size": 19, "d_model": 8, "d_kv": 4, "d_ff": 6, "num_heads": 2, "init_scale": 1.0,
        "num_encoder_layers": 4, "num_decoder_layers": 2,
    }  # fmt: skip
    model = SwitchTransformer(ModelConfig(**shape | changes, moe=MoEConfig(**moe)))
    model.initialize(seed).eval()
    return model.double() if double else model


# ---------------------------------------------------------------- the checks


def check_choices_and_gates() -> None:
    routing = route_table([True] * 6)
    assert routing.expert.tolist() == [EXPERTS]
    close(routing.gate, [GATES])
    close(routing.probabilities, [PROBABILITIES])


def check_queue_is_first_come_first_served() -> None:
    routing = route_table([True] * 6)  # two slots for each expert
    assert routing.kept.tolist() == [[True, True, True, False, True, False]]


def check_padding_takes_no_slot() -> None:
    routing = route_table(WITH_TWO_PADS)
    assert routing.kept.tolist() == [[False, True, True, True, False, False]]


def check_hf_padding_takes_slots() -> None:
    routing = route_table(WITH_TWO_PADS, capacity_mode="hf", hf_capacity=2)
    assert routing.kept.tolist() == [[True, True, True, False, True, False]]


def check_balance_counts_dropped_tokens() -> None:
    # f = (4, 1, 1)/6 and P = (2.25, 2.1, 1.65)/6: 3 · (4·2.25 + 2.1 + 1.65)/36.
    close(route_table([True] * 6).aux_loss, 1.0625)


def check_balance_with_padding_scaled() -> None:
    close(route_table(WITH_TWO_PADS).aux_loss, 1.0625 * 4 / 6)
    close(route_table(WITH_TWO_PADS, shift=2.0).z_loss, 4.0 * 4 / 6)


def check_balance_with_padding_excluded() -> None:
    # Of tokens 1, 2, 3, 5: f = (3, 1, 0)/4 and P = (1.65, 1.7, 0.65)/4.
    routing = route_table(WITH_TWO_PADS, shift=2.0, aux_loss_padding="excluded")
    close(routing.aux_loss, 1.246875)
    close(routing.z_loss, 4.0)


def check_balance_is_per_group() -> None:
    # Each group sends all to its own expert: 2 · 0.9, though over both groups the load is even.
    logits = torch.tensor([[[0.9, 0.1]] * 4, [[0.1, 0.9]] * 4], dtype=torch.float64).log()
    groups = group_tokens(torch.ones(2, 4, dtype=torch.bool), 1)
    close(identity_router(2)(logits, groups, None).aux_loss, 1.8)


def check_capacity_rounds_down() -> None:
    kept = route_table([True] * 6, eval_capacity_factor=0.9).kept  # 6 · 0.9 / 3 = 1.8 slots
    assert kept.tolist() == [[True, True, False, False, True, False]]


def check_router_computes_in_fp32() -> None:
    router = SwitchRouter(config(16, num_experts=8)).eval()
    torch.manual_seed(0)
    torch.nn.init.normal_(router.weight)
    x = torch.randn(1, 64, 16).bfloat16()
    groups = group_tokens(torch.ones(1, 64, dtype=torch.bool), 1)
    narrow, wide = router(x, groups, None), router(x.float(), groups, None)
    for name in ("probabilities", "gate", "aux_loss", "z_loss"):
        assert getattr(narrow, name).dtype == torch.float32, name
        assert torch.equal(getattr(narrow, name), getattr(wide, name)), name


def check_output_is_gate_times_expert() -> None:
    ffn = layer(capacity_mode="dropless")
    x = torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y, _ = ffn(x, torch.ones(2, 5, dtype=torch.bool), 1, None)
    for row in range(2):
        for place in range(5):
            token = x[row, place]
            probabilities = torch.softmax(ffn.router.weight @ token, 0)
            e = int(probabilities.argmax())
            hidden = torch.relu(ffn.experts.wi.weight[e] @ token)
            close(y[row, place], (probabilities[e] * (ffn.experts.wo.weight[e] @ hidden)).detach())


def check_dropped_tokens_give_zero() -> None:
    ffn = layer(num_experts=1, eval_capacity_factor=0.5).eval()
    x = torch.randn(1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y, routing = ffn(x, torch.ones(1, 4, dtype=torch.bool), 1, None)
    assert routing.kept.tolist() == [[True, True, False, False]]
    assert y[0, :2].ne(0).all()
    assert y[0, 2:].eq(0).all()


def check_jitter_spares_the_experts() -> None:
    # With one expert the gate is 1 whatever the router sees, so jitter must change nothing.
    ffn = layer(num_experts=1, capacity_mode="dropless", jitter=0.5)
    x = torch.randn(1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(1, 4, dtype=torch.bool)
    plain, _ = ffn(x.clone(), mask, 1, None)
    jittered, _ = ffn(x.clone(), mask, 1, Noise(0, 0, torch.tensor([7])))
    assert torch.equal(plain, jittered)


def check_jitter_multiplies_the_input() -> None:
    ffn = layer(jitter=0.5)
    x = torch.randn(1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    noise = Noise(0, 0, torch.tensor([7]))
    _, routing = ffn(x, torch.ones(1, 4, dtype=torch.bool), 1, noise)
    factors = 1 + 0.5 * (2 * noise.uniform("encoder.1.ffn", (1, 4, 4)).double() - 1)
    expected = torch.softmax((x * factors) @ ffn.router.weight.T, -1)
    close(routing.probabilities, expected.detach(), 1e-6)


def check_evaluation_has_no_jitter() -> None:
    tokens = torch.arange(1, 11).view(2, 5)
    loud, quiet = tiny_model(moe={"jitter": 0.9}), tiny_model(moe={"jitter": 0.0})
    noise = Noise(0, 0, torch.arange(2))
    for given in (None, noise):
        assert torch.equal(loud(tokens, tokens, noise=given).logits, quiet(tokens, tokens).logits)
    assert not torch.equal(
        loud.train()(tokens, tokens, noise=noise).logits, quiet(tokens, tokens).logits
    )


def check_losses_are_summed_over_layers() -> None:
    tokens = torch.arange(1, 11).view(2, 5)
    # Zero router weights: each of the 2 + 1 Switch layers is even in P, so its loss is 1.
    model = tiny_model(moe={"aux_loss_reduction": "sum"})
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "router" in name:
                weight.zero_()
    output = model(tokens, tokens)
    close(output.aux_loss, 3.0)
    close(output.z_loss, 3 * math.log(3) ** 2)


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]
