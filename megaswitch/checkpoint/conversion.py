"""What conversions have in common: writing a whole checkpoint from tensors elsewhere."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from megaswitch.checkpoint.integrity import SUM, new_digest
from megaswitch.checkpoint.manager import TrainState, state_json
from megaswitch.checkpoint.streams import Advance, Progress, Target, total_bytes, write_targets
from megaswitch.config import ModelConfig, RunConfig, TrainConfig, to_toml
from megaswitch.data.tokenizer import MAX_MODEL_BYTES, Tokenizer
from megaswitch.log import UserError
from megaswitch.model.switch_transformer import rows_per_group
from megaswitch.storage import is_local, publishing, read_small, writing

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@contextmanager
def silent(_: int) -> Iterator[Advance]:
    """No progress is shown."""
    yield lambda _: None


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to convert.

    Attributes:
        dtype: "fp32", "bf16" or "fp16"; None keeps what is stored.
        shard_bytes: size that a file has at most, unless one matrix alone is larger.
        tokenizer: a SentencePiece model to take along instead of the source's.
        progress: told how far it is.
    """

    dtype: str | None = None
    shard_bytes: int = 5 * 10**9
    tokenizer: Path | None = None
    progress: Progress = silent

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The type to write, or None to keep what is stored."""
        return DTYPES[self.dtype] if self.dtype else None


@dataclass(frozen=True)
class Converted:
    """What was written.

    Attributes:
        path: where.
        parameters: how many, each counted once for each time it was written.
        bytes: of tensors.
        notes: what a user should know.
    """

    path: Path
    parameters: int
    bytes: int
    notes: list[str] = field(default_factory=list)


def write_checkpoint(
    destination: Path,
    model: ModelConfig,
    targets: Sequence[Target],
    options: Options,
    tokenizer: bytes | None,
    notes: Sequence[str] = (),
    run: RunConfig | None = None,
) -> Converted:
    """Write a checkpoint at step 0 of a run that has seen no data.

    Args:
        destination: a folder that does not exist yet.
        model: the model.
        targets: its parameters by our names.
        options: how.
        tokenizer: content of a SentencePiece model.
        notes: to be reported.
        run: the rest of its configuration; None: defaults.

    Raises:
        UserError: a source is damaged or the destination cannot be written; it then does not exist.
    """
    targets = [replace(t, name=f"model.{t.name}") for t in targets]
    size = check_space(destination, targets, options)
    with publishing(destination) as folder, options.progress(size) as advance:
        files, _ = write_targets(
            folder,
            targets,
            names=lambda number, of: f"shard-{number:05d}-of-{of:05d}.safetensors",
            shard_bytes=options.shard_bytes,
            dtype=options.torch_dtype,
            placed=True,
            advance=advance,
        )
        if tokenizer:
            files["tokenizer.model"] = write_bytes(folder / "tokenizer.model", tokenizer)
        config = to_toml(replace(run, model=model) if run else run_config(model)).encode()
        files["config.toml"] = write_bytes(folder / "config.toml", config)
        state = state_json(TrainState(step=0, samples=0, fingerprint=""), files)
        write_bytes(folder / "state.json", state.encode())
    return Converted(destination, sum(math.prod(t.shape) for t in targets), size, list(notes))


def run_config(model: ModelConfig) -> RunConfig:
    """Defaults around a model, with batches that its routing groups fill."""
    config = RunConfig(model=model)
    if not model.moe.num_experts or model.moe.capacity_mode == "hf":
        return config
    rows = rows_per_group(model, config.data.encoder_length)
    micro = math.lcm(rows, config.train.micro_batch_size)
    batch = math.lcm(micro, config.train.batch_size)
    return replace(config, train=TrainConfig(micro_batch_size=micro, batch_size=batch))


def check_space(destination: Path, targets: Sequence[Target], options: Options) -> int:
    """Bytes that the tensors take.

    Raises:
        UserError: the local disk has no room for them.
    """
    size = total_bytes(targets, options.torch_dtype)
    if is_local(destination):
        parent = next(p for p in destination.absolute().parents if p.exists())
        free = shutil.disk_usage(parent).free
        if size > free:
            raise UserError(
                f"{destination} needs {size / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB "
                "free; free space, choose another destination, or a narrower --dtype"
            )
    return size


def write_bytes(path: Path, content: bytes) -> dict[str, object]:
    """Write a small file; its length and checksum."""
    with writing(path) as file:
        file.write(content)
    digest = new_digest()
    digest.update(content)
    return {"bytes": len(content), SUM: digest.hexdigest()}


def read_tokenizer(path: Path, vocab_size: int) -> bytes:
    """The content of a SentencePiece model, once it has proved to be one that suits the model.

    Raises:
        UserError: it is none, does not follow T5's conventions or has more ids than the model.
    """
    content = read_small(path, MAX_MODEL_BYTES)
    with tempfile.NamedTemporaryFile(suffix=".model") as file:
        file.write(content)
        file.flush()
        try:
            tokenizer = Tokenizer(file.name)
        except UserError as error:
            raise UserError(str(error).replace(file.name, str(path))) from None
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer {path} has {tokenizer.vocab_size} ids and the model {vocab_size}: give "
            "the tokenizer that it was trained with by --tokenizer, or leave its file out"
        )
    return content
