"""The feed-forward networks: one dense, or a stack of experts of the same shape."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from megaswitch.config import ModelConfig
from megaswitch.layers.linear import GroupedLinear, Linear
from megaswitch.layers.noise import Noise, draw, drop
from megaswitch.layers.parameter import scaled
from megaswitch.model.dispatch import Dispatch
from megaswitch.parallel import expert_parallel, tensor_parallel
from megaswitch.parallel.expert_parallel import ExpertParallel
from megaswitch.parallel.tensor_parallel import TensorParallel


def activate(inner: Tensor, gate: Tensor | None) -> Tensor:
    """ReLU, or GELU of the gate (tanh form, as T5 v1.1) times the inner projection."""
    return F.relu(inner) if gate is None else F.gelu(gate, approximate="tanh") * inner


class FeedForward(nn.Module):
    """wo(dropout(act(wi x))): `wi` for ReLU, `wi_0` (gate) and `wi_1` for gated GELU.

    A tensor-parallel rank has some of the d_ff hidden units, and gives its term of the output.
    """

    tp: TensorParallel = tensor_parallel.ALONE

    def __init__(self, config: ModelConfig, site: str) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.d_ff = config.d_ff
        self.site = site
        self.gated = config.activation == "gated-gelu"
        first = scaled(config.init_scale, config.d_model)
        if self.gated:
            self.wi_0 = Linear(config.d_model, config.d_ff, shard="column", init=first)
            self.wi_1 = Linear(config.d_model, config.d_ff, shard="column", init=first)
        else:
            self.wi = Linear(config.d_model, config.d_ff, shard="column", init=first)
        last = scaled(config.init_scale, config.d_ff)
        self.wo = Linear(config.d_ff, config.d_model, shard="row", init=last)

    def forward(self, x: Tensor, noise: Noise | None) -> Tensor:
        """Map x [B, L, d_model] to the same shape."""
        inner = activate(self.wi_1(x), self.wi_0(x)) if self.gated else activate(self.wi(x), None)
        if noise is not None and self.dropout:
            rows, length, _ = inner.shape
            columns = self.tp.part(self.d_ff)
            tokens = slice(0, rows * length)
            draws = noise.for_tokens(self.site, tokens, length, columns, self.d_ff)
            inner = drop(inner, draws, self.dropout)
        return self.wo(inner)


class Experts(nn.Module):
    """E feed-forward networks over tokens sorted by expert. Weights are [E, out, in].

    An expert-parallel rank has some of the experts, a tensor-parallel one a slice of each.
    """

    tp: TensorParallel = tensor_parallel.ALONE
    ep: ExpertParallel = expert_parallel.ALONE

    def __init__(self, config: ModelConfig, site: str) -> None:
        super().__init__()
        moe = config.moe
        self.dropout = config.dropout if moe.expert_dropout is None else moe.expert_dropout
        self.d_ff = config.d_ff
        self.site = site
        self.gated = config.activation == "gated-gelu"
        first = scaled(config.init_scale, config.d_model)
        shape = (moe.num_experts, config.d_model, config.d_ff)
        if self.gated:
            self.wi_0 = GroupedLinear(*shape, shard="column", init=first)
            self.wi_1 = GroupedLinear(*shape, shard="column", init=first)
        else:
            self.wi = GroupedLinear(*shape, shard="column", init=first)
        last = scaled(config.init_scale, config.d_ff)
        shape = (moe.num_experts, config.d_ff, config.d_model)
        self.wo = GroupedLinear(*shape, shard="row", init=last)

    def forward(
        self, x: Tensor, dispatch: Dispatch, slots: int | None, noise: Noise | None
    ) -> Tensor:
        """Map rows in `dispatch`'s order to the same shape; dropped rows give 0.

        Args:
            x: [N, d_model]; [N, d_model/tp] if experts lie on several ranks.
            dispatch: of N tokens.
            slots: most rows of any expert; None: not limited.
            noise: randomness of a training step, or None.
        """
        keys = None
        if noise is not None and self.dropout:
            length = len(dispatch.order) // len(noise.samples)
            keys = noise.token_keys(self.site, length, self.d_ff)[dispatch.order]
        if self.ep.size == 1:
            return self._apply_experts(x, dispatch.ends, keys, self._maps(1)[0])
        # Batches of evaluation may differ in rows, so there the ranks' slots would too.
        shipment = self.ep.ship(dispatch.counts(), slots if self.training else None)
        arriving = [shipment.send(part, i) for i, part in enumerate(shipment.pack(x))]
        arriving_keys = None if keys is None else shipment.keys(keys)
        returning = []
        for i, maps in enumerate(self._maps(self.ep.chunks)):
            here = Dispatch.by_expert(*shipment.contents(i), shipment.experts)
            rows = self.tp.gather_features(here.gather(arriving[i].land()))
            own = None if arriving_keys is None else arriving_keys[i][here.order]
            y = self.tp.scatter_features(self._apply_experts(rows, here.ends, own, maps))
            returning.append(shipment.send_back(here.restore(y), i))
        return shipment.unpack([flight.land() for flight in returning])

    def _maps(self, chunks: int) -> list[list[Callable[[Tensor, Tensor], Tensor]]]:
        """The linear maps of each run of experts, the last one last."""
        stacks = [self.wi_0, self.wi_1, self.wo] if self.gated else [self.wi, self.wo]
        return [list(maps) for maps in zip(*(s.chunks(chunks) for s in stacks), strict=True)]

    def _apply_experts(
        self,
        x: Tensor,
        ends: Tensor,
        keys: Tensor | None,
        maps: list[Callable[[Tensor, Tensor], Tensor]],
    ) -> Tensor:
        """This rank's hidden units of some experts over rows x [N, d_model], keys [N]."""
        *first, last = maps
        if self.gated:
            inner = activate(first[1](x, ends), first[0](x, ends))
        else:
            inner = activate(first[0](x, ends), None)
        if keys is not None:
            # Drawn by the tokens' places in the batch, not by their expert's rows.
            inner = drop(inner, draw(keys, self.tp.part(self.d_ff)), self.dropout)
        return last(inner, ends)
