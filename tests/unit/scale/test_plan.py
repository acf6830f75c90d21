"""Plans: their memory is that of a rehearsal, their layouts keep the rules."""

import re
import subprocess
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

from megaswitch.config import from_toml, model_config
from megaswitch.log import UserError
from megaswitch.model.count import count, meta_model
from megaswitch.model.stages import keep_only, plan_stages
from megaswitch.rules import check
from megaswitch.scale.estimate import estimate
from megaswitch.scale.hardware import known, load_hardware
from megaswitch.scale.holdings import Holdings
from megaswitch.scale.plan import _candidates, search
from megaswitch.scale.planned import sbatch
from megaswitch.scale.profile import Cost, Profile, profile
from megaswitch.scale.recorder import Work
from megaswitch.scale.rehearsal import rehearse_rank
from megaswitch.scale.sizes import of_stage
from megaswitch.scale.updates import Way
from megaswitch.train.placement import row_lengths

H100 = load_hardware("h100")
BASE = '[model]\npreset = "switch-tiny"\n[train]\nprecision = "bf16"\nmicro_batch_size = 8\n'


def run(train: str, parallel: str, optim: str = ""):
    return from_toml(f"{BASE}{train}\n[parallel]\n{parallel}\n[optim]\n{optim}")


ADAMW = 'name = "adamw"\nschedule = "constant"\nlearning_rate = 1e-3'
CASES = {
    "alone": (1, run("batch_size = 16", "")),
    "ep, tp": (4, run("batch_size = 32", "ep = 2\ntp = 2", ADAMW)),
    "recompute": (2, run("batch_size = 32\nactivation_checkpointing = true", "ep = 2")),
    "recompute, pp": (
        4,
        run("batch_size = 64\nactivation_checkpointing = true", "pp = 2\nep = 2"),
    ),
    "pp": (4, run("batch_size = 64", "pp = 2\nep = 2")),
    "zero": (4, run("batch_size = 64", 'ep = 2\nzero = "optimizer"', ADAMW)),
}


SHORT = {"ep, tp"}
TIERS = [n if n in SHORT else pytest.param(n, marks=pytest.mark.long) for n in CASES]


@pytest.mark.parametrize("name", TIERS)
def test_memory_is_that_of_a_rehearsal(name):
    world, config = CASES[name]
    lengths = row_lengths(config)
    parallel = config.parallel
    costs = profile(config, lengths, parallel.tp, parallel.ep > 1, "cuda", {})
    held = Holdings(config, world, lengths, H100)
    for rank in range(parallel.pp):
        planned = held.memory(rank, costs, {})
        memory = rehearse_rank(config, world, rank * world // parallel.pp, "cuda").memory
        for kind in ("weights", "gradients", "optimizer"):
            assert getattr(planned, kind) == pytest.approx(memory[kind], rel=0.03), kind
        assert planned.activations == pytest.approx(memory["activations"], rel=0.10)


@pytest.mark.parametrize("preset", ["switch-tiny", "t5-base", "t5-v1_1-small"])
def test_stages_have_the_parameters_of_the_real_ones(preset):
    model = model_config(preset)
    blocks = model.num_encoder_layers + model.num_decoder_layers
    for counts in ([blocks], [1, blocks - 1], [1] * blocks):
        for stage in plan_stages(counts):
            real = keep_only(meta_model(model), stage).named_parameters()
            assert [p.name for p in of_stage(model, stage)] == [name for name, _ in real]


def made_up(tp: int, exchanges: bool) -> Profile:
    """Costs of the sizes that a rehearsal finds, without one."""
    traffic = {("all_reduce", "tp"): 1e6} if tp > 1 else {}
    calls = Counter(tp=4) if tp > 1 else Counter()
    if exchanges:
        traffic["all_to_all", "ep"] = 1e6
        calls["ep"] = 2
    dense = Cost(2e7 / tp, 1e7 / tp, Work(1e9 / tp, 3e7 / tp, 100.0), traffic, calls)
    kinds = [(stack, sparse) for stack in ("encoder", "decoder") for sparse in (False, True)]
    ends = Cost(1e6, 0.0, Work(1e9, 1e7, 50.0))
    ways = [Way(divided, piled) for divided in (False, True) for piled in (False, True)]
    ways.append(Way(divided=False, piled=False, native=True))
    update = dict.fromkeys(ways, Work(moved=30.0, operations=9))
    return Profile(dict.fromkeys(kinds, dense), ends, 1e7, Work(2.0, 2.0, 2.0), update)


@pytest.fixture(scope="module")
def plan():
    config = from_toml('[model]\npreset = "switch-base-8"\n[train]\nprecision = "bf16"')
    config = replace(config, train=replace(config.train, batch_size=512))
    return search(config, 16, H100, profiles=made_up)


def test_plans_keep_the_rules_and_fit(plan):
    assert plan.best
    for one in plan.best:
        assert not check(one.config, 16)
        assert one.memory.total <= H100.memory
        assert 0 < one.mfu < 1
    times = [one.seconds.total for one in plan.best]
    assert times == sorted(times)
    assert plan.rejected["fits, but is slower"] > 0


def test_what_a_search_leaves_out_is_slower_indeed():
    """Recomputing, and gathering twice, where neither is needed."""
    config = from_toml(f"{BASE}batch_size = 32")
    lengths = row_lengths(config)
    best = search(config, 2, H100, keep=1000, profiles=made_up)
    kept = {repr((one.config.parallel, one.config.train)) for one in best.best}
    ways: dict[str, list[float]] = defaultdict(list)
    for variants in _candidates(config, 2, H100, lengths):
        if check(variants[0], 2):
            continue
        for one in variants:
            took = estimate(one, 2, lengths, made_up, H100).seconds.total
            taken = repr((one.parallel, one.train)) in kept
            ways["taken" if taken else "left"].append(took)
            if not taken:
                others = (v for v in variants if repr((v.parallel, v.train)) in kept)
                assert (
                    min(estimate(v, 2, lengths, made_up, H100).seconds.total for v in others)
                    <= took
                )
    assert ways["taken"]
    assert ways["left"]


def test_uneven_experts_cost_time_and_without_capacity_memory():
    config = from_toml(f"{BASE}batch_size = 64\n[parallel]\nep = 4")
    lengths = row_lengths(config)
    profiles = made_up
    uneven = {"encoder": 2.0, "decoder": 1.5}
    dropless = replace(config.model, moe=replace(config.model.moe, capacity_mode="dropless"))
    for model, grows in ((config.model, False), (dropless, True)):
        run = replace(config, model=model)
        even, other = (estimate(run, 4, lengths, profiles, H100, b) for b in ({}, uneven))
        assert even.seconds.imbalance == 0
        # 8 rows of 512 and 114 tokens go through one Switch layer of each stack, there and back.
        flops = 3 * 4 * 128 * 512 * 8 * 2 * (512 * 1.0 + 114 * 0.5)
        expected = flops / (H100.bf16_flops * H100.matmul_efficiency)
        assert other.seconds.imbalance == pytest.approx(expected)
        assert (other.memory.activations > even.memory.activations) == grows
        assert other.seconds.total > even.seconds.total


def test_a_search_counts_how_uneven_experts_are():
    config = from_toml(f"{BASE}batch_size = 64")
    even, uneven = (
        search(config, 4, H100, routing=r, profiles=made_up) for r in ("uniform", "zipf:1.0")
    )
    assert all(one.seconds.imbalance == 0 for one in even.best)
    assert any(one.seconds.imbalance > 0 for one in uneven.best if one.config.parallel.ep > 1)
    with pytest.raises(UserError, match="readable JSON"):
        search(config, 4, H100, routing="no such file", profiles=made_up)


def test_a_checkpoint_is_all_weights_and_states_once():
    world, config = CASES["pp"]
    saved = estimate(config, world, row_lengths(config), made_up, H100).checkpoint
    numbers = count(config.model).total_parameters
    assert 4 * numbers < saved.size < 4.4 * numbers  # Adafactor's states are small
    assert saved.write == pytest.approx(saved.copy * H100.host_bandwidth / H100.disk_bandwidth)
    # The last of two pipeline ranks has three of four blocks, and half of their experts.
    assert 0.5 * saved.size < saved.write * H100.disk_bandwidth < 0.6 * saved.size


def test_the_job_starts_all_ranks(plan):
    text = sbatch(plan.best[0], H100, "run.toml")
    assert "#SBATCH --nodes=2" in text
    assert "#SBATCH --ntasks-per-node=8" in text
    assert "\nsrun --distribution=block megaswitch train run.toml &\n" in text
    assert "scontrol requeue" in text
    assert "train 'a b; rm -r c' &" in sbatch(plan.best[0], H100, "a b; rm -r c")
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


SBATCH = Path(__file__).resolve().parents[3] / "examples/slurm/pretrain.sbatch"


def test_the_job_asks_for_what_the_example_does(plan):
    """The job of eight GPUs a node that examples/slurm has; only the number of nodes differs."""
    ours, theirs = (
        dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.MULTILINE))
        for text in (sbatch(plan.best[0], H100, "run.toml"), SBATCH.read_text(encoding="utf-8"))
    )
    keys = ("ntasks-per-node", "gpus-per-node", "exclusive", "requeue", "signal", "open-mode")
    assert {key: ours[key] for key in keys} == {key: theirs[key] for key in keys}


def test_where_nothing_fits_a_plan_says_the_smallest_change_that_does():
    config = from_toml(f"{BASE}batch_size = 64\n[optim]\n{ADAMW}")
    leanest = search(config, 2, replace(H100, memory=1e6, node_gpus=1), profiles=made_up).smallest
    assert leanest is not None
    small = replace(H100, memory=0.98 * leanest.memory.total, node_gpus=1)

    def fits(world: int, run=config, hardware=small) -> bool:
        return bool(search(run, world, hardware, profiles=made_up).best)

    plan = search(config, 2, small, profiles=made_up)
    assert not plan.best
    optimizer, ranks, machine = (remedy.split(" needs ")[0] for remedy in plan.remedies)
    assert optimizer == "--optim.name=adafactor"
    assert fits(2, replace(config, optim=replace(config.optim, name="adafactor")))
    world, *words = ranks.removeprefix("--world ").split()
    more = replace(config, train=replace(config.train, batch_size=_batch(words, 64)))
    assert fits(int(world), more)
    assert not any(fits(fewer) for fewer in range(2, int(world)))
    assert machine == "--hardware a100"  # the least memory of those that have more
    assert fits(2, hardware=load_hardware("a100"))


def _batch(words: list[str], usual: int) -> int:
    return int(words[0].removeprefix("--train.batch_size=")) if words else usual


def test_where_nothing_helps_a_plan_says_what_is_needed():
    config = from_toml(f"{BASE}batch_size = 8")
    plan = search(config, 1, replace(H100, memory=1e3, device="cpu"), profiles=made_up)
    (remedy,) = plan.remedies
    assert remedy.startswith("the leanest layout needs GPUs of")


def test_hardware_files_are_read_with_care(tmp_path):
    assert {"a100", "b200", "h100", "h200"} <= set(known())
    for name in known():
        assert load_hardware(name).sources
    path = tmp_path / "gpu.toml"
    path.write_text("name = 'x'\nmemory = -1\nmemoryy = 3\n")
    with pytest.raises(UserError, match=r"lacks bf16_flops.*memoryy.*memory=-1"):
        load_hardware(str(path))
    with pytest.raises(UserError, match="neither a100"):
        load_hardware("tpu")
