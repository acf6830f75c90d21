"""MegaSwitch: the trainer for Switch Transformers, from a laptop to trillion-parameter clusters.

model = megaswitch.load_model("runs/demo")
out = model(encoder_tokens, decoder_tokens, encoder_mask=mask)
out.logits, out.encoder_hidden, out.aux_loss, out.routing["encoder.1.ffn"].expert
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megaswitch.model.switch_transformer import SwitchTransformer

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
