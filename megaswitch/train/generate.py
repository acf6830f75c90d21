"""Greedy decoding without a cache: enough to see what a model has learned."""

from __future__ import annotations

import torch
from torch import Tensor

from megaswitch.model.switch_transformer import SwitchTransformer


@torch.no_grad()
def greedy(
    model: SwitchTransformer,
    encoder_tokens: Tensor,
    *,
    encoder_mask: Tensor | None = None,
    max_tokens: int = 64,
    pad_id: int = 0,
    eos_id: int = 1,
) -> Tensor:
    """The most likely continuation, token by token.

    Routing groups span rows in evaluation too, so where experts overflow a row's text may depend on
    the rows beside it.

    Args:
        model: in evaluation mode.
        encoder_tokens: [B, Le] int64.
        encoder_mask: [B, Le] bool, True on real tokens; None: all are.
        max_tokens: most tokens to generate.
        pad_id: starts the decoder, and fills rows after their EOS.
        eos_id: ends a row.

    Returns:
        [B, ≤ max_tokens] int64, without the start token; up to and with EOS, then padding.
    """
    tokens = encoder_tokens.new_full((len(encoder_tokens), 1), pad_id)
    finished = torch.zeros(len(encoder_tokens), dtype=torch.bool, device=encoder_tokens.device)
    for _ in range(max_tokens):
        logits = model(encoder_tokens, tokens, encoder_mask=encoder_mask).logits[:, -1]
        best = logits.argmax(-1).masked_fill(finished, pad_id)
        tokens = torch.cat([tokens, best[:, None]], 1)
        finished |= best == eos_id
        if finished.all():
            break
    return tokens[:, 1:]
