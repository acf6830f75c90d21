"""A Switch model with fewer experts: the most used ones, alone or with the others merged in.

How often each was used was counted by `megaswitch evaluate --json`. Merging follows M-SMoE (Li et
al. 2023, arXiv 2310.01334) as far as weights tell: an expert joins the kept one whose router row is
most like its own, since that is where its tokens would mostly go, and experts that joined become
their mean, weighted by use. Router rows follow their experts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megaswitch.checkpoint.new_model import Original, made, make_model
from megaswitch.checkpoint.streams import Target
from megaswitch.config import ModelConfig, RunConfig
from megaswitch.log import UserError
from megaswitch.model.count import meta_model
from megaswitch.parallel.shard import spec_of


@dataclass(frozen=True)
class Group:
    """The old experts that a new one is made of.

    Attributes:
        experts: their numbers, the most used first.
        weights: their shares of the new one; they sum to 1.
    """

    experts: tuple[int, ...]
    weights: tuple[float, ...]


def read_usage(path: Path, model: ModelConfig) -> dict[str, list[int]]:
    """Tokens per expert of each Switch layer, from what `megaswitch evaluate --json` printed.

    Raises:
        UserError: it is no such file, or of another model.
    """
    try:
        router = json.loads(path.read_text(encoding="utf-8"))["total"]["router"]
        usage = {str(name): entry["tokens_per_expert"] for name, entry in router.items()}
        counts = [count for layer in usage.values() for count in layer]
        if any(type(count) is not int or count < 0 for count in counts):
            raise ValueError("a count is no natural number")
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist; write it with megaswitch evaluate CHECKPOINT DATA --json"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is not what megaswitch evaluate --json prints ({error!r}); write it anew"
        ) from error
    wanted = dict.fromkeys(model.switch_layers(), model.moe.num_experts)
    if {name: len(layer) for name, layer in usage.items()} != wanted:
        raise UserError(
            f"{path} counts {', '.join(f'{n}: {len(c)} experts' for n, c in usage.items())}; the "
            f"checkpoint has {', '.join(f'{n}: {c}' for n, c in wanted.items())}; evaluate this one"
        )
    return usage


def most_used(usage: Sequence[int], number: int) -> list[int]:
    """The most used experts in their old order; of equals the first."""
    by_use = sorted(range(len(usage)), key=lambda expert: (-usage[expert], expert))
    return sorted(by_use[:number])


def kept_alone(usage: Sequence[int], number: int) -> list[Group]:
    """New experts that are the most used old ones."""
    return [Group((expert,), (1.0,)) for expert in most_used(usage, number)]


def merged(usage: Sequence[int], router: Tensor, number: int) -> list[Group]:
    """New experts that each take in those most like them.

    Args:
        usage: tokens of each old expert.
        router: [E, d_model], whose rows tell who is alike (by the cosine).
        number: of new experts.
    """
    heads = most_used(usage, number)
    rows = torch.nn.functional.normalize(router.double(), dim=1)
    members = {head: [head] for head in heads}
    for expert in sorted(range(len(usage)), key=lambda expert: (-usage[expert], expert)):
        if expert not in members:
            alike = rows[heads] @ rows[expert]
            members[heads[int(alike.argmax())]].append(expert)
    groups = []
    for experts in members.values():
        total = sum(usage[expert] for expert in experts)
        shares = [usage[e] / total if total else 1 / len(experts) for e in experts]
        groups.append(Group(tuple(experts), tuple(shares)))
    return groups


def prune(source: Path, target: Path, usage_file: Path, number: int, *, merge: bool) -> None:
    """Write a checkpoint's model with `number` experts in each Switch layer.

    Memory holds a matrix or two.

    Args:
        source: a checkpoint, or a run folder, whose newest is taken.
        target: folder to write.
        usage_file: see `read_usage`.
        number: of experts left, fewer than there are.
        merge: whether the others are merged into them, not dropped.

    Raises:
        UserError: an argument does not fit, or files cannot be read or written.
    """

    def smaller(checkpoint: Path, config: RunConfig) -> ModelConfig:
        experts = config.model.moe.num_experts
        if not 1 <= number < experts:
            raise UserError(
                f"--num-experts {number} must be at least 1 and less than the {experts} experts of "
                f"{checkpoint}"
            )
        return replace(config.model, moe=replace(config.model.moe, num_experts=number))

    def make(large: Original, model: ModelConfig) -> list[Target]:
        groups = {}
        for layer, counts in read_usage(usage_file, large.config.model).items():
            router = large.read(f"model.{prefix(layer)}.router.weight")
            groups[prefix(layer)] = (
                merged(counts, router, number) if merge else kept_alone(counts, number)
            )
        return _targets(large, model, groups)

    make_model(source, target, smaller, make)


def prefix(layer: str) -> str:
    """The module of router and experts: `encoder.layers.1.ffn` of `encoder.1.ffn`."""
    stack, _, rest = layer.partition(".")
    within = ".switch" if layer.endswith(".self_attention") else ""
    return f"{stack}.layers.{rest}{within}"


def _targets(
    large: Original, model: ModelConfig, groups: Mapping[str, Sequence[Group]]
) -> list[Target]:
    """The new model's parameters."""
    targets = []
    for name, parameter in meta_model(model).named_parameters():
        full = f"model.{name}"
        dtype, read = large.dtype(full), partial(large.read, full)
        layer, router, _ = name.partition(".router.")
        if spec_of(parameter).is_expert or router:
            # Of routers a row belongs to each expert.
            of_layer = groups[layer if router else name.partition(".experts.")[0]]
            makes = [partial(_mean, read, group) for group in of_layer]
            shape: Sequence[int] = parameter.shape[1:]
        else:
            makes, shape = [read], parameter.shape
        sources = [made(name, shape, dtype, make) for make in makes]
        targets.append(Target(name, sources, stacked=len(shape) < parameter.ndim))
    return targets


def _mean(read: Callable[[int], Tensor], group: Group) -> Tensor:
    """By the group's weights, in the tensors' type; one alone stays as it is, bit for bit."""
    first = read(group.experts[0])
    if len(group.experts) == 1:
        return first
    total = first.double() * group.weights[0]
    for expert, weight in zip(group.experts[1:], group.weights[1:], strict=True):
        total += read(expert).double() * weight
    return total.to(first.dtype)
