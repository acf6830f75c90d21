"""What every rank of a layout holds, found without the ranks.

The model is built and divided by the code that trains, on the meta device and over a process group
that only pretends to have other ranks. One rank of each pipeline stage tells how its parameters are
divided; where the parts of the others lie follows from their place in the grid.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from megaswitch.checkpoint.contents import KEYS
from megaswitch.checkpoint.placement import Held, Region
from megaswitch.config import FP8Config, RunConfig
from megaswitch.data.span_corruption import span_shape
from megaswitch.model.count import meta_model
from megaswitch.optim.adafactor import Adafactor
from megaswitch.optim.build import build_optimizer
from megaswitch.parallel.absent import absent_peers
from megaswitch.parallel.mesh import Mesh
from megaswitch.parallel.weights import Weight, part_at, sharded_dim
from megaswitch.train.parts import build_parts

_META = torch.device("meta")


def placements(config: RunConfig, ranks: int) -> dict[str, Held]:
    """Every parameter with the ranks that hold each part of it.

    Args:
        config: with a layout that `rules_parallel.check_parallel` accepts.
        ranks: of the layout.

    Raises:
        UserError: ZeRO cannot divide a parameter so.
    """
    lengths = row_lengths(config)
    config = in_torch(config)
    if ranks == 1:
        parts = build_parts(config, Mesh(0, 1, _META, None), lengths=lengths)
        return {n: _held(w, {(): [0]}) for n, w in parts.weights.items()}
    found: dict[str, Held] = {}
    stride = ranks // config.parallel.pp
    for stage in range(config.parallel.pp):
        with absent_peers(ranks, stage * stride):
            mesh = replace(Mesh.over_ranks(torch.device("cpu"), config.parallel), device=_META)
            parts = build_parts(config, mesh, lengths=lengths)
            coordinates = _coordinates(mesh)
            members: dict[tuple[str, ...], dict[tuple[int, ...], list[int]]] = {}
            for name, weight in parts.weights.items():
                axes = _dividing(weight)
                if axes not in members:
                    members[axes] = _members(coordinates, stage, axes)
                one = _held(weight, members[axes])
                if name in found:  # a tie of several stages
                    for region, others in one.parts.items():
                        found[name].parts[region].extend(others)
                else:
                    found[name] = one
    return found


def fresh_states(config: RunConfig) -> dict[str, list[str]]:
    """The optimizer states that each parameter of a run has after its first step."""
    model = meta_model(config.model)
    optimizer = build_optimizer(model.parameters(), config.optim)
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
    if not isinstance(optimizer, Adafactor):
        (keys,) = KEYS[type(optimizer).__name__]
        return {name: sorted(keys) for name, _ in model.named_parameters()}
    return {
        name: sorted(optimizer.state_of(p, group_of[p])) for name, p in model.named_parameters()
    }


def row_lengths(config: RunConfig) -> tuple[int, int]:
    """Tokens of encoder and decoder rows, as loaders choose them, without opening any data."""
    data = config.data
    if data.decoder_length is not None:
        return data.encoder_length, data.decoder_length
    if data.objective != "span-corruption":
        return data.encoder_length, data.encoder_length
    corruption = data.noise_density, data.mean_span_length, data.random_roll
    return data.encoder_length, span_shape(data.encoder_length, *corruption)[1]


def in_torch(config: RunConfig) -> RunConfig:
    """The run by torch alone in `train.precision`: what a rehearsal without a GPU is of."""
    plain = replace(config.train, backend="torch", fp8=FP8Config(), dispatch="torch", compile=False)
    return replace(config, train=plain)


def _coordinates(mesh: Mesh) -> dict[str, np.ndarray]:
    """Place of every rank along each axis of both grids."""
    places: dict[str, np.ndarray] = {}
    for grid in (mesh.expert_grid, mesh.dense_grid):
        assert grid is not None
        assert grid.mesh_dim_names is not None
        ranks = grid.mesh.numpy()
        for name, place in zip(grid.mesh_dim_names, np.indices(ranks.shape), strict=True):
            places[name] = np.empty(ranks.size, dtype=np.int64)
            places[name][ranks.ravel()] = place.ravel()
    return places


def _dividing(weight: Weight) -> tuple[str, ...]:
    """The axes that divide a parameter, in the order of its mesh; "" for one that does not."""
    data = weight.parameter.data
    if not isinstance(data, DTensor):
        return ()
    names = data.device_mesh.mesh_dim_names or ()
    return tuple(
        "" if sharded_dim(placement) is None else name
        for name, placement in zip(names, data.placements, strict=True)
    )


def _members(
    coordinates: dict[str, np.ndarray], stage: int, axes: Sequence[str]
) -> dict[tuple[int, ...], list[int]]:
    """Ranks of a pipeline rank's stages by their place along `axes`."""
    here = np.flatnonzero(coordinates["pp"] == stage)
    columns = [coordinates[axis][here] if axis else np.zeros_like(here) for axis in axes]
    members: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for rank, *place in zip(here.tolist(), *(c.tolist() for c in columns), strict=True):
        members[tuple(place)].append(rank)
    return dict(members)


def _held(weight: Weight, members: dict[tuple[int, ...], list[int]]) -> Held:
    data, block = weight.parameter.data, weight.block
    if not isinstance(data, DTensor):
        ((_, ranks),) = members.items()
        return Held(block.shape, {(block.offsets, block.sizes): list(ranks)})
    parts: dict[Region, list[int]] = defaultdict(list)
    for place, ranks in members.items():
        parts[part_at(data, place)] += ranks
    # The rank that was built is a check on what torch says of the others.
    assert 0 in block.sizes or (block.offsets, block.sizes) in parts, weight.name
    return Held(block.shape, parts)
