"""Whether two graphs are the same program but for sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from kroncc.graph.atoms import Size, size_of, tensors_of
from kroncc.graph.model_graph import ModelGraph
from kroncc.graph.ops import SHAPE, op_name

Sizes = Callable[[fx.Node], Sequence[Sequence[Size]]]
LAID_OUT = frozenset({"contiguous", "alias"})
MADE = frozenset({"zeros", "ones", "empty", "new_zeros", "new_ones", "new_empty", "layer_norm", "rms_norm"})


def difference(before: ModelGraph, after: ModelGraph, sizes: Sizes) -> str:
    """Say where `after` is another program than `before`; '' where it differs in sizes alone.

    `sizes` gives, for a node of `before`, the sizes of its tensors that are due in `after`. Numbers may
    differ only where they are sizes: in operators that move values or make constants.
    """
    old, new = _computing(before), _computing(after)
    twins: dict[fx.Node, fx.Node] = {}
    for one, other in zip(old, new, strict=False):
        if what := _differs(before, after, one, other, twins, sizes):
            return f"{one.meta.get('fqn') or 'the model itself'}: {what}"
        twins[one] = other
    return "" if len(old) == len(new) else f"{len(new)} operations instead of {len(old)}"


def _computing(graph: ModelGraph) -> list[fx.Node]:
    """Return the nodes that do more than lay values out: an extent of 1 spares that."""
    return [node for node in graph.graph.nodes if op_name(node) not in LAID_OUT]


def _source(node: fx.Node) -> fx.Node:
    while op_name(node) in LAID_OUT:
        node = node.all_input_nodes[0]
    return node


def _differs(
    before: ModelGraph,
    after: ModelGraph,
    one: fx.Node,
    other: fx.Node,
    twins: dict[fx.Node, fx.Node],
    sizes: Sizes,
) -> str:
    if one.op != other.op or one.target != other.target:
        return f"{other.target} instead of {one.target}"
    free = op_name(one) in SHAPE | MADE or not isinstance(one.meta.get("val"), torch.Tensor)
    if not _same((one.args, one.kwargs), (other.args, other.kwargs), twins, free):
        return f"{one.target} of other values: {other.args} instead of {one.args}"
    if str(one.target) in before.extras and not _same_extra(
        before.extras[str(one.target)], after.extras[str(one.target)]
    ):
        return f"{one.target} became {after.extras[str(one.target)]}"
    got = [[size_of(size) for size in value.shape] for value in tensors_of(other)]
    due = sizes(one) if one.op != "output" else []
    for mine, expected in zip(got, due, strict=False):
        if any(a != b for a, b in zip(mine, expected, strict=True) if _fixed(a) or _fixed(b)):
            return f"{one.target} gives {mine} instead of {list(expected)}"
    return ""


def _fixed(size: Size) -> bool:
    return isinstance(size, int)


def _same(one: Any, other: Any, twins: dict[fx.Node, fx.Node], free: bool) -> bool:
    """Say whether two arguments are the same; `free` lets whole numbers differ."""
    if isinstance(one, fx.Node):
        return isinstance(other, fx.Node) and twins.get(_source(one)) is _source(other)
    if isinstance(one, list | tuple):
        alike = isinstance(other, list | tuple) and len(one) == len(other)
        return alike and all(_same(a, b, twins, free) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict):
        alike = isinstance(other, dict) and one.keys() == other.keys()
        return alike and all(_same(one[key], other[key], twins, free) for key in one)
    if type(one) is int and type(other) is int and free:
        return True
    return type(one) is type(other) and bool(one == other)


def _same_extra(one: nn.Module | torch.Tensor, other: nn.Module | torch.Tensor) -> bool:
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and torch.equal(one, other)
    return _text(one) == _text(other)


def _text(module: nn.Module) -> str:
    parts = [part.code for part in module.modules() if isinstance(part, fx.GraphModule)]
    return "\n".join([repr(module), *parts])
