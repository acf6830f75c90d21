"""Runs a teacher over a run's samples and keeps its likeliest tokens: `distill --cache`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from megaswitch.config import RunConfig
from megaswitch.data.samples import Samples
from megaswitch.files import lock, sha256
from megaswitch.layers.soft_targets import TopK, top_k
from megaswitch.log import info
from megaswitch.parallel.mesh import Mesh
from megaswitch.parallel.tensor_parallel import TensorParallel
from megaswitch.train.corpora import build_loader
from megaswitch.train.distill import find_teacher
from megaswitch.train.logit_cache import Plan, begin, file_name, finish, samples_of_run, write_file
from megaswitch.train.objectives import PRECISIONS, MicroBatch, forward
from megaswitch.train.parts import Parts
from megaswitch.train.trained import check_same, load_trained


def cache_logits(config: RunConfig, mesh: Mesh) -> None:
    """Write what the folder `distill.logits` lacks of the samples of `config`'s run.

    Files are dealt out to the data-parallel ranks. What is there already stays.

    Args:
        config: with a teacher, `distill.logits` and no pipeline.
        mesh: the ranks.

    Raises:
        UserError: on every rank, if the folder is of something else or cannot be written.
    """
    assert config.distill.logits is not None
    folder = Path(config.distill.logits)
    with mesh.together():
        loader = build_loader(config, "train")
        found = find_teacher(config, mesh.size, runs=True)
        plan = Plan.of(config, loader, found.fingerprint)
    check_same("plans", asdict(plan), mesh)
    with mesh.together():
        claim = lock(folder) if mesh.rank == 0 else None
        present = begin(folder, plan) if mesh.rank == 0 else set()
    present = mesh.gather(present)[0]
    names = [file_name(i) for i in range(-(-samples_of_run(config) // plan.file_samples))]
    missing = [number for number, name in enumerate(names) if name not in present]
    if missing:
        parts, _ = load_trained(found.checkpoint, found.config, mesh)
        _Writer(config, mesh, loader, plan, parts, folder).write(missing)
    kept = sorted({*present, *names})
    with mesh.together():
        mine = {name: sha256(folder / name) for name in kept[mesh.rank :: mesh.size]}
    sums = {name: digest for part in mesh.gather(mine) for name, digest in part.items()}
    with mesh.together():
        if claim:
            finish(folder, sums)
            claim.close()
    info(f"{folder} has {len(kept) * plan.file_samples} samples; {len(missing)} files are new")


@dataclass
class _Writer:
    """This rank's part of the work."""

    config: RunConfig
    mesh: Mesh
    loader: Samples
    plan: Plan
    teacher: Parts
    folder: Path

    def write(self, missing: list[int]) -> None:
        """Make the files of these numbers."""
        dp = self.mesh.dp
        mine = missing[dp.rank :: dp.size]
        writes = self.mesh.axis("tp").rank == 0
        # Ranks that exchange tokens run equally often: some of them perhaps to no account.
        rounds = -(-len(missing) // dp.size)
        passes = rounds if self.mesh.exchanges else len(mine)
        for turn in range(rounds):
            with self.mesh.together():
                if turn < passes:
                    number = mine[turn] if turn < len(mine) else missing[0]
                    made = self._samples(number)
                    if writes and turn < len(mine):
                        write_file(self.folder / file_name(number), self.plan, made)
            info(f"{min((turn + 1) * dp.size, len(missing))} of {len(missing)} files")

    def _samples(self, number: int) -> list[TopK]:
        """What is kept of a file's samples, by micro-batch; on the CPU."""
        size, first = self.config.train.micro_batch_size, number * self.plan.file_samples
        starts = range(first, first + self.plan.file_samples, size)
        return [self._micro_batch(range(start, start + size)) for start in starts]

    @torch.no_grad()
    def _micro_batch(self, samples: range) -> TopK:
        micro = MicroBatch.of(self.loader.batch(samples), self.mesh.device, None)
        precision = PRECISIONS[self.config.train.precision]
        logits = forward(self.teacher.models[0], micro, precision).logits
        assert logits is not None
        found = top_k(
            logits,
            self.plan.top_k,
            temperature=self.plan.temperature,
            vocab_size=self.plan.vocab_size,
            tp=TensorParallel(self.mesh.axis("tp")),
        )
        return found.to(torch.device("cpu"))
