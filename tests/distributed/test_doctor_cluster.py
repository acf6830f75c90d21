"""What `megaswitch doctor --cluster` says of hosts that fit together, and of those that do not."""

import time
from pathlib import Path

import torch

from megaswitch.cli import doctor_cluster
from megaswitch.cli.doctor_cluster import check_cluster
from megaswitch.config import ParallelConfig
from megaswitch.parallel import clocks
from megaswitch.parallel.mesh import Mesh


def healthy(folder: Path) -> list[tuple]:
    mesh = Mesh.over_ranks(torch.device("cpu"), ParallelConfig())
    found = check_cluster(mesh, folder)
    return [(f.section, f.name, f.value, f.data, f.problem, f.remedy) for f in found]


def ill(folder: Path) -> list[tuple]:
    """Rank 2 has another torch, a clock that is ahead, and a disk of its own; rank 1 is slow."""
    mesh = Mesh.over_ranks(torch.device("cpu"), ParallelConfig())
    kept = doctor_cluster._versions, doctor_cluster._PATIENCE, clocks.time
    doctor_cluster._PATIENCE = 0.5
    host = f"node{mesh.rank}"
    gethostname, doctor_cluster.socket.gethostname = doctor_cluster.socket.gethostname, lambda: host

    class Ahead:
        @staticmethod
        def time():
            return time.time() + 5.0

    def versions(on_gpu):
        own = {"torch": "1.0"} if mesh.rank == 2 else {}
        return kept[0](on_gpu) | own

    doctor_cluster._versions = versions
    if mesh.rank == 2:
        clocks.time = Ahead
        folder = folder / "elsewhere"
    try:
        found = check_cluster(mesh, folder)
    finally:
        doctor_cluster._versions, doctor_cluster._PATIENCE, clocks.time = kept
        doctor_cluster.socket.gethostname = gethostname
    return [(f.section, f.name, f.value, f.data, f.problem, f.remedy) for f in found]


def test_ranks_that_fit_together(world, tmp_path):
    found = world.run(4, healthy, tmp_path / "runs")
    assert all(len(one) == len(found[0]) for one in found)
    by_name = {(section, name): rest for section, name, *rest in found[0]}
    assert not [rest for rest in by_name.values() if rest[2]]
    assert by_name["storage", "shared"][1] is True
    assert by_name["storage", "locks"][0] == "work"
    assert by_name["versions", "torch"][0] == torch.__version__
    for name in ("matrix product", "from the rank before", "sum over all ranks"):
        assert all(value > 0 for value in by_name["speed", name][1])
    assert list((tmp_path / "runs").iterdir()) == []


def test_what_does_not_fit_is_named_with_its_host(world, tmp_path):
    problems = [rest[2] for _, _, *rest in world.run(3, ill, tmp_path / "runs")[1] if rest[2]]
    assert len(problems) == 3
    versions, clock, storage = problems
    assert versions.startswith(
        f"torch is not the same everywhere: {torch.__version__} on ranks 0-1"
    )
    assert "1.0 on rank 2" in versions
    assert clock.startswith("the clock of node2 (rank 2) is +5.0 s off")
    assert storage.startswith("rank 2 on node2 cannot see")
    assert f"what rank 0 wrote to {tmp_path / 'runs'}" in storage
