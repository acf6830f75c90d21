"""MegaSwitch: the trainer for Switch Transformers, from a laptop to trillion-parameter clusters.

model = megaswitch.load_model("runs/demo")
out = model(encoder_tokens, decoder_tokens, encoder_mask=mask)
out.logits, out.encoder_hidden, out.aux_loss, out.routing["encoder.1.ffn"].expert

megaswitch.generate(model, encoder_tokens, encoder_mask=mask, beams=4).tokens
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from megaswitch.model.switch_transformer import SwitchTransformer
    from megaswitch.train.generate import Generated

__version__ = "0.1.0"


def load_model(path: str | Path, *, device: str = "cpu") -> SwitchTransformer:
    """The model of a checkpoint, in evaluation mode.

    Args:
        path: a checkpoint, or a run folder, whose newest checkpoint is taken.
        device: where its parameters go.

    Raises:
        UserError: there is no checkpoint, or it is damaged.
    """
    import torch

    from megaswitch.checkpoint.manager import (
        find_checkpoint,
        load_model_tensors,
        read_config,
        verify,
    )
    from megaswitch.model.switch_transformer import SwitchTransformer

    checkpoint = find_checkpoint(Path(path))
    verify(checkpoint)
    with torch.device(device):
        model = SwitchTransformer(read_config(checkpoint).model)
    load_model_tensors(checkpoint, model)
    return model.eval()


def generate(
    model: SwitchTransformer,
    encoder_tokens: Tensor,
    *,
    encoder_mask: Tensor | None = None,
    **settings: Any,
) -> Generated:
    """Decode a batch; each row's text depends on that row alone.

    Args:
        model: as from `load_model`.
        encoder_tokens: [B, Le] int64.
        encoder_mask: [B, Le] bool, True on real tokens, wherever the padding is; None: all are.
        **settings: fields of `megaswitch.train.generate.Decoding`: max_tokens, beams,
            length_penalty, early_stopping, temperature, top_k, top_p, seed, cache.

    Returns:
        `tokens` [B, ≤ max_tokens] int64, up to and with EOS, then padding; `scores` [B].

    Raises:
        UserError: `settings` make no sense.
    """
    from megaswitch.train.generate import generate as run

    return run(model, encoder_tokens, encoder_mask=encoder_mask, **settings)
