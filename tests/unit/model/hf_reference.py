"""Tiny, randomly initialised HF models, and both sides' results in one shape for comparison."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersLayerNorm,
    SwitchTransformersTop1Router,
)
from transformers.models.t5.modeling_t5 import T5LayerNorm

from megaswitch.checkpoint.huggingface import from_hf, to_hf
from megaswitch.checkpoint.huggingface_config import config_from_hf
from megaswitch.layers.vocab import token_losses
from megaswitch.model.switch_transformer import SwitchOutput, SwitchTransformer

Padding = Literal["none", "right", "left"]
STACK_TABLES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
VOCAB = 101
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,  # odd
    "d_model": 20,
    "d_kv": 8,
    "num_heads": 3,  # × d_kv = 24, not d_model
    "d_ff": 28,
    # So that both halves of the buckets and the cut-off occur within a dozen tokens.
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 9,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
    "attn_implementation": "eager",
}


def t5(*, gated: bool, seed: int = 0) -> T5ForConditionalGeneration:
    """T5 v1.0 (ReLU, tied), or v1.1 (gated GELU, a head of its own)."""
    proj = "gated-gelu" if gated else "relu"
    config = T5Config(
        **SHAPE,
        num_layers=3,
        num_decoder_layers=2,
        feed_forward_proj=proj,
        tie_word_embeddings=not gated,
    )
    model = T5ForConditionalGeneration(config)
    if gated:
        # HF 5 ties every T5 that it builds; only loading a file with an lm_head unties it.
        model.lm_head.weight = nn.Parameter(torch.empty(VOCAB, config.d_model))
    return randomize(model, seed)


def switch(
    *, layers: tuple[int, int] = (4, 2), step: int = 2, seed: int = 0, **config: Any
) -> SwitchTransformersForConditionalGeneration:
    """HF's Switch; `config` goes over `SHAPE` and over a capacity that no row fills."""
    defaults = SHAPE | {"num_experts": 4, "expert_capacity": 1000, "router_jitter_noise": 0.0}
    encoder, decoder = layers
    hf_config = SwitchTransformersConfig(
        num_layers=encoder,
        num_decoder_layers=decoder,
        num_sparse_encoder_layers=encoder // step,
        num_sparse_decoder_layers=decoder // step,
        **defaults | config,
    )
    model = SwitchTransformersForConditionalGeneration(hf_config)
    if not hf_config.tie_word_embeddings:
        for name in STACK_TABLES:  # three tables in HF, one in ours and in the released models
            model.get_submodule(name.removesuffix(".weight")).weight = model.shared.weight
    return randomize(model, seed)


@torch.no_grad()
def randomize(model: PreTrainedModel, seed: int) -> Any:
    """Fill every parameter at random, norms too, so that no two may be mistaken for each other."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim == 1:
            weight.copy_(1.0 + 0.2 * noise)
        elif name in ("shared.weight", "lm_head.weight") or "relative" in name:
            weight.copy_(noise)
        else:
            weight.copy_(noise * weight.shape[1] ** -0.5)
    return model.eval()


def double(model: PreTrainedModel, monkeypatch: Any) -> Any:
    """`model` computing in fp64 throughout; as it comes, HF rounds norms and routers to fp32."""

    def forward(norm: Any, x: Tensor) -> Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        return norm.weight * (x * torch.rsqrt(variance + norm.variance_epsilon))

    for kind in (T5LayerNorm, SwitchTransformersLayerNorm):
        monkeypatch.setattr(kind, "forward", forward)
    for module in model.modules():
        if isinstance(module, SwitchTransformersTop1Router):
            module.dtype = torch.float64
    return model.double()


def ours_like(hf: PreTrainedModel, **moe: Any) -> SwitchTransformer:
    """Our model with HF's weights and dtype; `moe` over the imported configuration."""
    config = config_from_hf(hf.config.to_dict())
    config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, **moe))
    model = SwitchTransformer(config).to(hf.dtype)
    model.load_state_dict(from_hf(hf.state_dict(), config))
    return model.eval()


@dataclass(frozen=True)
class Batch:
    """Tokens [B, Le], [B, Ld], masks (None: nothing is padded) and labels, -100 on padding."""

    encoder: Tensor
    decoder: Tensor
    encoder_mask: Tensor | None
    decoder_mask: Tensor | None
    labels: Tensor


def make_batch(padding: Padding, seed: int = 0) -> Batch:
    """Three rows of at most 13 and 9 tokens."""
    generator = torch.Generator().manual_seed(seed)
    encoder = torch.randint(2, VOCAB, (3, 13), generator=generator)
    decoder = torch.randint(2, VOCAB, (3, 9), generator=generator)
    labels = torch.randint(1, VOCAB, (3, 9), generator=generator)
    if padding == "none":
        decoder[:, 0] = 0
        return Batch(encoder, decoder, None, None, labels)
    masks = []
    for tokens, lengths in ((encoder, (13, 9, 4)), (decoder, (5, 9, 3))):
        mask = torch.arange(tokens.shape[1]) < torch.tensor(lengths)[:, None]
        masks.append(mask.flip(1) if padding == "left" else mask)
        tokens.masked_fill_(~masks[-1], 0)
    decoder[torch.arange(3), masks[1].int().argmax(1)] = 0
    return Batch(encoder, decoder, *masks, labels.masked_fill(~masks[1], -100))


@dataclass(frozen=True)
class Result:
    """What is compared; gradients under HF's names, experts that got no token included."""

    logits: Tensor
    encoder_hidden: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]


def run_hf(model: PreTrainedModel, batch: Batch, **arguments: Any) -> tuple[Result, Any]:
    """Forward and backward of HF's cross-entropy; also HF's own output."""
    model.zero_grad()
    output = model(
        input_ids=batch.encoder,
        attention_mask=None if batch.encoder_mask is None else batch.encoder_mask.long(),
        decoder_input_ids=batch.decoder,
        decoder_attention_mask=None if batch.decoder_mask is None else batch.decoder_mask.long(),
        labels=batch.labels,
        **arguments,
    )
    output.loss.backward()
    gradients = {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
        for name, weight in model.named_parameters()
    }
    hidden = output.encoder_last_hidden_state
    return Result(output.logits, hidden, output.loss.detach(), gradients), output


def run_ours(
    model: SwitchTransformer, batch: Batch, *, aux: float = 0.0, z: float = 0.0
) -> tuple[Result, SwitchOutput]:
    """Forward and backward of our mean cross-entropy plus router losses; also our output."""
    model.zero_grad()
    output = model(
        batch.encoder,
        batch.decoder,
        encoder_mask=batch.encoder_mask,
        decoder_mask=batch.decoder_mask,
    )
    counted = batch.labels != -100
    losses = token_losses(output.logits, batch.labels.clamp(min=0), counted)
    loss = losses.cross_entropy / losses.tokens + aux * output.aux_loss + z * output.z_loss
    loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    gradients = to_hf(gradients, model.config)
    return Result(output.logits, output.encoder_hidden, loss.detach(), gradients), output


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest element expected."""
    scale = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    return ((actual - expected).abs().max() / scale).item()


def routing_margin(model: PreTrainedModel, batch: Batch) -> float:
    """Smallest difference of the two largest router logits of HF's `model`; inf if it has none."""
    margins = [float("inf")]

    def record(_: nn.Module, __: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        best = output[2].detach().topk(2, -1).values
        margins.append((best[..., 0] - best[..., 1]).min().item())

    routers = [m for m in model.modules() if isinstance(m, SwitchTransformersTop1Router)]
    handles = [router.register_forward_hook(record) for router in routers]
    with torch.no_grad():
        run = {"input_ids": batch.encoder, "decoder_input_ids": batch.decoder}
        if batch.encoder_mask is not None:
            run |= {"attention_mask": batch.encoder_mask.long()}
            run |= {"decoder_attention_mask": batch.decoder_mask.long()}
        model(**run)
    for handle in handles:
        handle.remove()
    return min(margins)
