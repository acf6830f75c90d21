"""`megaswitch simulate`: ranks of worlds that are not there."""

import json
import resource

import pytest
from click.testing import CliRunner

from megaswitch.cli import cli
from megaswitch.config import from_toml
from megaswitch.model.count import count
from megaswitch.scale.rehearsal import rehearse_rank
from megaswitch.scale.simulate import simulate

# Without dropout, whose draws a CPU makes in many blocks.
TINY = (
    '[model]\npreset = "switch-tiny"\ndropout = 0.0\nmoe = { group_size = 64 }\n'
    "[data]\nencoder_length = 64\ndecoder_length = 16\n"
    "[train]\nmicro_batch_size = 2\nbatch_size = 16\n"
)


@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        (4, "pp = 2\nep = 2"),
        pytest.param(8, "pp = 2\nep = 2\ntp = 2", marks=pytest.mark.long),
        pytest.param(8, 'ep = 2\nzero = "full"\nreplicas = 2', marks=pytest.mark.long),
        pytest.param(8, "tp = 4", marks=pytest.mark.long),
    ],
)
def test_each_parameter_is_counted_once_over_all_ranks(world, parallel):
    """By adding up what every single rank holds of its own, and by one rank of each kind."""
    config = from_toml(f'{TINY}precision = "bf16"\n[parallel]\n{parallel}')
    total = count(config.model).total_parameters
    steps = [rehearse_rank(config, world, rank, "cuda") for rank in range(world)]
    assert sum(step.parameters_here for step in steps) == total
    assert simulate(config, world, None, "cuda", "uniform").total_parameters == total


def test_what_is_told_can_be_read_by_programs(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(TINY)
    words = ["simulate", str(path), "--world", "2", "--device", "cpu", "--json", "--parallel.ep=2"]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.output
    told = json.loads(result.output)
    (rank,) = told["ranks"]
    assert rank["peak_bytes"] == sum(rank["peak_bytes_by_kind"].values())
    assert {c["axis"] for c in rank["collectives"]} == {"ep"}
    assert told["routing"]["encoder"]["dropped"] >= 0


GIANTS = {
    "switch-c-2048": (2048, 4, 16384, "pp = 4\nep = 512", 1_571_327_875_360),
    "switch-xxl-128": (1024, 8, 2048, "pp = 2\ntp = 4\nep = 128", 394_675_073_024),
}


@pytest.mark.long
@pytest.mark.parametrize("name", GIANTS)
def test_giants_fit_a_laptop(name):
    world, rows, batch, parallel, total = GIANTS[name]
    config = from_toml(
        f'[model]\npreset = "{name}"\n[train]\nprecision = "bf16"\nmicro_batch_size = {rows}\n'
        f"batch_size = {batch}\nactivation_checkpointing = true\n[parallel]\n{parallel}"
    )
    assert simulate(config, world, None, "cuda", "uniform").total_parameters == total
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 << 20  # KiB
