"""A teacher for a student (paper §4.2): its weights to start with, its probabilities to learn from.

The teacher runs along over the student's ranks, in evaluation mode: its matrices sliced over `tp`,
its experts spread over `ep`. Or its likeliest tokens were kept before, by sample: `logit_cache.py`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from megaswitch.checkpoint.integrity import recorded_sum
from megaswitch.checkpoint.manager import find_checkpoint, read_config, read_state, verify
from megaswitch.checkpoint.matching import load_matching
from megaswitch.config import DistillConfig, RunConfig
from megaswitch.data.samples import Samples
from megaswitch.data.span_corruption import Seq2SeqBatch
from megaswitch.files import sha256
from megaswitch.layers.soft_targets import SoftLosses, TopK, soft_losses, top_k_losses
from megaswitch.log import ConfigError, UserError, info
from megaswitch.parallel.mesh import Mesh
from megaswitch.parallel.tensor_parallel import TensorParallel
from megaswitch.parallel.weights import Weight
from megaswitch.rules import check_groups
from megaswitch.rules_parallel import check_parallel
from megaswitch.train.logit_cache import LogitCache
from megaswitch.train.objectives import PRECISIONS, MicroBatch, forward
from megaswitch.train.parts import Parts
from megaswitch.train.trained import check_same, load_trained


@dataclass(frozen=True)
class FoundTeacher:
    """A teacher's checkpoint that goes with a run.

    Attributes:
        checkpoint: its folder.
        config: of its model, under the student's layout, lengths and batch sizes.
        fingerprint: 16 hex digits, equal where all weights are.
    """

    checkpoint: Path
    config: RunConfig
    fingerprint: str


def find_teacher(config: RunConfig, world_size: int, *, runs: bool) -> FoundTeacher:
    """The checkpoint that `distill.teacher` means. Needs no process group.

    Args:
        config: of the student.
        world_size: ranks of this launch.
        runs: whether the teacher itself runs, so that it must fit their layout.

    Raises:
        UserError: there is none.
        ConfigError: with all reasons for which it cannot teach this run.
    """
    assert config.distill.teacher is not None
    checkpoint = find_checkpoint(Path(config.distill.teacher))
    # Only training slices tokens.
    layout = replace(config.parallel, sequence_parallel=False)
    model = read_config(checkpoint).model
    own = replace(config, model=model, parallel=layout, distill=DistillConfig())
    problems = []
    if own.model.vocab_size != config.model.vocab_size:
        problems.append(
            f"model.vocab_size={config.model.vocab_size} must be the {own.model.vocab_size} of "
            f"distill.teacher={config.distill.teacher}; use that"
        )
    if runs and config.parallel.pp > 1:
        problems.append(
            f"parallel.pp={config.parallel.pp} does not go with a teacher that runs; use pp=1"
        )
    elif runs:
        found = [*check_groups(own), *check_parallel(own, world_size)]
        problems += [f"of distill.teacher={config.distill.teacher}: {p}" for p in found]
    tokenizer = checkpoint / "tokenizer.model"
    given = config.data.tokenizer
    if given and tokenizer.is_file() and sha256(tokenizer) != sha256(Path(given)):
        problems.append(
            f"data.tokenizer={given} is not the one of distill.teacher={config.distill.teacher}, "
            f"whose probabilities are of other pieces; use {tokenizer}"
        )
    if problems:
        raise ConfigError(problems)
    files = read_state(checkpoint)["files"]
    sums = sorted(recorded_sum(f)[1] for name, f in files.items() if name.endswith(".safetensors"))
    return FoundTeacher(checkpoint, own, hashlib.sha256(json.dumps(sums).encode()).hexdigest()[:16])


def check_teacher(config: RunConfig, world_size: int) -> None:
    """Refuse a run whose teacher is not there or does not go with it. Needs no process group.

    Raises:
        UserError: with all reasons.
    """
    if config.distill.teacher is None:
        return
    if config.distill.logits is None:
        find_teacher(config, world_size, runs=True)
    elif config.parallel.ep > 1 and not config.model.moe.num_experts:
        raise ConfigError(
            [
                f"parallel.ep={config.parallel.ep} has no experts to spread: the student is dense, "
                "and its teacher does not run where distill.logits is set; use ep=1"
            ]
        )


@dataclass
class Distillation:
    """What the loss hears of a teacher, and how far the student is from it.

    Attributes:
        config: the run.
        tp: who has the other rows of the vocabulary.
        fingerprint: of what is learned from; a resume with another is refused.
        teacher: that runs along; None: its probabilities come from `cache`.
        cache: or None.
        sums: soft loss, the teacher's entropy and targets since the last reading.
    """

    config: RunConfig
    tp: TensorParallel
    fingerprint: str
    teacher: Parts | None
    cache: LogitCache | None
    sums: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))

    @classmethod
    def build(cls, config: RunConfig, mesh: Mesh, loader: Samples) -> Distillation | None:
        """Load the teacher, or open what was kept of it; None where the run has no teacher.

        Raises:
            UserError: on every rank, if that cannot be done or does not belong to the run.
        """
        if config.distill.teacher is None:
            return None
        tp = TensorParallel(mesh.axis("tp"), config.parallel.sequence_parallel)
        if config.distill.logits is not None:
            with mesh.together():
                cache = LogitCache.open(config, loader)
                cache.verify(mesh.rank, mesh.size)
            check_same("cached probabilities", cache.fingerprint, mesh)
            made = cls(config, tp, cache.fingerprint, None, cache)
        else:
            with mesh.together():
                found = find_teacher(config, mesh.size, runs=True)
            parts, _ = load_trained(found.checkpoint, found.config, mesh)
            made = cls(config, tp, found.fingerprint, parts, None)
        made.sums = made.sums.to(mesh.device)
        return made

    def known(self, batch: Seq2SeqBatch) -> TopK | None:
        """What is kept for the rows of a batch that lies on the CPU; None: the teacher runs."""
        return None if self.cache is None else self.cache.read(batch.sample_index)

    def losses(self, logits: Tensor, micro: MicroBatch) -> SoftLosses:
        """The soft loss of a student's logits [B, L, V], or of this rank's rows."""
        mask, distill = micro.batch.decoder_mask, self.config.distill
        if micro.teacher is not None:
            found = top_k_losses(
                logits,
                micro.teacher,
                mask,
                temperature=distill.temperature,
                vocab_size=self.config.model.vocab_size,
                tp=self.tp,
            )
        else:
            found = soft_losses(
                logits,
                self.teacher_logits(micro),
                mask,
                temperature=distill.temperature,
                tp=self.tp,
            )
        with torch.no_grad():
            counted = (found.cross_entropy, found.entropy, mask.sum())
            self.sums += torch.stack([value.double() for value in counted])
        return found

    @torch.no_grad()
    def teacher_logits(self, micro: MicroBatch) -> Tensor:
        """[B, L, V], or of this rank's rows of the vocabulary."""
        assert self.teacher is not None
        precision = PRECISIONS[self.config.train.precision]
        logits = forward(self.teacher.models[0], micro, precision).logits
        assert logits is not None
        return logits

    def summary(self, mesh: Mesh) -> dict[str, float]:
        """Means over all ranks, nats per target; what was summed is forgotten.

        `soft_loss` is the cross-entropy against the teacher, `teacher_divergence` what of it the
        student could still lose: its Kullback-Leibler divergence.
        """
        cross, entropy, tokens = mesh.sum_(self.sums.clone()).tolist()
        self.sums.zero_()
        if not tokens:
            return {}
        return {"soft_loss": cross / tokens, "teacher_divergence": (cross - entropy) / tokens}


def copy_weights(config: RunConfig, mesh: Mesh, weights: Mapping[str, Weight]) -> None:
    """Start with the teacher's weights where names and shapes agree, and report it; not experts.

    Source: Mesh-TF's `StudentTeacher`, which matches by name.

    Raises:
        UserError: on every rank, if there is nothing to copy or the checkpoint is damaged.
    """
    with mesh.together():
        found = find_teacher(config, mesh.size, runs=False)
        files = sorted(read_state(found.checkpoint)["files"])
        verify(found.checkpoint, files[mesh.rank :: mesh.size])
    wanted = {name: weight for name, weight in weights.items() if not weight.spec.is_expert}
    with mesh.together():
        copied = load_matching(found.checkpoint, wanted)
    # Ranks of a pipeline hold different layers, and some the same.
    sizes: dict[str, int] = {}
    names: set[str] = set()
    mine = {name: math.prod(weight.block.shape) for name, weight in weights.items()}
    for held, taken in mesh.gather((mine, copied)):
        sizes |= held
        names |= taken
    if not names:
        raise UserError(
            f"no weight of distill.teacher={config.distill.teacher} has the name and shape of one "
            "of the student's; give a student of the same sizes, or distill.copy_weights=false"
        )
    info(copy_report(sizes, names, found.checkpoint))


def copy_report(sizes: Mapping[str, int], copied: set[str], checkpoint: Path) -> str:
    """In words, which weights were copied; the others are told by their modules.

    Args:
        sizes: elements of each of the student's parameters by name.
        copied: of them.
        checkpoint: of the teacher.
    """
    elements = sum(sizes[name] for name in copied)
    fresh = Counter(name.rpartition(".")[0] for name in sizes if name not in copied)
    text = (
        f"copied {len(copied)} of {len(sizes)} weights from {checkpoint} "
        f"({elements / sum(sizes.values()):.1%} of {sum(sizes.values()):,} elements)"
    )
    return f"{text}; fresh: {', '.join(sorted(fresh))}" if fresh else text
