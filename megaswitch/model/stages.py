"""The model as one ordered list of layers, cut into pipeline stages.

The list is: embedding, encoder blocks, decoder blocks, head. A stage owns a run of the blocks under
their global names; both streams are embedded by the first, and each stage hands on both. What
several stages hold (a tied embedding, the relative biases of a stack) is a declared tie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from megaswitch.config import ModelConfig
from megaswitch.model.count import block_flops, head_flops
from megaswitch.model.switch_transformer import SwitchTransformer


@dataclass(frozen=True)
class Stage:
    """A run of the blocks, counted through encoder and decoder.

    Attributes:
        index: of the stage.
        blocks: which.
        first: whether it embeds.
        last: whether it has the head.
    """

    index: int
    blocks: range
    first: bool
    last: bool


def plan_stages(blocks_per_stage: Sequence[int]) -> list[Stage]:
    """Stages of so many blocks each."""
    stages, start = [], 0
    for index, blocks in enumerate(blocks_per_stage):
        run = range(start, start + blocks)
        stages.append(Stage(index, run, index == 0, index == len(blocks_per_stage) - 1))
        start += blocks
    return stages


def balance(
    config: ModelConfig, stages: int, encoder_length: int, decoder_length: int
) -> list[int]:
    """Blocks of each stage such that the costliest stage, in FLOPs, costs least.

    The head counts with the last stage. Each stage has at least one block.
    """
    costs = block_flops(config, encoder_length, decoder_length)
    head = head_flops(config, decoder_length)

    def fill(limit: float) -> list[int] | None:
        """Fill stages up to `limit`, from the last; None if it takes too many."""
        counts, cost = [0], float(head)
        for place, block in enumerate(reversed(costs)):
            left = len(costs) - place
            if counts[-1] and (cost + block > limit or left <= stages - len(counts)):
                counts.append(0)
                cost = 0.0
            counts[-1] += 1
            cost += block
        return counts[::-1] if len(counts) <= stages else None

    low, high = 0.0, float(sum(costs) + head)
    best = fill(high)
    for _ in range(60):
        middle = (low + high) / 2
        found = fill(middle)
        low, high, best = (low, middle, found) if found else (middle, high, best)
    assert best is not None
    assert len(best) == stages
    return best


def keep_only(model: SwitchTransformer, stage: Stage) -> SwitchTransformer:
    """Take from a whole model all that `stage` does not need, and return it."""
    encoder_blocks = model.config.num_encoder_layers
    last_block = encoder_blocks + model.config.num_decoder_layers - 1
    for stack, first in ((model.encoder, 0), (model.decoder, encoder_blocks)):
        for index in list(stack.layers):
            if int(index) + first not in stage.blocks:
                del stack.layers[index]
        if not stack.layers:
            del stack.relative_bias
    if encoder_blocks - 1 not in stage.blocks:
        del model.encoder.final_norm
    if last_block not in stage.blocks:
        del model.decoder.final_norm
    if not stage.first and not (stage.last and model.config.tie_embeddings):
        del model.embedding
    if not stage.last and not model.config.tie_embeddings:
        del model.head
    return model


class StageModule(nn.Module):
    """A stage as one module, so that what wraps modules (FSDP2, schedules) can wrap it.

    What it does is the runner's business: `body(stage module, inputs, number of the micro-batch)`.
    """

    body: Callable[[StageModule, tuple[Tensor, ...], int], Any]

    def __init__(self, model: SwitchTransformer, stage: Stage) -> None:
        super().__init__()
        self.model = model
        self.stage = stage

    def forward(self, *inputs: Tensor, micro_batch: Tensor) -> Any:
        """From the activations of the stage before to the next one's, or the loss."""
        return self.body(self, inputs, int(micro_batch))
