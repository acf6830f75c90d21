"""Stacks of experts, on this rank or on several: FFNs, or maps to queries and keys."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megaswitch.config import ModelConfig
from megaswitch.layers.linear import GroupedLinear
from megaswitch.layers.noise import draw, drop
from megaswitch.layers.parameter import scaled
from megaswitch.model.dispatch import Dispatch
from megaswitch.model.ffn import activate
from megaswitch.parallel import expert_parallel, tensor_parallel
from megaswitch.parallel.expert_parallel import ExpertParallel
from megaswitch.parallel.regions import named
from megaswitch.parallel.tensor_parallel import TensorParallel

# Applied to rows sorted by expert, and where each expert's rows end.
Map = Callable[[Tensor, Tensor], Tensor]


class ExpertStack(nn.Module):
    """E networks over tokens sorted by expert. Weights are [E, out, in].

    An expert-parallel rank has some of the experts, a tensor-parallel one a slice of each.
    """

    tp: TensorParallel = tensor_parallel.ALONE
    ep: ExpertParallel = expert_parallel.ALONE
    wi: GroupedLinear
    wi_0: GroupedLinear
    wi_1: GroupedLinear

    def __init__(self, config: ModelConfig, site: str) -> None:
        super().__init__()
        expert_dropout = config.moe.expert_dropout
        self.dropout = config.dropout if expert_dropout is None else expert_dropout
        self.d_ff = config.d_ff
        self.site = site
        self.gated = config.activation == "gated-gelu"

    def forward(
        self, x: Tensor, dispatch: Dispatch, slots: int | None, keys: Tensor | None
    ) -> Tensor:
        """Let each expert work on its rows; dropped rows give 0.

        Args:
            x: [R, d_model] in `dispatch`'s order; [R, d_model/tp] if experts lie on several ranks.
            dispatch: the order.
            slots: most rows of any expert; None: not limited.
            keys: [R] int64, from which each row's dropout is drawn, or None.
        """
        if self.ep.size == 1:
            return self._compute(x, dispatch.ends, keys, self._maps(1)[0])
        # Batches of evaluation may differ in rows, so there the ranks' slots would too.
        shipment = self.ep.ship(dispatch.counts(), slots if self.training else None)
        arriving = [shipment.send(part, i) for i, part in enumerate(shipment.pack(x))]
        arriving_keys = None if keys is None else shipment.keys(keys)
        returning = []
        for i, maps in enumerate(self._maps(self.ep.chunks)):
            here = Dispatch.by_expert(*shipment.contents(i), shipment.experts)
            rows = self.tp.gather_features(here.gather(arriving[i].land()))
            own = None if arriving_keys is None else arriving_keys[i][here.order]
            y = self._outgoing(self._compute(rows, here.ends, own, maps))
            returning.append(shipment.send_back(here.restore(y), i))
        return shipment.unpack([flight.land() for flight in returning])

    @named("experts")
    def _compute(self, x: Tensor, ends: Tensor, keys: Tensor | None, maps: list[Map]) -> Tensor:
        return self._work(x, ends, keys, maps)

    def _stacks(self) -> list[GroupedLinear]:
        """The experts' matrices, in the order in which `_work` gets their maps."""
        raise NotImplementedError

    def _work(self, x: Tensor, ends: Tensor, keys: Tensor | None, maps: list[Map]) -> Tensor:
        """What this rank makes of rows x [N, d_model], keys [N], with some of the experts."""
        raise NotImplementedError

    def _outgoing(self, y: Tensor) -> Tensor:
        """What goes back to the rank that sent the rows, of what `_work` made."""
        raise NotImplementedError

    def _maps(self, chunks: int) -> list[list[Map]]:
        """The linear maps of each run of experts."""
        stacks = self._stacks()
        return [list(maps) for maps in zip(*(s.chunks(chunks) for s in stacks), strict=True)]

    def _hidden_stacks(self, config: ModelConfig) -> None:
        """Make the matrices in front of the activation: `wi`, or `wi_0` (gate) and `wi_1`."""
        shape = (config.moe.num_experts, config.d_model, config.d_ff)
        init = scaled(config.init_scale, config.d_model)
        for name in ("wi_0", "wi_1") if self.gated else ("wi",):
            setattr(self, name, GroupedLinear(*shape, shard="column", init=init))

    def _hidden(self, x: Tensor, ends: Tensor, keys: Tensor | None, maps: list[Map]) -> Tensor:
        """This rank's hidden units of the rows."""
        if self.gated:
            inner = activate(maps[1](x, ends), maps[0](x, ends))
        else:
            inner = activate(maps[0](x, ends), None)
        if keys is None:
            return inner
        # Drawn by the tokens' places in the batch, not by their expert's rows.
        return drop(inner, draw(keys, self.tp.part(self.d_ff)), self.dropout)


class Experts(ExpertStack):
    """Feed-forward networks, from d_model to d_model. A tp rank gives its term of the output."""

    def __init__(self, config: ModelConfig, site: str) -> None:
        super().__init__(config, site)
        self._hidden_stacks(config)
        shape = (config.moe.num_experts, config.d_ff, config.d_model)
        self.wo = GroupedLinear(*shape, shard="row", init=scaled(config.init_scale, config.d_ff))

    def _stacks(self) -> list[GroupedLinear]:
        return [self.wi_0, self.wi_1, self.wo] if self.gated else [self.wi, self.wo]

    def _work(self, x: Tensor, ends: Tensor, keys: Tensor | None, maps: list[Map]) -> Tensor:
        *first, last = maps
        return last(self._hidden(x, ends, keys, first), ends)

    def _outgoing(self, y: Tensor) -> Tensor:
        return self.tp.scatter_features(y)


class LinearProjections(ExpertStack):
    """Linear maps to queries, and to keys that are values too (appendix A).

    A tensor-parallel rank gives those of its heads: [N, 2·heads·d_kv/tp], queries first.
    """

    def __init__(self, config: ModelConfig, site: str) -> None:
        super().__init__(config, site)
        self.dropout = 0.0  # of hidden units, which there are none of
        shape = (config.moe.num_experts, config.d_model, config.num_heads * config.d_kv)
        init = scaled(config.init_scale, config.d_model)
        self.q = GroupedLinear(*shape, shard="column", init=init)
        self.kv = GroupedLinear(*shape, shard="column", init=init)

    def _stacks(self) -> list[GroupedLinear]:
        return [self.q, self.kv]

    def _work(self, x: Tensor, ends: Tensor, keys: Tensor | None, maps: list[Map]) -> Tensor:
        return torch.cat([to_heads(x, ends) for to_heads in maps], 1)

    def _outgoing(self, y: Tensor) -> Tensor:
        return y


class FeedForwardProjections(ExpertStack):
    """The same from hidden units that queries and keys share (Mesh-TF `use_experts_attention`)."""

    def __init__(self, config: ModelConfig, site: str) -> None:
        super().__init__(config, site)
        self._hidden_stacks(config)
        shape = (config.moe.num_experts, config.d_ff, config.num_heads * config.d_kv)
        init = scaled(config.init_scale, config.d_ff)
        self.q = GroupedLinear(*shape, shard="row", init=init)
        self.kv = GroupedLinear(*shape, shard="row", init=init)

    def _stacks(self) -> list[GroupedLinear]:
        first = [self.wi_0, self.wi_1] if self.gated else [self.wi]
        return [*first, self.q, self.kv]

    def _work(self, x: Tensor, ends: Tensor, keys: Tensor | None, maps: list[Map]) -> Tensor:
        *first, q, kv = maps
        hidden = self._hidden(x, ends, keys, first)
        # Every rank has a term of all heads; it goes on with its own heads.
        return torch.cat([self.tp.scatter_features(m(hidden, ends)) for m in (q, kv)], 1)

    def _outgoing(self, y: Tensor) -> Tensor:
        return y
