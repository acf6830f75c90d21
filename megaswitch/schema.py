"""Every configuration key, as frozen dataclasses with their types, bounds and defaults.

Those of `data`, `distill`, `fault` and `model.moe` are in files of their own, such as
`schema_data.py`; `schema_keys.py` says how keys are declared.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from megaswitch.schema_data import DataConfig
from megaswitch.schema_distill import DistillConfig
from megaswitch.schema_fault import FaultConfig
from megaswitch.schema_fp8 import FP8Config
from megaswitch.schema_keys import STRICT, Selective, all_of, only_if
from megaswitch.schema_moe import MoEConfig


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoRAConfig:
    """Low-rank adapters: W x + alpha / rank · B A x, with B = 0 at the start (arXiv 2106.09685).

    Unless `optim.train_only` or `optim.freeze` say otherwise, they alone are trained.
    """

    rank: int = Field(default=0, ge=0, description="rank of the adapters; 0: none")
    alpha: float = Field(
        default=16.0, gt=0, description="their scale is alpha / rank",
        json_schema_extra=only_if("model.lora.rank"),
    )  # fmt: skip
    targets: list[str] = Field(
        default_factory=lambda: ["*attention.*"],
        description="patterns of the linear maps that get one, such as *attention.q, *.experts.*",
        json_schema_extra=only_if("model.lora.rank"),
    )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    """Shape of the encoder-decoder (paper, Table 9)."""

    preset: str | None = Field(default=None, description="a name of `megaswitch presets`")
    vocab_size: int = Field(default=32128, gt=0, description="rows of the embedding")
    d_model: int = Field(description="size of the residual stream", default=512, gt=0)
    d_kv: int = Field(default=64, gt=0, description="size of one attention head")
    d_ff: int = Field(default=2048, gt=0, description="hidden size of an FFN or of one expert")
    num_heads: int = Field(description="attention heads", default=8, gt=0)
    num_encoder_layers: int = Field(description="blocks of the encoder", default=6, gt=0)
    num_decoder_layers: int = Field(description="blocks of the decoder", default=6, gt=0)
    activation: Literal["relu", "gated-gelu"] = Field(
        default="relu", description="of FFNs and experts: T5 v1.0's or v1.1's"
    )
    tie_embeddings: bool = Field(
        default=True, description="one table for embedding and head, logits × d_model^-½"
    )
    relative_buckets: int = Field(default=32, ge=4, description="buckets of relative position")
    relative_max_distance: int = Field(
        default=128, gt=0, description="beyond it all positions share a bucket"
    )
    norm_epsilon: float = Field(default=1e-6, gt=0, description="added to the mean square")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="everywhere, in training")
    init_scale: float = Field(
        default=0.1, gt=0, description="s in σ = √(s / fan-in) of FFNs, experts, router, head"
    )
    moe: MoEConfig = Field(default_factory=MoEConfig)
    lora: LoRAConfig = Field(default_factory=LoRAConfig)

    def is_sparse(self, stack: Literal["encoder", "decoder"], index: int) -> bool:
        """True if layer `index` (from 0) of `stack` has experts (Flaxformer's placement)."""
        step = self.moe.encoder_sparse_step if stack == "encoder" else self.moe.decoder_sparse_step
        return self.moe.num_experts > 0 and step > 0 and index % step == step - 1

    def sparse_parts(self, stack: Literal["encoder", "decoder"], index: int) -> tuple[str, ...]:
        """Parts of a layer that are mixtures of experts: "self_attention", "ffn", both or none."""
        return self.moe.parts if self.is_sparse(stack, index) else ()

    def switch_layers(self) -> list[str]:
        """Names of the mixtures of experts, such as `encoder.1.ffn`, in order."""
        stacks: tuple[Literal["encoder", "decoder"], ...] = ("encoder", "decoder")
        return [
            f"{stack}.{index}.{part}"
            for stack in stacks
            for index in range(self.num_layers(stack))
            for part in self.sparse_parts(stack, index)
        ]

    def num_layers(self, stack: Literal["encoder", "decoder"]) -> int:
        """Blocks in `stack`."""
        return self.num_encoder_layers if stack == "encoder" else self.num_decoder_layers


_ADAMW = only_if("optim.name", "adamw")
_ADAFACTOR = only_if("optim.name", "adafactor")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimConfig:
    """Optimizer and learning rate. The defaults are T5's pre-training recipe.

    The paper names none; its code base (Mesh-TensorFlow with the t5 library) gives these.
    """

    name: Literal["adafactor", "adamw"] = Field(default="adafactor", description="optimizer")
    learning_rate: float = Field(default=1.0, ge=0, description="peak rate; rsqrt: its numerator")
    schedule: Literal["rsqrt", "constant", "linear", "cosine", "wsd"] = Field(
        default="rsqrt", description="rsqrt: T5's; wsd: warm up, stay, decay"
    )
    warmup_steps: int = Field(
        default=10_000, ge=0, description="linear ramp; rsqrt: the flat part instead"
    )
    decay_steps: int | None = Field(
        default=None, gt=0, description="length of wsd's final decay",
        json_schema_extra=only_if("optim.schedule", "wsd"),
    )  # fmt: skip
    min_learning_rate: float = Field(
        description="where the decay ends",
        default=0.0,
        ge=0,
        json_schema_extra=only_if("optim.schedule", "linear", "cosine", "wsd"),
    )
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled; matrices only")
    train_only: list[str] | None = Field(
        default=None,
        description="patterns of the parameters to train, such as decoder.*; unset: all, or with "
        "model.lora.rank the adapters",
    )
    freeze: list[str] | None = Field(
        default=None, description="patterns of parameters that keep their values"
    )
    clip_grad_norm: float | None = Field(default=None, gt=0, description="global norm; unset: off")
    beta1: float = Field(
        description="decay of the first moment",
        default=0.9,
        ge=0,
        lt=1,
        json_schema_extra=_ADAMW,
    )
    beta2: float = Field(
        description="decay of the second moment",
        default=0.95,
        ge=0,
        lt=1,
        json_schema_extra=_ADAMW,
    )
    epsilon: float = Field(
        description="added to the root of the second moment",
        default=1e-8,
        gt=0,
        json_schema_extra=_ADAMW,
    )
    decay_exponent: float = Field(
        description="β2 = 1 - step^-decay_exponent",
        default=0.8,
        gt=0,
        json_schema_extra=_ADAFACTOR,
    )
    clip_threshold: float = Field(
        description="largest RMS of an update before it is scaled",
        default=1.0,
        gt=0,
        json_schema_extra=_ADAFACTOR,
    )
    epsilon1: float = Field(
        description="added to squared gradients",
        default=1e-30,
        gt=0,
        json_schema_extra=_ADAFACTOR,
    )
    epsilon2: float = Field(
        description="least RMS of a parameter for scaling",
        default=1e-3,
        gt=0,
        json_schema_extra=all_of(_ADAFACTOR, only_if("optim.scale_by_parameter")),
    )
    factored_min_dim: int = Field(
        description="matrices from this size on keep row and column moments only",
        default=128,
        gt=0,
        json_schema_extra=_ADAFACTOR,
    )
    scale_by_parameter: bool = Field(
        description="make rates relative to the RMS of a parameter",
        default=True,
        json_schema_extra=_ADAFACTOR,
    )
    expert_statistics: Literal["per-expert", "joint"] = Field(
        default="per-expert",
        json_schema_extra=all_of(_ADAFACTOR, only_if("model.moe.num_experts")),
        description="update clipping and scaling: per expert (T5X) or over the stack (Mesh-TF)",
    )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainConfig:
    """The loop. Batch sizes count sequences."""

    run_dir: str = Field(default="runs/run", description="metrics, config and checkpoints")
    init_from: str | None = Field(
        default=None, description="checkpoint or run to take the first weights from; unset: random"
    )
    steps: int = Field(default=1000, gt=0, description="optimizer steps in all")
    seed: int = Field(default=0, ge=0, description="of weights, data order and noise")
    batch_size: int = Field(default=64, gt=0, description="sequences per optimizer step, all ranks")
    micro_batch_size: int = Field(default=8, gt=0, description="sequences per forward and rank")
    rampup_batch_size: int | None = Field(default=None, gt=0, description="batch size at the start")
    rampup_increment: int | None = Field(
        description="sequences added at a time",
        default=None,
        gt=0,
        json_schema_extra=only_if("train.rampup_batch_size"),
    )
    rampup_samples: int | None = Field(
        default=None, gt=0, description="sequences until the full batch size",
        json_schema_extra=only_if("train.rampup_batch_size"),
    )  # fmt: skip
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="bf16: autocast over fp32 weights; routers follow model.moe.router_precision",
    )
    fp8: FP8Config = Field(default_factory=FP8Config)
    backend: Literal["torch", "te"] = Field(
        default="torch",
        description="what multiplies: torch, which emulates FP8 on any device, or NVIDIA's "
        "Transformer Engine",
    )
    dispatch: Literal["torch", "triton"] = Field(
        default="torch",
        description="what sorts tokens by expert and moves them: torch, or fused kernels of Triton",
    )
    compile: bool = Field(
        default=False,
        description="let torch.compile make one kernel of what is between products: norms, "
        "activations, softmax, dropout, the loss",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: CUDA where there is one"
    )
    deterministic: bool = Field(
        default=False, description="deterministic GPU kernels alone: the same bits again, slower"
    )
    activation_checkpointing: Selective = Field(
        default=False, description="recompute each block, or 'selective': not its matrix products"
    )
    logits_z_loss: float = Field(default=1e-4, ge=0, description="weight of log²Z of the softmax")
    loss_tokens: int | None = Field(
        default=None,
        gt=0,
        description="target tokens whose logits exist at a time, for large vocabularies; costs the "
        "head's product once more; unset: all",
    )
    log_interval: int = Field(default=10, gt=0, description="steps between metric lines")
    trackers: list[Literal["wandb", "mlflow"]] = Field(
        default_factory=list, description="services that metrics also go to"
    )
    valid_interval: int = Field(
        default=500,
        gt=0,
        description="steps between validations",
        json_schema_extra=only_if("data.valid"),
    )
    valid_samples: int = Field(
        default=256,
        gt=0,
        description="held-out sequences, and examples of each task, per validation",
        json_schema_extra=only_if("data.valid"),
    )
    valid_metrics: bool = Field(
        default=True,
        description="score the held-out examples of tasks by their metrics, not the loss alone",
        json_schema_extra=all_of(only_if("data.valid"), only_if("data.tasks")),
    )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ParallelConfig:
    """How a run is spread over its ranks. The results do not depend on it, only speed and memory.

    World size = pp × dp × tp with dp = edp × ep: the ranks left over after pp, ep and tp hold
    copies (`edp`) of the experts.
    """

    pp: int = Field(default=1, gt=0, description="pipeline parallel: ranks the layers lie on")
    ep: int = Field(default=1, gt=0, description="expert parallel: ranks the experts lie on")
    tp: int = Field(default=1, gt=0, description="tensor parallel: ranks that slice each matrix")
    sequence_parallel: bool = Field(
        default=True, description="with tp > 1, tokens between the matrices are sliced as well"
    )
    zero: Literal["none", "optimizer", "full"] = Field(
        default="none",
        description="sharded over data-parallel ranks: nothing; optimizer states and gradients; "
        "weights too",
    )
    replicas: int = Field(
        default=1,
        gt=0,
        description="copies that each sharded tensor is kept in (hybrid sharding)",
        json_schema_extra=only_if("parallel.zero", "optimizer", "full"),
    )
    schedule: Literal["gpipe", "1f1b", "interleaved", "zero-bubble"] = Field(
        default="1f1b", description="order of a pipeline's micro-batches"
    )
    stages_per_rank: int = Field(
        default=1,
        gt=0,
        description="pipeline stages on each rank",
        json_schema_extra=only_if("parallel.schedule", "interleaved", "zero-bubble"),
    )
    layers_per_stage: list[int] | None = Field(
        default=None, description="blocks of each pipeline stage, in order; unset: even FLOPs"
    )
    ep_chunks: int = Field(
        default=1, gt=0, description="parts of an expert exchange, to overlap with the experts"
    )
    overlap_gradients: bool = Field(
        default=True,
        description="sum gradients during the backward pass (without pipeline)",
        json_schema_extra=only_if("parallel.zero", "none"),
    )
    prefetch: int = Field(
        default=1,
        ge=0,
        description="blocks whose weights are gathered ahead",
        json_schema_extra=only_if("parallel.zero", "full"),
    )
    timeout: int = Field(
        default=600, gt=0, description="seconds after which a collective gives its ranks up"
    )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckpointConfig:
    """When checkpoints are written and how many are kept. One is always written at the end."""

    interval: int | None = Field(default=None, gt=0, description="steps between; unset: end only")
    keep: int = Field(default=2, gt=0, description="newest checkpoints kept")
    keep_every: int | None = Field(
        default=None, gt=0, description="checkpoints of steps that it divides are kept for ever"
    )
    keep_best: bool = Field(
        default=False,
        description="also keep checkpoints/best, of the highest score of the tasks or, without "
        "tasks, of the lowest validation loss",
        json_schema_extra=only_if("data.valid"),
    )
    background: bool = Field(
        default=True, description="train on while a copy of the state is being written"
    )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RunConfig:
    """Everything that decides a run."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    fault: FaultConfig = Field(default_factory=FaultConfig)
    distill: DistillConfig = Field(default_factory=DistillConfig)
