"""The parameters of a checkpoint as a tree, layers that are alike on one line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from megaswitch.checkpoint.tensor_files import StoredTensor


@dataclass
class Line:
    """One line of the tree.

    Attributes:
        label: with the branches drawn before it.
        tensors: what stands under it; of a leaf, the same tensor of each layer it stands for.
        leaf: True if these tensors have one shape and type.
    """

    label: str
    tensors: list[StoredTensor]
    leaf: bool


@dataclass
class _Node:
    """A name part, with everything that begins with it; several layers if they are alike."""

    children: dict[str, _Node] = field(default_factory=dict)
    tensors: list[StoredTensor] = field(default_factory=list)

    @property
    def signature(self) -> object:
        """Equal for nodes that differ in nothing but their tensors' values."""
        leaf = self.tensors[0] if self.tensors else None
        return (
            leaf and (leaf.shape, leaf.dtype),
            tuple((name, child.signature) for name, child in self.children.items()),
        )

    def merge(self, other: _Node) -> None:
        """Stand for `other`, which is alike, too."""
        self.tensors += other.tensors
        for name, child in self.children.items():
            child.merge(other.children[name])

    def all_tensors(self) -> list[StoredTensor]:
        return [*self.tensors, *(t for c in self.children.values() for t in c.all_tensors())]


def parameter_tree(tensors: Mapping[str, StoredTensor]) -> list[Line]:
    """The lines of the tree, in the order of `tensors`.

    Args:
        tensors: by dotted name.
    """
    root = _Node()
    for name, tensor in tensors.items():
        node = root
        for part in name.split("."):
            node = node.children.setdefault(part, _Node())
        node.tensors.append(tensor)
    _collapse(root)
    return list(_lines(root, ""))


def _collapse(node: _Node) -> None:
    """Merge the numbered children that are alike."""
    alike: dict[object, list[str]] = {}
    for name, child in node.children.items():
        key = child.signature if name.isdecimal() else name
        alike.setdefault(key, []).append(name)
    children = {}
    for names in alike.values():
        first, *others = (node.children[name] for name in names)
        for other in others:
            first.merge(other)
        children[_span(names) if others else names[0]] = first
    node.children = children
    for child in children.values():
        _collapse(child)


def _span(names: list[str]) -> str:
    """Several numbers in a shell's braces, such as {0..10..2}."""
    numbers = sorted(map(int, names))
    steps = {b - a for a, b in pairwise(numbers)}
    if len(numbers) < 3 or len(steps) > 1:
        return f"{{{','.join(map(str, numbers))}}}"
    step = steps.pop()
    return f"{{{numbers[0]}..{numbers[-1]}{'' if step == 1 else f'..{step}'}}}"


def _lines(node: _Node, indent: str) -> Iterator[Line]:
    for position, (name, child) in enumerate(node.children.items()):
        last = position == len(node.children) - 1
        label = name
        # A name with one continuation is one name.
        while len(child.children) == 1 and not child.tensors:
            ((rest, child),) = child.children.items()
            label = f"{label}.{rest}"
        yield Line(
            f"{indent}{'└─ ' if last else '├─ '}{label}", child.all_tensors(), not child.children
        )
        yield from _lines(child, indent + ("   " if last else "│  "))
