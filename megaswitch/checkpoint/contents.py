"""What a checkpoint holds of a model and its optimizer: global tensors under lasting names.

Parameters are `model.<name>`, optimizer states `optimizer.state.<name>.<key>`, the magnitudes that
delayed scaling remembers `fp8.<linear map>.amax`. Hyper-parameters are not among them: they come
from the configuration.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megaswitch.checkpoint.chunks import Chunk
from megaswitch.log import UserError
from megaswitch.parallel.weights import Weight

MODEL = "model."
STATE = "optimizer.state."
FP8 = "fp8."
# The states of a parameter that each optimizer may keep.
KEYS: dict[str, list[set[str]]] = {
    "AdamW": [{"step", "exp_avg", "exp_avg_sq"}],
    "Adafactor": [{"step", "moment"}, {"step", "row", "column"}],
}
# Statistics that lack a dimension of the parameter.
_WITHOUT = {"row": -1, "column": -2}


def model_chunks(model: nn.Module | Mapping[str, Weight]) -> list[Chunk]:
    """The parameters of a whole model, or a rank's part of them."""
    if isinstance(model, nn.Module):
        return [Chunk.whole(f"{MODEL}{n}", p.detach()) for n, p in model.named_parameters()]
    return [
        Chunk(f"{MODEL}{w.name}", w.block.shape, w.block.offsets, w.local.detach())
        for w in model.values()
    ]


def optimizer_chunks(
    weights: Mapping[str, Weight], optimizer: torch.optim.Optimizer
) -> list[Chunk]:
    """The states of this rank's blocks; a block without elements has none worth keeping."""
    return [
        _state_chunk(weight, key, state)
        for weight in weights.values()
        if weight.local.numel()
        for key, state in optimizer.state.get(weight.local, {}).items()
    ]


def history_chunks(
    history: Mapping[str, Tensor], weights: Mapping[str, Weight], expert_rank: int
) -> list[Chunk]:
    """What delayed scaling remembers of magnitudes (`layers.backend.Backend.history`).

    Args:
        history: by linear map, [E, …] of the experts on this rank, or [1, …].
        weights: of this rank.
        expert_rank: its place among those that divide the experts.
    """
    chunks = []
    for name, tensor in history.items():
        weight = weights[f"{name}.weight"]
        experts, first = 1, 0
        if weight.spec.is_expert:
            experts, first = weight.block.shape[0], expert_rank * len(tensor)
        shape, offsets = (experts, *tensor.shape[1:]), (first, *(0 for _ in tensor.shape[1:]))
        chunks.append(Chunk(f"{FP8}{name}.amax", shape, offsets, tensor))
    return chunks


def _state_chunk(weight: Weight, key: str, state: Tensor) -> Chunk:
    block = weight.block
    shape, offsets = (state_dims(key, v) for v in (block.shape, block.offsets))
    return Chunk(f"{STATE}{weight.name}.{key}", shape, offsets, state)


def state_dims(key: str, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Of something said per dimension of a parameter, what concerns its state `key`."""
    dims = [] if key == "step" else list(range(len(sizes)))
    if key in _WITHOUT:
        del dims[_WITHOUT[key]]
    return tuple(sizes[d] for d in dims)


def _empty_state(weight: Weight, key: str, group: dict[str, Any]) -> Tensor:
    """A state as the optimizer itself would make it: zeros of its type, where it wants them."""
    local = weight.local
    if key == "step":
        on_device = group.get("fused") or group.get("capturable")
        return torch.zeros((), dtype=torch.float32, device=local.device if on_device else "cpu")
    wide = key in ("row", "column", "moment")  # Adafactor's are never narrower than float32
    dtype = torch.promote_types(local.dtype, torch.float32) if wide else local.dtype
    return torch.zeros(state_dims(key, weight.block.sizes), dtype=dtype, device=local.device)


def make_states(
    weights: Mapping[str, Weight],
    optimizer: torch.optim.Optimizer,
    path: Path,
    stored: Iterable[str],
) -> list[Chunk]:
    """Give every trained block the states that the checkpoint has for it, still to be filled.

    Args:
        weights: of this rank.
        optimizer: over their blocks; what it knew before is forgotten.
        path: of the checkpoint.
        stored: names of the tensors that the checkpoint holds.

    Returns:
        the new states.

    Raises:
        UserError: a parameter has none there, or those of another optimizer.
    """
    kind = type(optimizer).__name__
    found = stored_keys(stored)
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    optimizer.state.clear()
    chunks = []
    for weight in weights.values():
        if weight.local not in groups:
            continue
        keys = found.get(weight.name, [])
        if set(keys) not in KEYS[kind]:
            wanted = " or ".join(", ".join(sorted(known)) for known in KEYS[kind])
            raise UserError(
                f"checkpoint {path} keeps {', '.join(keys) or 'nothing'} of optimizer state for "
                f"{weight.name}, and {kind} needs {wanted}; train on with the optimizer and the "
                "trainable parameters that it was written with"
            )
        group = groups[weight.local]
        states = {key: _empty_state(weight, key, group) for key in keys}
        optimizer.state[weight.local] = states
        chunks += [_state_chunk(weight, key, state) for key, state in states.items()]
    return chunks


def stored_keys(names: Iterable[str]) -> dict[str, list[str]]:
    """Keys of the stored optimizer states by parameter."""
    keys: dict[str, list[str]] = defaultdict(list)
    for name in names:
        if name.startswith(STATE):
            parameter, _, key = name.removeprefix(STATE).rpartition(".")
            keys[parameter].append(key)
    return keys
