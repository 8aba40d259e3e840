"""One call of an operator, as the rules on dimensions read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from kroncc.graph.atoms import Shape, extent_size, fresh, size_of, tensors_of, unify
from kroncc.graph.ops import op_name

if TYPE_CHECKING:
    from kroncc.graph.axes import Axes


class Call:
    """One call of an aten operator: its arguments by name, the dimensions of its tensors."""

    def __init__(self, axes: Axes, node: fx.Node) -> None:
        assert isinstance(node.target, torch._ops.OpOverload)
        self.axes = axes
        self.node = node
        self.name = op_name(node)
        schema = node.target._schema.arguments
        self.values: dict[str, Any] = {arg.name: arg.default_value for arg in schema}
        self.values |= dict(zip((arg.name for arg in schema), node.args, strict=False)) | dict(node.kwargs)
        self.sizes = [[size_of(size) for size in value.shape] for value in tensors_of(node)]

    @property
    def reason(self) -> str:
        """Say where a dimension is treated in a way that does not let it be cut."""
        return f"{self.name} in {self.node.meta.get('fqn') or 'the model itself'}"

    def shape(self, name: str) -> Shape | None:
        """Return the dimensions of an argument, None where it is no tensor."""
        value = self.values.get(name)
        parts = self.axes.parts(value) if isinstance(value, fx.Node) else []
        return parts[0] if parts else None

    def input(self) -> Shape:
        """Return the dimensions of the first argument."""
        found = self.shape(next(iter(self.values)))
        assert found is not None
        return found

    def operands(self) -> list[Shape]:
        """Return the dimensions of all arguments that are tensors, or lists of them."""
        return [shape for node in self.node.all_input_nodes for shape in self.axes.parts(node)]

    def dim(self, name: str = "dim", rank: int | None = None) -> int:
        """Return a dimension argument, counted from the front."""
        at = int(self.values[name])
        return at % (rank if rank is not None else max(len(self.input()), 1))

    def dims(self, name: str = "dim") -> list[int]:
        """Return a list of dimensions, counted from the front; all where it is not given."""
        given, rank = self.values[name], len(self.input())
        if given is None or given == []:
            return list(range(rank))
        return [at % rank for at in (given if isinstance(given, list | tuple) else [given])]


def broadcast(operands: Sequence[Shape], sizes: Sequence[Any], reason: str) -> Shape:
    """Return the dimensions of an elementwise result of sizes `sizes`; equal dimensions become one."""
    made: Shape = []
    for back in range(len(sizes), 0, -1):
        extents = [shape[-back] for shape in operands if len(shape) >= back and shape[-back]]
        wide = [extent for extent in extents if extent_size(extent) == sizes[-back]]
        if not wide:
            made.append(fresh(sizes[-back]))
            continue
        for other in wide[1:]:
            unify(wide[0], other, reason)
        made.append(wide[0])
    return made
