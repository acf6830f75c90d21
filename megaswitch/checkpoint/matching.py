"""Weights of one model for another that shares names and shapes with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megaswitch.checkpoint.contents import model_chunks
from megaswitch.checkpoint.tensor_files import read_chunks, read_headers
from megaswitch.parallel.weights import Weight


def load_matching(path: Path, weights: Mapping[str, Weight]) -> set[str]:
    """Fill those of a rank's weights that a checkpoint has by the same name in the same shape.

    Returns:
        their names.

    Raises:
        UserError: a file is damaged.
    """
    stored = read_headers(sorted(path.glob("*.safetensors")))
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    same = {n: w for n, w in weights.items() if shapes.get(f"model.{n}") == w.block.shape}
    read_chunks(path, stored, model_chunks(same))
    return set(same)
