"""Plans: their memory is that of a rehearsal, their layouts keep the rules."""

import subprocess
from dataclasses import replace
from functools import cache

import pytest

from megaswitch.config import from_toml, model_config
from megaswitch.log import UserError
from megaswitch.model.count import count, meta_model
from megaswitch.model.stages import keep_only, plan_stages
from megaswitch.rules import check
from megaswitch.scale.estimate import estimate
from megaswitch.scale.hardware import known, load_hardware
from megaswitch.scale.plan import profiles_of, sbatch, search
from megaswitch.scale.profile import profile
from megaswitch.scale.rehearsal import rehearse_rank
from megaswitch.scale.sizes import of_stage
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
    "pp": (4, run("batch_size = 64", "pp = 2\nep = 2")),
    "zero": (4, run("batch_size = 64", 'ep = 2\nzero = "optimizer"', ADAMW)),
}


@pytest.mark.parametrize("name", CASES)
def test_memory_is_that_of_a_rehearsal(name):
    world, config = CASES[name]
    lengths = row_lengths(config)
    profiles = cache(lambda tp, exchanges: profile(config, lengths, tp, exchanges))
    planned = estimate(config, world, lengths, profiles, H100).memory
    ranks = range(0, world, world // config.parallel.pp)
    steps = [rehearse_rank(config, world, rank, "cuda") for rank in ranks]
    memory = max(steps, key=lambda step: step.peak).memory
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


@pytest.fixture(scope="module")
def plan():
    config = from_toml('[model]\npreset = "switch-base-8"\n[train]\nprecision = "bf16"')
    return search(replace(config, train=replace(config.train, batch_size=512)), 16, H100)


def test_plans_keep_the_rules_and_fit(plan):
    assert plan.best
    for one in plan.best:
        assert not check(one.config, 16)
        assert one.memory.total <= H100.memory
        assert 0 < one.mfu < 1
    times = [one.seconds.total for one in plan.best]
    assert times == sorted(times)
    assert plan.rejected["fits, but is slower"] > 0


def test_uneven_experts_cost_time_and_without_capacity_memory():
    config = from_toml(f"{BASE}batch_size = 64\n[parallel]\nep = 4")
    lengths = row_lengths(config)
    profiles = profiles_of(config, H100)
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
    even, uneven = (search(config, 4, H100, routing=r) for r in ("uniform", "zipf:1.0"))
    assert all(one.seconds.imbalance == 0 for one in even.best)
    assert any(one.seconds.imbalance > 0 for one in uneven.best if one.config.parallel.ep > 1)
    with pytest.raises(UserError, match="readable JSON"):
        search(config, 4, H100, routing="no such file")


def test_a_checkpoint_is_all_weights_and_states_once():
    world, config = CASES["pp"]
    lengths, profiles = row_lengths(config), profiles_of(config, H100)
    saved = estimate(config, world, lengths, profiles, H100).checkpoint
    numbers = count(config.model).total_parameters
    assert 4 * numbers < saved.size < 4.4 * numbers  # Adafactor's states are small
    assert saved.write == pytest.approx(saved.copy * H100.host_bandwidth / H100.disk_bandwidth)
    # Two pipeline ranks, experts divided by two: each writes about a third of all.
    assert saved.size / 4 < saved.write * H100.disk_bandwidth < saved.size / 2


def test_the_job_starts_all_ranks(plan):
    text = sbatch(plan.best[0], H100, "run.toml")
    assert "#SBATCH --nodes=2" in text
    assert "#SBATCH --ntasks-per-node=8" in text
    assert "\nsrun --distribution=block megaswitch train run.toml &\n" in text
    assert "scontrol requeue" in text
    assert "train 'a b; rm -r c' &" in sbatch(plan.best[0], H100, "a b; rm -r c")
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_where_nothing_fits_a_plan_says_what_would():
    config = from_toml(f'[model]\npreset = "switch-base-8"\n[optim]\n{ADAMW}\n[train]\n'
                       'precision = "bf16"\nbatch_size = 64')  # fmt: skip
    # 619M parameters: 9.9 GB with AdamW's states, and activations of 16 rows.
    small = replace(H100, memory=9e9)
    plan = search(config, 1, small)
    assert not plan.best
    assert plan.smallest is not None
    assert plan.remedies
    words = plan.remedies[0].split()
    assert words[0].startswith("--")
    if words[0] == "--world":
        assert search(config, int(words[1]), small).best


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
