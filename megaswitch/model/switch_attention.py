"""Switch attention: experts in place of attention's matrices (paper, appendix A)."""

from __future__ import annotations

from torch import Tensor

from megaswitch.config import ModelConfig
from megaswitch.layers.attention import Attend, KeyValues
from megaswitch.layers.linear import Linear
from megaswitch.layers.noise import Noise
from megaswitch.layers.parameter import Init
from megaswitch.model.experts import FeedForwardProjections, LinearProjections
from megaswitch.model.moe import SwitchLayer
from megaswitch.model.router import Routing

_PROJECTIONS = {"linear": LinearProjections, "ffn": FeedForwardProjections}


class SwitchAttention(Attend):
    """Self-attention whose queries and keys come from a token's expert; keys are values too.

    One router decides for both, as in Mesh-TF's `ExpertsSelfAttention`. A token that found its
    expert full has queries, keys and values of zero: it attends by position alone and offers
    nothing. Experts start as those of FFNs do; queries are multiplied by d_kv^-½. The output matrix
    is dense, and so is cross-attention.

    In bf16 the paper saw this diverge (Table 10).
    """

    def __init__(self, config: ModelConfig, site: str) -> None:
        super().__init__(config.num_heads, config.d_kv, dropout=config.dropout, site=site)
        projections = _PROJECTIONS[config.moe.attention](config, f"{site}.experts")
        self.switch = SwitchLayer(config, site, projections)
        inner = config.num_heads * config.d_kv
        self.o = Linear(inner, config.d_model, shard="row", init=Init("normal", inner**-0.5))

    def project(
        self,
        x: Tensor,
        mask: Tensor,
        rows_per_group: int | None,
        noise: Noise | None,
        first: int,
    ) -> tuple[Tensor, KeyValues, Routing]:
        """Queries [B, heads, L, d_kv], keys and values alike, of the heads here; and the routing.

        Arguments are those of `SwitchFFN.forward`.
        """
        layer = self.switch
        routing = layer.route(x, mask, rows_per_group, noise, first)
        with layer.autocast(x):
            rows, dispatch = layer.work(layer.precise(x), mask, routing, noise)
            both = layer.combine(rows, dispatch, routing, mask.numel()).view(*mask.shape, -1)
        q, kv = (self.split_heads(part) for part in both.chunk(2, -1))
        return q * self.d_kv**-0.5, KeyValues(kv, kv), routing
