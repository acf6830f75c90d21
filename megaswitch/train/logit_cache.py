"""A teacher's likeliest tokens at every target, kept in files by sample index.

A folder holds `plan.json` (whose probabilities of which samples), files of so many samples each,
and, once all are there, `cache.json` with their sizes and SHA-256 sums. A file is an array of
records, one a sample, so that any sample is found by its index and mapped, not read. Writing may be
stopped and started again: files appear whole, and those that are there are not made anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megaswitch.config import RunConfig
from megaswitch.data.samples import Samples
from megaswitch.files import sha256, sync, write_durably
from megaswitch.layers.soft_targets import TopK
from megaswitch.log import UserError
from megaswitch.train.corpora import batch_size

FORMAT = 1
_FILE_SAMPLES = 256  # of a file, rounded up to whole micro-batches
_MOST_FILE_BYTES = 1 << 40


@dataclass(frozen=True)
class Plan:
    """Whose probabilities of which samples are kept, and how.

    Attributes:
        teacher: fingerprint of its weights.
        data: fingerprint of the training data.
        mixture: of several sources, as in `TrainState`.
        vocab_size: of both models.
        decoder_length: targets of a sample.
        top_k: tokens kept per target.
        temperature: that the logits were divided by.
        precision: that the teacher ran in.
        file_samples: samples of a file.
        format: of the files.
    """

    teacher: str
    data: str
    mixture: list[list[int]]
    vocab_size: int
    decoder_length: int
    top_k: int
    temperature: float
    precision: str
    file_samples: int
    format: int = FORMAT

    @classmethod
    def of(cls, config: RunConfig, loader: Samples, teacher: str) -> Plan:
        """What a run needs."""
        rows, distill = config.train.micro_batch_size, config.distill
        return cls(
            teacher=teacher,
            data=loader.fingerprint,
            mixture=[[s.start, *s.quotas] for s in loader.segments],
            vocab_size=config.model.vocab_size,
            decoder_length=loader.decoder_length,
            top_k=distill.top_k,
            temperature=distill.temperature,
            precision=config.train.precision,
            file_samples=-(-_FILE_SAMPLES // rows) * rows,
        )

    @property
    def record(self) -> np.dtype[np.void]:
        """What is kept of a sample, little-endian."""
        shape = (self.decoder_length, self.top_k)
        tokens = "<u2" if self.vocab_size <= 1 << 16 else "<u4"
        fields = [("probabilities", "<f4", shape), ("rest", "<f4", shape[:1])]
        return np.dtype([*fields, ("tokens", tokens, shape)])

    @property
    def file_bytes(self) -> int:
        """Of every file."""
        return self.file_samples * self.record.itemsize

    def differs(self, other: Plan, *, but: Iterable[str] = ()) -> list[str]:
        """Sentence parts about what is different."""
        mine, theirs = asdict(self), asdict(other)
        keys = mine.keys() - set(but)
        return [f"{k} is {mine[k]!r} there, not {theirs[k]!r}" for k in mine if k in keys
                and mine[k] != theirs[k]]  # fmt: skip


def file_name(number: int) -> str:
    """Of the file with samples number · file_samples onwards."""
    return f"samples_{number:07d}.bin"


@dataclass
class LogitCache:
    """A complete folder, open for reading.

    Attributes:
        folder: that holds it.
        plan: what is in it.
        files: SHA-256 by name; the sizes follow from the plan.
    """

    folder: Path
    plan: Plan
    files: dict[str, str]
    _maps: dict[int, NDArray[Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, config: RunConfig, loader: Samples) -> LogitCache:
        """The folder `distill.logits`, if it was made for this run's data, T and k.

        Raises:
            UserError: it is none, is damaged or of something else.
        """
        assert config.distill.logits is not None
        folder = Path(config.distill.logits)
        content = _read_json(folder, "cache.json")
        plan = read_plan(folder)
        files = content.get("files")
        if not isinstance(files, dict) or set(files) != {file_name(i) for i in range(len(files))}:
            raise UserError(f"{folder / 'cache.json'} does not list the files; make them again")
        wanted = Plan.of(config, loader, plan.teacher)
        # How they were written is as good as any other way, and of the mixture see check_samples.
        if differences := plan.differs(wanted, but=("mixture", "file_samples", "precision")):
            raise UserError(
                f"distill.logits={folder} was made for another run: {'; '.join(differences)}; make "
                "it again with megaswitch distill --cache, or use what it was made for"
            )
        return cls(folder, plan, {name: str(files[name]) for name in files})

    @property
    def samples(self) -> int:
        """How many there are, from the first on."""
        return len(self.files) * self.plan.file_samples

    @property
    def fingerprint(self) -> str:
        """16 hex digits, equal where the same was kept of the same teacher."""
        kept = {k: v for k, v in asdict(self.plan).items() if k not in ("mixture", "file_samples")}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Compare files with their recorded sizes and sums.

        Args:
            part: which share of them this rank looks at.
            parts: shares.

        Raises:
            UserError: naming those that differ.
        """
        damaged = []
        for name in sorted(self.files)[part::parts]:
            path = self.folder / name
            if not path.is_file():
                damaged.append(f"{name} is missing")
            elif path.stat().st_size != self.plan.file_bytes:
                damaged.append(f"{name} has {path.stat().st_size} of {self.plan.file_bytes} bytes")
            elif sha256(path) != self.files[name]:
                damaged.append(f"{name} does not match its checksum")
        if damaged:
            raise UserError(
                f"distill.logits={self.folder} is damaged: {'; '.join(damaged[:5])}. Remove these "
                "files and cache.json, and run megaswitch distill --cache again"
            )

    def check_samples(self, config: RunConfig, mixture: list[list[int]]) -> None:
        """Refuse a run that takes more samples than there are, or mixes its sources otherwise.

        Raises:
            UserError: saying what is missing.
        """
        needed = samples_of_run(config)
        if needed > self.samples:
            raise UserError(
                f"distill.logits={self.folder} has {self.samples} samples, and train.steps="
                f"{config.train.steps} take {needed}; the same command with --cache adds the rest"
            )
        if self.plan.mixture != [s for s in mixture if s[0] < self.samples]:
            raise UserError(
                f"distill.logits={self.folder} was made of another mixture of the sources; keep "
                "data.mixture as it was, or make it again with megaswitch distill --cache"
            )

    def read(self, samples: Tensor) -> TopK:
        """What is kept of these global sample indices [B], on the CPU.

        Raises:
            UserError: a file was cut, or holds tokens that there are not.
        """
        numbers = [divmod(index, self.plan.file_samples) for index in samples.tolist()]
        rows = np.stack([self._map(number)[row] for number, row in numbers])
        tokens = rows["tokens"].astype(np.int64)
        if tokens.size and tokens.max() >= self.plan.vocab_size:
            raise UserError(
                f"distill.logits={self.folder} has a token {tokens.max()} outside the vocabulary "
                f"of {self.plan.vocab_size}; make it again with megaswitch distill --cache"
            )
        probabilities, rest = (rows[name].astype(np.float32) for name in ("probabilities", "rest"))
        return TopK(*(torch.from_numpy(array) for array in (tokens, probabilities, rest)))

    def _map(self, number: int) -> NDArray[Any]:
        path = self.folder / file_name(number)
        # Of a file that is cut, a mapping would end the process.
        if os.stat(path).st_size != self.plan.file_bytes:
            raise UserError(
                f"{path} was cut while it was read; make it again with megaswitch distill --cache"
            )
        if number not in self._maps:
            self._maps[number] = np.memmap(path, dtype=self.plan.record, mode="r")
        return self._maps[number]


def read_plan(folder: Path) -> Plan:
    """The plan of a folder, its types and bounds checked.

    Raises:
        UserError: it is missing, damaged or of another format.
    """
    content = _read_json(folder, "plan.json")
    try:
        plan = Plan(**content)
        kinds = {k: type(v) for k, v in asdict(Plan("", "", [], 1, 1, 1, 1.0, "", 1)).items()}
        numbers = [plan.vocab_size, plan.decoder_length, plan.top_k, plan.file_samples]
        if any(type(v) is not kinds[k] for k, v in content.items()) or min(numbers) < 1:
            raise ValueError("a value is of the wrong type")
        if plan.top_k > plan.vocab_size or plan.format != FORMAT:
            raise ValueError(f"top_k {plan.top_k}, format {plan.format}")
        sizes = plan.decoder_length * plan.top_k * plan.file_samples
        if sizes > _MOST_FILE_BYTES or plan.file_bytes > _MOST_FILE_BYTES:
            raise ValueError(f"a file would have {sizes} probabilities")
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{folder / 'plan.json'} is damaged or of another version ({error}); remove the folder "
            "and run megaswitch distill --cache again"
        ) from error
    return plan


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is no table")
    except FileNotFoundError:
        raise UserError(
            f"distill.logits={folder} has no {name}; run megaswitch distill --cache first, to its "
            "end"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{folder / name} cannot be read ({error}); remove the folder and run megaswitch "
            "distill --cache again"
        ) from error
    return content


def samples_of_run(config: RunConfig) -> int:
    """Training sequences of all its steps."""
    train, samples = config.train, 0
    if train.rampup_batch_size is None:
        return train.steps * train.batch_size
    for _ in range(train.steps):
        samples += batch_size(config, samples)
    return samples


def begin(folder: Path, plan: Plan) -> set[str]:
    """Write the plan, or find it there already; the names of the files that are complete.

    Raises:
        UserError: another one is there.
    """
    if (folder / "plan.json").is_file():
        there = read_plan(folder)
        if differences := there.differs(plan):
            raise UserError(
                f"distill.logits={folder} was begun for something else: {'; '.join(differences)}; "
                "remove it, or choose another folder"
            )
    else:
        write_durably(folder / "plan.json", json.dumps(asdict(plan), indent=1))
    files = folder.glob("samples_*.bin")
    return {path.name for path in files if path.stat().st_size == plan.file_bytes}


def write_file(path: Path, plan: Plan, parts: Iterable[TopK]) -> None:
    """Write the records of a file's samples; it appears under its name when it is on disk."""
    aside = path.with_suffix(".unfinished")
    with aside.open("wb") as file:
        for part in parts:
            rows = np.empty(len(part.rest), dtype=plan.record)
            rows["probabilities"] = part.probabilities.float().cpu().numpy()
            rows["rest"] = part.rest.float().cpu().numpy()
            rows["tokens"] = part.tokens.cpu().numpy()
            file.write(rows.tobytes())
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def finish(folder: Path, files: dict[str, str]) -> None:
    """Say that all files are there. Args: files: SHA-256 by name."""
    aside = folder / "cache.json.unfinished"
    write_durably(aside, json.dumps({"files": files}, indent=1, sort_keys=True))
    os.replace(aside, folder / "cache.json")
    sync(folder)
