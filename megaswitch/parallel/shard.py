"""How each parameter is laid out, declared beside the parameter itself.

One declaration, many readers: initialisation per expert, Adafactor's statistics, parameter counts,
weight-decay groups and, under parallel layouts, slicing and gradient groups. Nothing is guessed
from names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

MeshAxis = Literal["ep", "tp"]


@dataclass(frozen=True)
class ShardSpec:
    """The mesh axis that slices each dimension of a parameter.

    Attributes:
        axes: one entry per dimension: "ep" (experts), "tp" (tensor parallel) or None (whole).
            The expert axis, where there is one, is always dimension 0.
        is_bias: True for a table whose entries are added, whatever its shape; it does not decay.
    """

    axes: tuple[MeshAxis | None, ...]
    is_bias: bool = False

    def __post_init__(self) -> None:
        assert "ep" not in self.axes[1:], f"the expert axis must be dimension 0, not {self.axes}"

    @property
    def is_expert(self) -> bool:
        """True if dimension 0 counts experts, so that each slice is a parameter of its own."""
        return bool(self.axes) and self.axes[0] == "ep"


def declare(parameter: nn.Parameter, *axes: MeshAxis | None, is_bias: bool = False) -> nn.Parameter:
    """Attach a `ShardSpec` with one axis per dimension to `parameter` and return it."""
    assert len(axes) == parameter.ndim, f"{len(axes)} axes for {parameter.ndim} dimensions"
    return declare_spec(parameter, ShardSpec(axes, is_bias))


def declare_spec(parameter: nn.Parameter, spec: ShardSpec) -> nn.Parameter:
    """Attach `spec` to `parameter` and return it; wrapping and copying drop attributes."""
    parameter.shard_spec = spec  # type: ignore[attr-defined]
    return parameter


def spec_of(parameter: nn.Parameter) -> ShardSpec:
    """The `ShardSpec` that the parameter's layer declared.

    Raises:
        AttributeError: the layer declared none, which is our own mistake.
    """
    spec = parameter.shard_spec  # type: ignore[attr-defined]
    assert isinstance(spec, ShardSpec)
    return spec
