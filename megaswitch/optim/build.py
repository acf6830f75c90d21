"""From a configuration to an optimizer; learning rate and gradient clipping of one step."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaswitch.log import UserError
from megaswitch.optim.adafactor import Adafactor
from megaswitch.parallel.shard import spec_of
from megaswitch.parallel.weights import block_of

if TYPE_CHECKING:
    from megaswitch.config import OptimConfig
    from megaswitch.parallel.mesh import Mesh

# Device types for which torch has a one-kernel AdamW; elsewhere torch chooses for itself.
_FUSED_ADAMW_DEVICES = frozenset({"cpu", "cuda", "mps", "xpu"})


def build_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimConfig
) -> torch.optim.Optimizer:
    """The configured optimizer, with the parameters split by whether weight decay touches them.

    The first parameter group decays by `config.weight_decay`, the second by 0; a group without
    parameters is left out. What decays: see `decays`. The learning rate is `config.learning_rate`
    until `set_learning_rate` is called.

    A block may be empty. It gets the same states as any other after the first step, so that all
    ranks write the same names to a checkpoint: AdamW's `exp_avg` and `exp_avg_sq` are empty as the
    block is; Adafactor's `row`, `column` and `moment` have the block's sizes in the dimensions that
    they keep, so that `column` has values even where there are no rows.

    Args:
        parameters: as from `module.parameters()`, each with a `ShardSpec`, or a rank's blocks of
            them. Frozen ones (`requires_grad` false) are left out.
        config: which optimizer, with which numbers.

    Raises:
        UserError: no parameter is trainable.
    """
    trainable = [p for p in parameters if p.requires_grad]
    if not trainable:
        raise UserError("every parameter is frozen: an optimizer needs at least one to train.")
    decayed = [p for p in trainable if decays(p)]
    undecayed = [p for p in trainable if not decays(p)]
    groups = [
        {"params": group, "weight_decay": decay}
        for group, decay in ((decayed, config.weight_decay), (undecayed, 0.0))
        if group
    ]
    if config.name == "adafactor":
        return Adafactor(
            groups,
            lr=config.learning_rate,
            decay_exponent=config.decay_exponent,
            clip_threshold=config.clip_threshold,
            epsilon1=config.epsilon1,
            epsilon2=config.epsilon2,
            factored_min_dim=config.factored_min_dim,
            scale_by_parameter=config.scale_by_parameter,
            expert_statistics=config.expert_statistics,
        )
    device_types = {p.device.type for p in trainable}
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True if device_types <= _FUSED_ADAMW_DEVICES else None,
    )


def decays(parameter: nn.Parameter) -> bool:
    """True if weight decay applies to the parameter: common practice, decay matrices only.

    - Matrices decay, embeddings and output projection among them (as in Megatron-LM; tied, they
      are one parameter). A stack of experts counts as its slices, so expert matrices decay too.
    - Vectors and scalars, so norm scales and biases, do not.
    - Relative-position bias tables do not: they are biases, indexed by distance.

    Args:
        parameter: with a `ShardSpec`.
    """
    spec = spec_of(parameter)
    dimensions = parameter.ndim - (1 if spec.is_expert else 0)
    return dimensions >= 2 and not spec.is_bias


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Use `value` in all parameter groups from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = value


def clip_gradients(
    parameters: Iterable[nn.Parameter], max_norm: float | None, mesh: Mesh | None = None
) -> Tensor:
    """Scale all gradients, in place, so that their global norm is at most `max_norm`.

    Args:
        parameters: those without a gradient are passed over. Among several ranks each is the
            rank's block of a global parameter, and its gradient that of the global loss.
        max_norm: None measures only.
        mesh: the ranks, which call this together; None: a process alone.

    Returns:
        The 2-norm over all gradients before clipping, a scalar on their device, equal on all ranks.
        It is not finite if one of them is not; judging that is left to the caller.
    """
    parameters = list(parameters)
    if mesh is None or mesh.group is None:
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    else:
        norm = _global_norm(parameters, mesh)
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def _global_norm(parameters: list[nn.Parameter], mesh: Mesh) -> Tensor:
    """Norm over the gradients of all ranks; what several hold alike counts once.

    Norms of single gradients are taken in float32 at least, squared and summed in float64.
    """
    dtype = reduce(torch.promote_types, (p.dtype for p in parameters), torch.float32)
    counted = [p.grad for p in parameters if p.grad is not None and block_of(p).counts]
    total = torch.zeros((), dtype=torch.float64, device=mesh.device)
    if counted:
        norms = torch._foreach_norm(counted, dtype=dtype)
        total += torch.stack(norms).double().square().sum()
    dist.all_reduce(total, group=mesh.group)
    return total.sqrt_().to(dtype)
