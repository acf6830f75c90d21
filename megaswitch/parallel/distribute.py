"""From a model without memory to this rank's part of it.

A model is built whole on the meta device, at its global shapes. `slice_parameters` replaces each
declared parameter by this rank's slice over ep and tp (a DTensor), `shard_over_data` wraps modules
with FSDP2, `weights_of` lists what came of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from megaswitch.log import UserError
from megaswitch.parallel.mesh import FLATTENED, Mesh
from megaswitch.parallel.shard import ShardSpec, spec_of
from megaswitch.parallel.weights import Weight, strides, weight


def slice_parameters(model: nn.Module, mesh: Mesh) -> dict[str, ShardSpec]:
    """Replace parameters by their slices over ep and tp, where these have more than one rank.

    Returns:
        what each parameter's layer declared, by name.
    """
    specs = {name: spec_of(p) for name, p in model.named_parameters()}
    for name, spec in specs.items():
        axes = [a for a in ("ep", "tp") if a in spec.axes and mesh.axis(a).size > 1]
        if not axes:
            continue
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent)
        whole = getattr(module, leaf)
        dims = [spec.axes.index(a) for a in axes]
        local: Tensor = whole.data
        for axis, dim in zip(axes, dims, strict=True):
            local = _run(local, dim, mesh.axis(axis).rank, mesh.axis(axis).size)
        grid = mesh.expert_grid if spec.is_expert else mesh.dense_grid
        assert grid is not None
        placed = DTensor.from_local(
            local,
            grid[tuple(axes)],
            [Shard(d) for d in dims],
            run_check=False,
            shape=whole.shape,
            stride=strides(whole.shape),
        )
        setattr(module, leaf, nn.Parameter(placed, requires_grad=whole.requires_grad))
    return specs


def _run(whole: Tensor, dim: int, rank: int, size: int) -> Tensor:
    """The rank's run of a dimension; runs are even but for the last ones."""
    length = -(-whole.shape[dim] // size)
    start = min(rank * length, whole.shape[dim])
    return whole.narrow(dim, start, min(length, whole.shape[dim] - start)).contiguous()


def shard_over_data(
    module: nn.Module,
    mesh: Mesh,
    *,
    expert: bool = False,
    whole: Iterable[nn.Parameter] = (),
    precision: torch.dtype = torch.float32,
    reshard: bool = True,
) -> None:
    """Wrap `module` with FSDP2: its parameters are gathered for its forward and backward pass.

    Gradients are summed, in fp32 where the weights are: losses were divided by global counts.

    Args:
        module: whose parameters no submodule manages yet.
        mesh: the ranks.
        expert: shard over edp instead of dp.
        whole: parameters that stay as they are.
        precision: that weights are gathered in for computing; the shards keep their own.
        reshard: free the gathered weights between forward and backward.

    Raises:
        UserError: no dimension of a parameter divides evenly where that is needed.
    """
    ranks = mesh.axis("shard" if expert else "dense_shard")
    devices = _data_mesh(mesh, ranks.name, expert=expert)
    lower = precision if precision != torch.float32 else None
    policy = MixedPrecisionPolicy(
        param_dtype=lower,
        reduce_dtype=torch.float32 if lower else None,
        cast_forward_inputs=False,
    )
    fully_shard(
        module,
        mesh=devices,
        reshard_after_forward=reshard,
        shard_placement_fn=lambda p: Shard(_even_dim(p, ranks.size)),
        mp_policy=policy,
        ignored_params=set(whole),
    )
    assert isinstance(module, FSDPModule)
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)


def _data_mesh(mesh: Mesh, name: str, *, expert: bool) -> DeviceMesh:
    grid = mesh.expert_grid if expert else mesh.dense_grid
    assert grid is not None
    return grid[name] if mesh.axis("replica").size == 1 else grid["replica", name]


def _even_dim(parameter: nn.Parameter, ranks: int) -> int:
    """The dimension to shard: the first that divides evenly, after slicing over ep and tp."""
    data = parameter.data
    pieces = [ranks] * data.ndim
    if isinstance(data, DTensor):
        for axis, placement in enumerate(data.placements):
            assert isinstance(placement, Shard)
            pieces[placement.dim] *= data.device_mesh.size(axis)
    even = [dim for dim, size in enumerate(data.shape) if size % pieces[dim] == 0]
    if even:
        return even[0]
    if not isinstance(data, DTensor):
        return 0  # FSDP pads the last ranks of the first dimension
    raise UserError(
        f"a parameter of shape {tuple(data.shape)} cannot be sharded over {ranks} data-parallel "
        f"ranks: no dimension divides evenly into {pieces} pieces; use fewer ranks per copy "
        "(parallel.replicas), or parallel.zero='none'"
    )


def weights_of(
    named: Mapping[str, nn.Parameter],
    specs: Mapping[str, ShardSpec],
    mesh: Mesh,
    first_holder: Mapping[str, int],
) -> dict[str, Weight]:
    """The table of this rank's parameters, after all wrapping.

    Args:
        named: by global name.
        specs: as `slice_parameters` gave them.
        mesh: the ranks.
        first_holder: pipeline rank that counts a parameter which several of them hold.
    """
    table = {}
    for name, parameter in named.items():
        data = parameter.data
        names: tuple[str, ...] = ()
        if isinstance(data, DTensor):
            names = data.device_mesh.mesh_dim_names or ()
        covered = {part for n in names for part in FLATTENED.get(n, (n,))}
        rest = (mesh.axis(a) for a in ("replica", "shard", "ep", "tp") if a not in covered)
        counts = all(axis.rank == 0 for axis in rest)
        counts = counts and first_holder.get(name, mesh.axis("pp").rank) == mesh.axis("pp").rank
        table[name] = weight(
            name, parameter, specs[name], [mesh.axis(n) for n in names], counts=counts
        )
    return table
