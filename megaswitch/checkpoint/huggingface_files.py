"""Folders of Hugging Face models, in and out, tensor by tensor."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megaswitch.checkpoint.conversion import (
    Converted,
    Options,
    check_space,
    read_tokenizer,
    write_bytes,
    write_checkpoint,
)
from megaswitch.checkpoint.huggingface import names_to_read, names_to_write, tables_differ
from megaswitch.checkpoint.huggingface_config import config_from_hf, config_to_hf, reconcile
from megaswitch.checkpoint.huggingface_tokenizer import tokenizer_files
from megaswitch.checkpoint.json_file import read_table
from megaswitch.checkpoint.manager import find_checkpoint, read_config, tensor_files, verify
from megaswitch.checkpoint.streams import (
    Files,
    Source,
    Target,
    check_equal,
    write_targets,
)
from megaswitch.checkpoint.tensor_files import StoredTensor, read_headers
from megaswitch.checkpoint.torch_file import read_bin
from megaswitch.config import ModelConfig
from megaswitch.log import UserError
from megaswitch.storage import member, publishing

_MAX_CONFIG = 1 << 20
_MAX_INDEX = 64 << 20  # that of the largest Switch has 15 MB
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_TOKENIZERS = ("spiece.model", "sentencepiece.model", "tokenizer.model")


# ---------------------------------------------------------------- in


def import_hf(source: Path, destination: Path, options: Options) -> Converted:
    """Write a checkpoint of a Hugging Face model.

    Args:
        source: a folder with `config.json` and `model.safetensors`, `pytorch_model.bin` or shards
            of either with an index.
        destination: a folder that does not exist yet.
        options: how.

    Raises:
        UserError: our model cannot be that one, or a file is damaged; nothing is written then.
    """
    given = read_table(member(source, "config.json"), _MAX_CONFIG)
    with Files() as files:
        sources = hf_sources(source, files)
        table, notes = reconcile(given, {name: s.shape for name, s in sources.items()})
        model = config_from_hf(table)
        targets = _targets(sources, model)
        tokenizer = _find_tokenizer(source, options, model.vocab_size)
        if tokenizer is None:
            notes.append(
                "the source has no SentencePiece model; give one by --tokenizer for commands that "
                "read or write text"
            )
        return write_checkpoint(destination, model, targets, options, tokenizer, notes)


def _targets(sources: Mapping[str, Source], model: ModelConfig) -> list[Target]:
    targets = []
    for ours, entry in names_to_read({n: s.shape for n, s in sources.items()}, model).items():
        parts = [sources[name] for name in entry.names]
        if not entry.is_expert:
            for other in parts[1:]:
                check_equal(other, parts[0], tables_differ(other.name, parts[0].name, model))
            parts = parts[:1]
        targets.append(Target(ours, parts, stacked=entry.is_expert))
    return targets


def hf_sources(folder: Path, files: Files) -> dict[str, Source]:
    """The tensors of a model's folder by HF's names, whichever of HF's ways it is stored in.

    Raises:
        UserError: there are none, or index and files contradict each other.
    """
    readers: dict[str, Callable[[Path], dict[str, Source]]] = {
        "model.safetensors": lambda path: {
            n: files.source(path, n) for n in files.get(path).entries
        },
        "pytorch_model.bin": read_bin,
    }
    for name, reader in readers.items():
        index = member(folder, f"{name}.index.json")
        if index.is_file():
            return _indexed(folder, index, reader, name.rpartition(".")[2])
        path = member(folder, name)
        if path.is_file():
            return reader(path)
    raise UserError(
        f"{folder} has none of {', '.join(readers)}, whole or with an index; give the folder of a "
        "Hugging Face model in PyTorch's formats"
    )


def _indexed(
    folder: Path, index: Path, reader: Callable[[Path], dict[str, Source]], suffix: str
) -> dict[str, Source]:
    places = read_table(index, _MAX_INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
        raise UserError(f"{index} has no table weight_map of tensors and files; it is damaged")
    wanted: dict[str, set[str]] = defaultdict(set)
    for name, file in places.items():
        wanted[file].add(name)
    sources: dict[str, Source] = {}
    for file, names in sorted(wanted.items()):
        path = member(folder, file)
        if not file.endswith(f".{suffix}"):
            raise UserError(f"{index} names the file {file!r}, and only .{suffix} belongs there")
        if not path.is_file():
            raise UserError(f"{index} names {file}, which is missing; copy the whole model")
        found = reader(path)
        if differ := names ^ found.keys():
            raise UserError(
                f"{index} and {file} disagree on {len(differ)} tensors, such as {min(differ)}; "
                "they do not belong together: copy the whole model again"
            )
        sources |= found
    return sources


def _find_tokenizer(source: Path, options: Options, vocab_size: int) -> bytes | None:
    """The SentencePiece model asked for, or that of the source."""
    if options.tokenizer:
        return read_tokenizer(options.tokenizer, vocab_size)
    for name in _TOKENIZERS:
        if (path := member(source, name)).is_file():
            return read_tokenizer(path, vocab_size)
    return None


# ---------------------------------------------------------------- out


def export_hf(
    source: Path, destination: Path, options: Options, *, capacity: int | str | None = None
) -> Converted:
    """Write a checkpoint as a Hugging Face model; optimizer states stay behind.

    Args:
        source: a checkpoint, or a run folder, whose newest is taken.
        destination: a folder that does not exist yet.
        options: how.
        capacity: how many slots experts have for each row with HF, or "dropless"; None: as trained.

    Raises:
        UserError: HF has no such model, or the checkpoint is damaged; nothing is written then.
    """
    checkpoint = find_checkpoint(source)
    verify(checkpoint)
    stored = {
        name.removeprefix("model."): tensor
        for name, tensor in read_headers(tensor_files(checkpoint)).items()
        if name.startswith("model.")
    }
    model = _with_capacity(read_config(checkpoint).model, capacity)
    _check_counts(checkpoint, model, stored)
    table = config_to_hf(model)
    with Files() as files:
        targets = _targets_for_hf(files, stored, model)
        stored_type = max((t.dtype for t in targets), key=lambda dtype: dtype.itemsize)
        kind = options.torch_dtype or stored_type
        table["dtype"] = _NAMES.get(kind, "float32")
        size = check_space(destination, targets, options)
        texts = _texts(checkpoint, options, model)
        with publishing(destination) as folder, options.progress(size) as advance:
            _, places = write_targets(
                folder,
                targets,
                names=_hf_name,
                shard_bytes=options.shard_bytes,
                dtype=options.torch_dtype,
                placed=False,
                advance=advance,
            )
            if len(set(places.values())) > 1:
                index = {"metadata": {"total_size": size}, "weight_map": places}
                write_bytes(folder / "model.safetensors.index.json", _json(index))
            for name, content in texts.items():
                write_bytes(folder / name, content)
            # Without it nothing loads the folder, so it comes last.
            write_bytes(folder / "config.json", _json(table))
    notes = [] if len(texts) > 1 else ["the checkpoint has no tokenizer, so the model has none"]
    return Converted(destination, sum(math.prod(t.shape) for t in targets), size, notes)


def _targets_for_hf(
    files: Files, stored: Mapping[str, StoredTensor], model: ModelConfig
) -> list[Target]:
    targets = []
    for ours, entry in names_to_write({n: t.shape for n, t in stored.items()}, model).items():
        for number, name in enumerate(entry.names):
            source = files.stored(stored[ours], number if entry.is_expert else None)
            targets.append(Target(name, [source]))
    return targets


def _with_capacity(model: ModelConfig, capacity: int | str | None) -> ModelConfig:
    if capacity is None:
        moe = model.moe
        if moe.num_experts and moe.capacity_mode == "group":
            raise UserError(
                "the experts have a capacity for each group of rows, and HF's a fixed one for each "
                "row; give --capacity dropless (every token is computed, as in `generate`), or "
                "--capacity N with the slots of an expert for each row"
            )
        return model
    if not model.moe.num_experts:
        raise UserError(f"--capacity {capacity}: the model has no experts; leave it out")
    if capacity == "dropless":
        return replace(model, moe=replace(model.moe, capacity_mode="dropless"))
    return replace(model, moe=replace(model.moe, capacity_mode="hf", hf_capacity=int(capacity)))


def _check_counts(checkpoint: Path, model: ModelConfig, stored: Mapping[str, StoredTensor]) -> None:
    """A configuration that claims more than the files hold is not built, not even on paper."""
    layers = model.num_encoder_layers + model.num_decoder_layers
    experts = max((t.shape[0] for t in stored.values() if len(t.shape) == 3), default=0)
    if layers > len(stored) or model.moe.num_experts > experts:
        raise UserError(
            f"config.toml of {checkpoint} says {layers} layers and {model.moe.num_experts} "
            f"experts, and its files hold {len(stored)} tensors, stacks of at most {experts}; they "
            "do not belong together"
        )


def _texts(checkpoint: Path, options: Options, model: ModelConfig) -> dict[str, bytes]:
    """What HF wants beside tensors and `config.json`."""
    generation: dict[str, Any] = {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    texts = {"generation_config.json": _json(generation)}
    kept = checkpoint / "tokenizer.model"
    if options.tokenizer or kept.is_file():
        texts |= tokenizer_files(read_tokenizer(options.tokenizer or kept, model.vocab_size))
    return texts


def _hf_name(number: int, of: int) -> str:
    return "model.safetensors" if of == 1 else f"model-{number:05d}-of-{of:05d}.safetensors"


def _json(table: Mapping[str, Any]) -> bytes:
    return (json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode()
