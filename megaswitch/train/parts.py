"""This rank's part of the model, under any layout: built, sliced, wrapped and filled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from megaswitch.checkpoint.chunks import Chunk
from megaswitch.checkpoint.contents import history_chunks
from megaswitch.config import RunConfig, TrainConfig
from megaswitch.layers.backend import BACKENDS, Backend
from megaswitch.layers.compiled import compile_regions
from megaswitch.layers.deferred import WeightGradients
from megaswitch.layers.linear import GroupedLinear, Linear
from megaswitch.layers.parameter import Init, initialize
from megaswitch.model.blocks import Block
from megaswitch.model.count import meta_model
from megaswitch.model.experts import ExpertStack
from megaswitch.model.moe import SwitchLayer
from megaswitch.model.router import Router
from megaswitch.model.stages import Stage, StageModule, balance, keep_only, plan_stages
from megaswitch.model.switch_transformer import SwitchTransformer
from megaswitch.parallel.distribute import shard_over_data, slice_parameters, weights_of
from megaswitch.parallel.expert_parallel import ExpertParallel
from megaswitch.parallel.gradients import GradientSums
from megaswitch.parallel.mesh import Mesh
from megaswitch.parallel.shard import ShardSpec
from megaswitch.parallel.tensor_parallel import TensorParallel
from megaswitch.parallel.weights import Weight
from megaswitch.train.objectives import PRECISIONS
from megaswitch.train.trainable import freeze, maps_in_fp8


@dataclass
class Parts:
    """What of the model lies on this rank.

    Attributes:
        stages: of all ranks.
        models: this rank's layers by stage; the whole model as stage 0 where there is no pipeline.
        modules: the same as a pipeline's modules, or empty.
        later: of stages that put weight gradients off.
        weights: this rank's parameters by global name.
        inits: their initial distributions.
        gradients: completes their gradients.
        backend: multiplies.
        expert_rank: this rank's place among those that divide the experts.
    """

    stages: list[Stage]
    models: dict[int, SwitchTransformer]
    modules: dict[int, StageModule]
    later: dict[int, WeightGradients]
    weights: dict[str, Weight]
    inits: dict[str, Init]
    gradients: GradientSums
    backend: Backend
    expert_rank: int

    def initialize(self, seed: int) -> None:
        """Fill all parameters, each from its own stream of `seed`."""
        initialize(((n, w.local, self.inits[n]) for n, w in self.weights.items()), seed)

    def parameters(self) -> Iterator[nn.Parameter]:
        """This rank's blocks, as optimizers see them."""
        return (w.local for w in self.weights.values())

    def remembered(self) -> list[Chunk]:
        """What a checkpoint keeps besides weights and optimizer states."""
        return history_chunks(self.backend.history(), self.weights, self.expert_rank)

    @property
    def training(self) -> bool:
        """Whether the layers are in training mode."""
        return next(iter(self.models.values())).training

    def train(self, mode: bool = True) -> None:
        """Switch between training and evaluation."""
        for model in self.models.values():
            model.train(mode)


def _allocate(module: nn.Module, device: torch.device) -> None:
    module.to_empty(device=device)


def build_parts(
    config: RunConfig,
    mesh: Mesh,
    *,
    lengths: tuple[int, int] = (512, 114),
    training: bool = True,
    allocate: Callable[[nn.Module, torch.device], object] = _allocate,
) -> Parts:
    """Build this rank's part, unfilled.

    Args:
        config: the run.
        mesh: the ranks.
        lengths: of encoder and decoder rows, by which a pipeline is balanced.
        training: False for evaluation: nothing is sharded over data-parallel ranks.
        allocate: gives parameters on the meta device their memory.
    """
    stages = _stages(config, mesh, lengths)
    specs: dict[str, ShardSpec] = {}
    inits: dict[str, Init] = {}
    models: dict[int, SwitchTransformer] = {}
    modules: dict[int, StageModule] = {}
    later: dict[int, WeightGradients] = {}
    zero = mesh.axis("dense_shard").size > 1 and config.parallel.zero != "none" and training
    sharded: set[str] = set()
    train = config.train if training else TrainConfig()  # what is evaluated is so in full precision
    backend = BACKENDS[train.backend](train.fp8, mesh)
    for stage in stages:
        if stage.index % mesh.axis("pp").size == mesh.axis("pp").rank:
            model = _layers(config, mesh, stage)
            if training:
                compile_regions(train.compile)
                freeze(model, config, stage if mesh.axis("pp").size > 1 else None)
            inits |= {n: p.init for n, p in model.named_parameters()}  # type: ignore[attr-defined]
            specs |= slice_parameters(model, mesh)
            _join(model, config, mesh)
            backend.attach(maps_in_fp8(model, train.fp8))
            if config.parallel.schedule == "zero-bubble" and mesh.axis("pp").size > 1:
                later[stage.index] = _put_off_weight_gradients(model)
            if mesh.axis("pp").size > 1:
                modules[stage.index] = StageModule(model, stage)
            if zero:
                sharded |= _shard(modules.get(stage.index, model), model, specs, config, mesh)
            if mesh.group is not None:
                allocate(model, mesh.device)
            models[stage.index] = model
    named = _share_biases(models)
    holders = _holders(config, stages, mesh)
    weights = weights_of(named, specs, mesh, {name: ranks[0] for name, ranks in holders.items()})
    for model in models.values():
        _choose(model, train, backend)
    sums = GradientSums(
        weights,
        mesh,
        sharded=frozenset(sharded),
        sequence_parallel=config.parallel.sequence_parallel,
        ties={name: ranks for name, ranks in holders.items() if name in weights},
    )
    place = mesh.axis("ep").rank
    return Parts(stages, models, modules, later, weights, inits, sums, backend, place)


def _layers(config: RunConfig, mesh: Mesh, stage: Stage) -> SwitchTransformer:
    """Those of a stage, without memory; of a process alone, all of them and with it."""
    if mesh.group is not None:
        return keep_only(meta_model(config.model), stage)
    with torch.device(mesh.device):
        return SwitchTransformer(config.model)


def _stages(config: RunConfig, mesh: Mesh, lengths: tuple[int, int]) -> list[Stage]:
    number = mesh.axis("pp").size * config.parallel.stages_per_rank
    counts = config.parallel.layers_per_stage
    if mesh.axis("pp").size == 1:
        counts = [config.model.num_encoder_layers + config.model.num_decoder_layers]
    return plan_stages(counts or balance(config.model, number, *lengths))


def _join(model: SwitchTransformer, config: RunConfig, mesh: Mesh) -> None:
    """Tell every layer whom it works with."""
    tp = TensorParallel(mesh.axis("tp"), config.parallel.sequence_parallel)
    ep = ExpertParallel(mesh.axis("ep"), config.parallel.ep_chunks)
    for module in model.modules():
        for name, value in (("tp", tp), ("ep", ep)):
            if hasattr(type(module), name):
                setattr(module, name, value)


def _choose(model: SwitchTransformer, train: TrainConfig, backend: Backend) -> None:
    """Set what costs memory or time and changes no result."""
    model.loss_tokens = train.loss_tokens
    model.set_activation_checkpointing(train.activation_checkpointing, backend.recompute)
    for module in model.modules():
        if isinstance(module, SwitchLayer):
            module.fused = train.dispatch == "triton"


def _put_off_weight_gradients(model: SwitchTransformer) -> WeightGradients:
    later = WeightGradients()
    for module in model.modules():
        if isinstance(module, Linear | GroupedLinear):
            module.later = later
    return later


def _shard(
    root: nn.Module,
    model: SwitchTransformer,
    specs: dict[str, ShardSpec],
    config: RunConfig,
    mesh: Mesh,
) -> set[str]:
    """Wrap with FSDP2: experts over edp, routers and other weights over dp.

    Norms and relative biases stay whole: they are few numbers, used in fp32, and a bias may serve
    several stages. So do experts that have no copies.

    Returns:
        names of the parameters that are sharded.
    """
    copies = mesh.axis("shard").size > 1
    reshard = config.parallel.zero == "full"
    precision = PRECISIONS[config.train.precision]
    whole = {
        name: p
        for name, p in model.named_parameters()
        if p.ndim == 1 or specs[name].is_bias or (specs[name].is_expert and not copies)
    }
    sharded = {name for name, _ in model.named_parameters()} - whole.keys()
    kept = list(whole.values())
    blocks = [*model.encoder.blocks, *model.decoder.blocks]
    for block in blocks:
        for module in block.modules():
            if isinstance(module, Router):  # computes in fp32, so it is gathered in fp32
                shard_over_data(module, mesh, whole=kept, reshard=reshard)
            elif isinstance(module, ExpertStack) and copies:
                own = torch.float32 if config.model.moe.router_precision == "fp32" else precision
                shard_over_data(
                    module, mesh, expert=True, whole=kept, precision=own, reshard=reshard
                )
        shard_over_data(block, mesh, whole=kept, precision=precision, reshard=reshard)
    # Embedding and head, in the precision of the residual stream; needed from first to last.
    shard_over_data(root, mesh, whole=kept, reshard=False)
    if reshard:
        _prefetch(blocks, config.parallel.prefetch)
    return sharded


def _prefetch(blocks: list[Block], ahead: int) -> None:
    """Gather the weights of so many blocks before they are needed."""
    units: list[list[FSDPModule]] = [
        [m for m in block.modules() if isinstance(m, FSDPModule)] for block in blocks
    ]
    for i, own in enumerate(units):
        after = [m for unit in units[i + 1 : i + 1 + ahead] for m in unit]
        before = [m for unit in units[max(0, i - ahead) : i][::-1] for m in unit]
        own[0].set_modules_to_forward_prefetch(after)
        own[0].set_modules_to_backward_prefetch(before)


def _share_biases(models: dict[int, SwitchTransformer]) -> dict[str, nn.Parameter]:
    """Let stages of one rank share a stack's relative bias; return all parameters by name."""
    named: dict[str, nn.Parameter] = {}
    for model in models.values():
        for name, parameter in list(model.named_parameters()):
            if name in named:
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, named[name])
            named.setdefault(name, parameter)
    return named


def _holders(config: RunConfig, stages: list[Stage], mesh: Mesh) -> dict[str, list[int]]:
    """The pipeline ranks that hold each parameter which several stages use: the declared ties."""
    ranks = mesh.axis("pp").size
    encoder = range(config.model.num_encoder_layers)
    using: dict[str, set[int]] = {
        "encoder.relative_bias.weight": {s.index for s in stages if s.blocks[0] in encoder},
        "decoder.relative_bias.weight": {s.index for s in stages if s.blocks[-1] not in encoder},
    }
    if config.model.tie_embeddings:
        using["embedding.weight"] = {stages[0].index, stages[-1].index}
    return {name: sorted({i % ranks for i in indices}) for name, indices in using.items()}
