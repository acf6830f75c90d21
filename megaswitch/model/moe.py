"""The mixture of experts: route → dispatch → experts → combine (paper §2.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megaswitch.config import ModelConfig
from megaswitch.layers.noise import Noise, ahead
from megaswitch.layers.norm import at_least_fp32
from megaswitch.model.dispatch import Dispatch
from megaswitch.model.experts import Experts, ExpertStack
from megaswitch.model.groups import Draws, group_tokens, into_groups
from megaswitch.model.router import Routing
from megaswitch.model.routers import ROUTERS
from megaswitch.parallel.regions import named
from megaswitch.parallel.tensor_parallel import ALONE, TensorParallel


class SwitchLayer(nn.Module):
    """A router and experts. What becomes of their outputs is up to `forward` of a kind of layer.

    Args:
        site: the layer's name, such as `encoder.1.ffn`.
        experts: what works on tokens.
    """

    tp: TensorParallel = ALONE
    fused: bool = False  # whether Triton's kernels sort and move rows

    def __init__(self, config: ModelConfig, site: str, experts: ExpertStack) -> None:
        super().__init__()
        self.site = site
        self.fp32 = config.moe.router_precision == "fp32"
        self.num_experts = config.moe.num_experts
        self.router = ROUTERS[config.moe.router](config)
        self.experts = experts

    def precise(self, x: Tensor) -> Tensor:
        """`x` as experts get it: in at least fp32 if the whole layer, with its exchange, is."""
        return at_least_fp32(x) if self.fp32 else x

    def autocast(self, x: Tensor) -> torch.autocast:
        """The context in which experts work: as around the layer, or none if it is in fp32."""
        kind = x.device.type
        return torch.autocast(kind, enabled=not self.fp32 and torch.is_autocast_enabled(kind))

    def route(
        self, x: Tensor, mask: Tensor, rows_per_group: int | None, noise: Noise | None, first: int
    ) -> Routing:
        """Ask the router; arguments are those of `SwitchFFN.forward`."""
        rows = rows_per_group or len(mask)
        groups = group_tokens(mask, rows, limited=rows_per_group is not None)
        own, parts = self.tp.tokens(x, mask.numel()), x.ndim == 2
        draws = Draws(noise, self.site, mask.shape, own, None if parts else rows, first)
        routing: Routing = self.router(x if parts else into_groups(x, rows), groups, draws)
        return routing

    @named("dispatch")
    def work(
        self, x: Tensor, mask: Tensor, routing: Routing, noise: Noise | None
    ) -> tuple[Tensor, Dispatch]:
        """Let experts work on the tokens x.

        Returns:
            rows [R, …] in expert order, and that order.
        """
        tokens = mask.numel()
        dispatch = self._dispatch(routing, tokens)
        if self.experts.ep.size == 1:
            rows = self.tp.enter(x, mask.shape).reshape(tokens, -1)
        else:
            rows = self.tp.slice_features(x)
        keys = self._dropout_keys(routing, dispatch, mask.shape[1], noise)
        return self.experts(dispatch.gather(rows), dispatch, routing.slots, keys), dispatch

    @named("dispatch")
    def combine(self, y: Tensor, dispatch: Dispatch, routing: Routing, tokens: int) -> Tensor:
        """Sum rows y [R, …] of `work` by token, times gates: [tokens, …] in the features of y.

        Gates serve features that tp ranks divide among them.
        """
        gate = routing.gate
        if routing.token is None:
            gate = self.tp.for_features(gate, parts=gate.ndim == 1)
        weight = _flat(gate, routing, tokens) * _flat(routing.kept, routing, tokens)
        return dispatch.combine(y, weight.to(y.dtype), tokens)

    def _dispatch(self, routing: Routing, tokens: int) -> Dispatch:
        expert, kept = (_flat(t, routing, tokens) for t in (routing.expert, routing.kept))
        labels = self.experts.ep.relabel(expert, self.num_experts)
        dispatch = Dispatch.by_expert(labels, kept, self.num_experts, fused=self.fused)
        if routing.token is None:
            return dispatch
        # Filler behind the last row is never kept, so that any token can stand for it.
        token = routing.token.flatten().clamp(max=tokens - 1)
        most = None if routing.slots is None else routing.slots * self.num_experts
        return dispatch.of_pairs(token, most)

    def _dropout_keys(
        self, routing: Routing, dispatch: Dispatch, length: int, noise: Noise | None
    ) -> Tensor | None:
        """[R] from which the draws of each row are made, or None if there are none."""
        if noise is None or not self.experts.dropout:
            return None
        site, width = self.experts.site, self.experts.d_ff
        if dispatch.token is None:
            return noise.token_keys(site, length, width)[dispatch.order]
        # Each expert that works on a token draws for itself.
        keys = noise.token_keys(site, length, width * self.num_experts)[dispatch.token]
        return ahead(keys, routing.expert.flatten()[dispatch.order] * width)


def _flat(x: Tensor, routing: Routing, tokens: int) -> Tensor:
    """Something of each token or pair, flattened; tokens without the filler behind the last."""
    return x.flatten()[:tokens] if routing.token is None else x.flatten()


class SwitchFFN(SwitchLayer):
    """A mixture of experts in place of a feed-forward network.

    A token's output is its expert's output times the gate, or the sum of these; a token that found
    its experts full, and padding, get zero: the block's residual carries them on.
    """

    def __init__(self, config: ModelConfig, site: str) -> None:
        super().__init__(config, site, Experts(config, f"{site}.experts"))

    @named("dispatch")
    def forward(
        self,
        x: Tensor,
        mask: Tensor,
        rows_per_group: int | None,
        noise: Noise | None,
        first: int = 0,
    ) -> tuple[Tensor, Routing]:
        """Apply the layer.

        Args:
            x: [B, L, d_model], or [B·L/tp, d_model] of this rank's tokens.
            mask: [B, L] bool, True on real tokens.
            rows_per_group: R; consecutive rows routed together. A last group may have fewer. None:
                nothing is dropped, and no row depends on another.
            noise: randomness of a training step, or None.
            first: place of the first token in its row, where decoding goes on.

        Returns:
            like x, and the routing with its tokens in groups [G, R·L].
        """
        routing = self.route(x, mask, rows_per_group, noise, first)
        with self.autocast(x):
            y, dispatch = self.work(self.precise(x), mask, routing, noise)
            # One gate can wait until the token is where it came from; several cannot.
            alone = routing.token is None
            tokens = mask.numel()
            if alone and self.fused and self.tp.size == 1:
                weight = _flat(routing.gate, routing, tokens) * _flat(routing.kept, routing, tokens)
                return dispatch.restore_times(y, weight).view(x.shape), routing
            y = dispatch.restore(y) if alone else self.combine(y, dispatch, routing, tokens)
            y = self._return(y, mask.shape, parts=x.ndim == 2).view(x.shape)
            return (self._times_gate(y, routing, tokens) if alone else y), routing

    def _return(self, y: Tensor, shape: torch.Size, *, parts: bool) -> Tensor:
        """All features of this rank's tokens, of y [B·L, …] that tp ranks have worked on."""
        if self.experts.ep.size == 1:
            return self.tp.leave(y.view(*shape, -1), parts=parts)
        return self.tp.join_features(y, parts=parts)

    def _times_gate(self, y: Tensor, routing: Routing, tokens: int) -> Tensor:
        gate, kept = routing.gate.flatten(), routing.kept.flatten()
        weight = gate[:tokens] * kept[self.tp.tokens(y, tokens)]
        return y * weight.to(y.dtype).view(*y.shape[:-1], 1)
