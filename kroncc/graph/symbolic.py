"""Symbolic shapes by name: batch, length, target_length."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from kroncc.graph.inputs import TARGETS, TOKENS

LETTERS = {"batch": "B", "length": "L", "target_length": "T"}


def _named_dims(graph: fx.Graph) -> list[tuple[str, torch.SymInt]]:
    """Return (name, symbolic size) of every symbolic dimension of the inputs."""
    dims = []
    for node in graph.find_nodes(op="placeholder"):
        for axis, size in enumerate(node.meta["val"].shape):
            if isinstance(size, torch.SymInt):
                dims.append((_name(str(node.target), axis), size))
    return dims


def _name(entry: str, axis: int) -> str:
    if axis == 0:
        return "batch"
    if axis == 1 and entry in TOKENS:
        return "length"
    if axis == 1 and entry in TARGETS:
        return "target_length"
    return f"{entry}_{axis}"


def unify(graph: fx.Graph) -> None:
    """Make all inputs share one batch, and all inputs of a kind one length, in every shape of the graph."""
    first: dict[str, torch.SymInt] = {}
    for name, size in _named_dims(graph):
        known = first.setdefault(name, size)
        if known.node.expr != size.node.expr and known.node.hint == size.node.hint:
            bool(known == size)  # the comparison itself records the equality


def upper_limits(graph: fx.Graph, ranges: Mapping[Any, Any]) -> dict[str, int]:
    """Return the largest value of each size that has one, e.g. the length that positions are learned for."""
    limits: dict[str, int] = {}
    for name, size in _named_dims(graph):
        found = ranges.get(size.node.expr)
        if found is not None and isinstance(found.upper, sympy.Integer):
            limits[name] = min(int(found.upper), limits.get(name, int(found.upper)))
    return limits


def symbols(graph: fx.Graph) -> dict[str, sympy.Symbol]:
    """Return the symbols of the shapes by name: `batch`, `length`, `target_length`, or `<input>_<axis>`."""
    return {name: size.node.expr for name, size in reversed(_named_dims(graph))}


def concrete(size: int | torch.SymInt, names: Mapping[str, sympy.Symbol], sizes: Mapping[str, int]) -> int:
    """Return one dimension with numbers for its symbols, e.g. `{"batch": 2, "length": 128}`."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    values = {names[name]: sympy.Integer(value) for name, value in sizes.items()}
    # A size that depends on data (a selection by mask) may be anything; a multiple of all sizes divides well.
    unknown = size.node.expr.free_symbols - values.keys()
    values |= dict.fromkeys(unknown, sympy.Integer(math.prod(sizes.values())))
    return int(size.node.expr.xreplace(values))


def depends_on_data(value: Any) -> bool:
    """Tell whether a tensor's shape holds a size that only its data can tell."""
    return isinstance(value, torch.Tensor) and bool(free_unbacked_symbols(value))


def concrete_shape(
    value: torch.Tensor, names: Mapping[str, sympy.Symbol], sizes: Mapping[str, int]
) -> tuple[int, ...]:
    """Return the shape of a node's value with numbers for its symbols."""
    return tuple(concrete(size, names, sizes) for size in value.shape)


def shape_text(value: Any, names: Mapping[str, sympy.Symbol]) -> str:
    """Return a value's shape in letters, e.g. `[B, L, 32]`; nested values in parentheses, '' for none."""
    if isinstance(value, torch.Tensor):
        return f"[{', '.join(_letters(size, names) for size in value.shape)}]"
    if isinstance(value, torch.SymInt):
        return _letters(value, names)
    if isinstance(value, list | tuple):
        return f"({', '.join(shape_text(item, names) for item in value)})"
    return ""


def _letters(size: int | torch.SymInt, names: Mapping[str, sympy.Symbol]) -> str:
    if not isinstance(size, torch.SymInt):
        return str(size)
    letters = {symbol: sympy.Symbol(LETTERS.get(name, name)) for name, symbol in names.items()}
    return str(size.node.expr.xreplace(letters))
