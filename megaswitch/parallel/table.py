"""A layout as people read it: its axes, which ranks they join, and what is spread over them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megaswitch.config import RunConfig

_STATES = {
    "optimizer": "gradients, optimizer states",
    "full": "weights, gradients, optimizer states",
}
_SHOWN = 8  # ranks of an axis that are listed one by one


@dataclass(frozen=True)
class AxisRow:
    """One axis of a layout.

    Attributes:
        axis: as in `Mesh.axes`.
        size: ranks along it.
        stride: from one of them to the next.
        spread: what each of them has a part of.
    """

    axis: str
    size: int
    stride: int
    spread: str

    @property
    def ranks(self) -> range:
        """Those that share the axis with rank 0."""
        return range(0, self.size * self.stride, self.stride)


def layout_rows(config: RunConfig, world_size: int) -> list[AxisRow]:
    """The axes of a layout that `rules.check` accepts, outermost first; of a dense model, no ep."""
    parallel, experts = config.parallel, config.model.moe.num_experts
    pp, ep, tp = parallel.pp, parallel.ep, parallel.tp
    edp = world_size // (pp * ep * tp)
    sharded = _STATES.get(parallel.zero)
    hybrid = sharded and parallel.replicas > 1
    dense, copies = "samples", "copies of the experts"
    if hybrid:
        copies = "replica × shard"
    elif sharded:
        dense += f"; {sharded}" + (" but of experts" if experts else "")
        copies = f"{sharded} of experts"
    stages = f" in {pp * parallel.stages_per_rank} stages" if pp > 1 else ""
    rows = [AxisRow("pp", pp, edp * ep * tp, f"blocks{stages}"), AxisRow("dp", edp * ep, tp, dense)]
    if experts:
        rows.append(AxisRow("edp", edp, ep * tp, copies))
    if sharded and hybrid:
        shard = edp // parallel.replicas
        rows.append(AxisRow("replica", parallel.replicas, shard * ep * tp, "copies of the shards"))
        own = f"{sharded} but of experts" if experts else sharded
        rows.append(AxisRow("dense_shard", shard * ep, tp, own))
        if experts:
            rows.append(AxisRow("shard", shard, ep * tp, f"{sharded} of experts"))
    if experts:
        rows.append(AxisRow("ep", ep, tp, f"experts, {experts // ep} on each"))
    tokens = "; tokens between them" if parallel.sequence_parallel else ""
    return [*rows, AxisRow("tp", tp, 1, f"heads, d_ff, vocabulary{tokens}")]


def layout_lines(config: RunConfig, world_size: int) -> Iterator[str]:
    """The same as lines of text: the product that makes up the ranks, then a table."""
    rows = layout_rows(config, world_size)
    sizes = {row.axis: row.size for row in rows}
    assert math.prod(sizes[axis] for axis in ("pp", "dp", "tp")) == world_size
    parts = f", dp = edp {sizes['edp']} × ep {sizes['ep']}" if "ep" in sizes else ""
    yield f"{world_size} ranks = pp {sizes['pp']} × dp {sizes['dp']} × tp {sizes['tp']}{parts}"
    cells = [("axis", "size", "with rank 0", "spread over it")]
    for row in rows:
        listed, spread = (_listed(row.ranks), row.spread) if row.size > 1 else ("–", "–")
        cells.append((row.axis, str(row.size), listed, spread))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for axis, size, ranks, spread in cells:
        yield f"  {axis:<{widths[0]}}  {size:>{widths[1]}}  {ranks:<{widths[2]}}  {spread}"


def _listed(ranks: range) -> str:
    if len(ranks) <= _SHOWN:
        return ", ".join(map(str, ranks))
    return f"{', '.join(map(str, ranks[:3]))} … {ranks[-1]}"
