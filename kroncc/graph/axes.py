"""Which dimensions of which tensors belong together: what must be cut at once to make a model narrower.

Every dimension of every value is a product of atoms (`atoms`). Every operator relates the atoms of what it
reads to those of what it gives (`axis_functions`, `axis_modules`); one that is not understood pins the atoms
it touches. What is left is a partition of all dimensions of all weights into groups that are cut together.
Nothing is known by name. The same idea, for single channels: Fang et al., DepGraph, CVPR 2023.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from kroncc.graph.atoms import Atom, Shape, extent_size, fresh, leaves, pin, pin_static, pinned, tensors_of
from kroncc.graph.axis_functions import function_shapes
from kroncc.graph.axis_modules import module_shapes
from kroncc.graph.model_graph import ModelGraph


@dataclass(frozen=True)
class Span:
    """Where an atom lies in a tensor: dimension `dim` is `outer` x `size` x `inner`, and `size` is the atom.

    `names` are all names of the tensor in the model; more than one where it is tied.
    """

    names: tuple[str, ...]
    dim: int
    outer: int
    size: int
    inner: int


class Axes:
    """The atoms of a model graph. Valid as long as the graph does not change."""

    def __init__(self, graph: ModelGraph) -> None:
        self.graph = graph
        self._values: dict[fx.Node, list[Shape]] = {}
        self._names = _names(graph.model)
        self._transient = _transient(graph.model)
        self._tensors: dict[int, Shape] = {}
        for node in graph.graph.nodes:
            if node.op != "output":
                self._values[node] = self._shapes(node)
        for name, source in graph.outputs.items():
            for atom in (atom for extent in self.of(source) for atom in extent):
                atom.outputs[name] = None

    def of(self, node: fx.Node) -> Shape:
        """Return the dimensions of a node's tensor, each as its atoms, outermost first."""
        return [leaves(extent) for extent in self._values[node][0]]

    def parts(self, node: fx.Node) -> list[Shape]:
        """Return the dimensions of each tensor that a node gives; none for a number."""
        return self._values.get(node, [])

    def tensor(self, tensor: torch.Tensor) -> Shape:
        """Return the dimensions of a parameter or buffer. What is not saved, or is a constant, is pinned."""
        if id(tensor) not in self._tensors:
            shape = [fresh(int(size)) for size in tensor.shape]
            names = self._names.get(id(tensor), ())
            if not names:
                pin(shape, "it is an extent of a constant of the graph")
            elif self._transient.intersection(names):
                pin(shape, f"it is an extent of {names[0]}, which is not saved")
            self._tensors[id(tensor)] = shape
        return self._tensors[id(tensor)]

    def spans(self, atom: Atom) -> tuple[Span, ...]:
        """Return every place where parameters and buffers have the atom, in model order."""
        found: list[Span] = []
        for key, names in self._names.items():
            found += _spans(atom.root(), self._tensors.get(key, []), names)
        return tuple(found)

    def obstacle(self, atom: Atom) -> str:
        """Return why the atom cannot be cut, '' where it can."""
        reasons = [*atom.root().pins]
        for span in self.spans(atom):
            if span.size != atom.root().size:
                reasons.append(f"{span.names[0]} has it twice in one dimension")
        return "; ".join(reasons[:2])

    def unknown(self, node: fx.Node, what: str, tensors: Iterable[torch.Tensor] = ()) -> list[Shape]:
        """Pin all that a node touches, and return what it gives, pinned."""
        reason = f"{what} in {node.meta.get('fqn') or 'the model itself'} is not understood"
        for operand in node.all_input_nodes:
            for shape in self.parts(operand):
                pin_static(shape, reason)
        for tensor in tensors:
            pin(self.tensor(tensor), reason)
        return pinned(node, reason)

    def _shapes(self, node: fx.Node) -> list[Shape]:
        if node.op == "get_attr":
            return [self.tensor(_attribute(self.graph.module, str(node.target)))]
        if node.op == "placeholder":
            return pinned(node, f"it is an extent of the input {node.target}")
        if not tensors_of(node):
            return []
        return module_shapes(self, node) if node.op == "call_module" else function_shapes(self, node)


def _attribute(module: Any, target: str) -> torch.Tensor:
    for part in target.split("."):
        module = getattr(module, part)
    assert isinstance(module, torch.Tensor)
    return module


def _names(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """Return all names of each parameter and buffer, by identity, in model order."""
    names: dict[int, tuple[str, ...]] = {}
    for owner, module in model.named_modules(remove_duplicate=False):
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in own:
            names[id(tensor)] = (*names.get(id(tensor), ()), f"{owner}.{name}".lstrip("."))
    return names


def _transient(model: nn.Module) -> set[str]:
    saved = model.state_dict(keep_vars=True).keys()
    return {name for name, _ in model.named_buffers(remove_duplicate=False)} - saved


def _spans(atom: Atom, shape: Shape, names: tuple[str, ...]) -> list[Span]:
    found = []
    for dim, extent in enumerate(shape):
        flat = leaves(extent)
        if atom not in flat:
            continue
        at = flat.index(atom)
        size = extent_size([one for one in flat if one is atom])
        outer, inner = extent_size(flat[:at]), extent_size(flat[at + 1 :])
        found.append(Span(names, dim, int(outer), int(size), int(inner)))
    return found
