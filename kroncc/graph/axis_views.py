"""What operators that only move values say of dimensions: reshapes, permutations, pieces, joins."""

from __future__ import annotations

from typing import Any

from kroncc.graph.atoms import (
    Extent,
    Shape,
    extent_size,
    fresh,
    pin,
    pin_static,
    pinned,
    quotient,
    regroup,
)
from kroncc.graph.axis_call import Call, broadcast


def reshape(call: Call) -> list[Shape]:
    return [regroup(call.input(), call.sizes[0], f"{call.reason} regroups it")]


def permute(call: Call) -> list[Shape]:
    given = call.input()
    if "source" in call.values:
        return _moved(call, given)
    if "dims" in call.values:
        return [[given[at] for at in call.dims("dims")]]
    made, rank = list(given), len(given)
    first, second = (-2, -1) if call.name in ("t", "mT", "numpy_T") else _pair(call)
    if rank >= 2:
        made[first % rank], made[second % rank] = made[second % rank], made[first % rank]
    return [made]


def _moved(call: Call, given: Shape) -> list[Shape]:
    source, target = call.dims("source"), call.dims("destination")
    rest = [extent for at, extent in enumerate(given) if at not in source]
    for to, at in sorted(zip(target, source, strict=True)):
        rest.insert(to, given[at])
    return [rest]


def _pair(call: Call) -> tuple[int, int]:
    names = [name for name in ("dim0", "dim1", "axis0", "axis1") if name in call.values]
    return int(call.values[names[0]]), int(call.values[names[1]])


def unsqueeze(call: Call) -> list[Shape]:
    made = list(call.input())
    made.insert(call.dim(rank=len(made) + 1), [])
    return [made]


def squeeze(call: Call) -> list[Shape]:
    given = call.input()
    dims = call.dims() if "dim" in call.values else list(range(len(given)))
    return [[extent for at, extent in enumerate(given) if at not in dims or extent]]


def expand(call: Call) -> list[Shape]:
    """Spread dimensions of size 1: what comes out holds the same values all along."""
    return [broadcast([call.input()], call.sizes[0], call.reason)]


def repeat(call: Call) -> list[Shape]:
    given, sizes = call.input(), call.sizes[0]
    padded: Shape = [[] for _ in range(len(sizes) - len(given))] + list(given)
    return [[_times(extent, size) + extent for extent, size in zip(padded, sizes, strict=True)]]


def repeat_interleave(call: Call) -> list[Shape] | None:
    if call.values.get("dim") is None or "self" not in call.values:
        return None
    made, at = list(call.input()), call.dim()
    made[at] = made[at] + _times(made[at], call.sizes[0][at])
    return [made]


def _times(extent: Extent, size: Any) -> Extent:
    """Return the factor by which `size` is a multiple of a dimension."""
    return fresh(quotient(size, extent_size(extent)) or 1)


def part(call: Call) -> list[Shape]:
    given, at = list(call.input()), call.dim()
    if given[at] and extent_size(given[at]) != call.sizes[0][at]:
        given[at] = _apart(call, given[at], call.sizes[0][at], "takes a part of it")
    return [given]


def select(call: Call) -> list[Shape]:
    given, at = list(call.input()), call.dim()
    pin_static([given.pop(at)], f"{call.reason} picks from it")
    return [given]


def unbind(call: Call) -> list[Shape]:
    return select(call) * len(call.sizes)


def split(call: Call) -> list[Shape]:
    """Equal pieces share their atoms: the number of pieces is the outer factor."""
    given, at = list(call.input()), call.dim()
    widths = [sizes[at] for sizes in call.sizes]
    if len(set(map(str, widths))) > 1:
        pin_static([given[at]], f"{call.reason} divides it unevenly")
        return pinned(call.node, f"{call.reason} divides it unevenly")
    pieces, inner = regroup([given[at]], [len(widths), widths[0]], f"{call.reason} divides it")
    pin([pieces], f"{call.reason} picks from it")
    return [[*given[:at], inner, *given[at + 1 :]]] * len(widths)


def cat(call: Call) -> list[Shape]:
    operands = call.operands()
    at = call.dim(rank=len(call.sizes[0]))
    operands = [shape for shape in operands if len(shape) == len(call.sizes[0])]
    made = broadcast(operands, call.sizes[0], f"{call.reason} joins what is laid out in other ways")
    for shape in operands:
        pin_static([shape[at]], f"{call.reason} puts it beside others")
    made[at] = fresh(call.sizes[0][at])
    pin_static([made[at]], f"{call.reason} puts it beside others")
    return [made]


def stack(call: Call) -> list[Shape]:
    sizes, at = call.sizes[0], call.dim(rank=len(call.sizes[0]))
    made = broadcast(call.operands(), sizes[:at] + sizes[at + 1 :], f"{call.reason} joins other layouts")
    made.insert(at, fresh(sizes[at]))
    pin_static([made[at]], f"{call.reason} puts it beside others")
    return [made]


def _apart(call: Call, extent: Extent, size: Any, what: str) -> Extent:
    made = fresh(size)
    pin_static([extent, made], f"{call.reason} {what}")
    return made
