"""A group of ranks of which only one is there, for looking at layouts without starting them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch.distributed import device_mesh
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from megaswitch.log import UserError


@contextmanager
def absent_peers(world: int, rank: int) -> Iterator[None]:
    """Be `rank` of a group of `world` ranks, none of which answers or is waited for.

    Raises:
        UserError: this process is in a group already.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise UserError("a rehearsal needs a process that is no rank itself; start it alone")
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    new_group = device_mesh.new_group

    def own_group(ranks: list[int] | None = None, **options: Any) -> Any:
        """All ranks make all groups of a mesh, thousands in a large one; peers' are not missed."""
        if ranks is None or rank in ranks:
            return new_group(ranks=ranks, **options)
        return dist.GroupMember.NON_GROUP_MEMBER

    try:
        with mock.patch.object(device_mesh, "new_group", own_group):
            yield
    finally:
        dist.destroy_process_group()
        # torch remembers what operations made of which mesh, and takes equal meshes for one, though
        # another rank looks at it: parameters would think that they lie elsewhere.
        _clear_sharding_prop_cache()
