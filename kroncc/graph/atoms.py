"""Dimensions as products of atoms, and which atoms are one and the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import sympy
import torch
from torch import fx

Size = Any
"""A number, or a sympy expression in the batch and the lengths."""
Extent = list["Atom"]
"""One dimension: its factors, outermost first; none for a dimension of size 1."""
Shape = list[Extent]
"""All dimensions of one tensor."""


class Atom:
    """A factor of dimensions that is cut everywhere or nowhere.

    `pins` say why it cannot be cut; `statistics` name what computes over it (a norm stays defined when it is
    cut, with other numbers); `outputs` name the model's outputs that show it. Read them of `root()`.
    """

    __slots__ = ("factors", "outputs", "parent", "pins", "size", "statistics")

    def __init__(self, size: Size) -> None:
        self.size = size
        self.parent: Atom = self
        self.factors: tuple[Atom, ...] = ()
        self.pins: dict[str, None] = {}
        self.statistics: dict[str, None] = {}
        self.outputs: dict[str, None] = {}

    def root(self) -> Atom:
        """Return the atom that stands for all that are one with this one."""
        while self.parent is not self:
            self.parent = self.parent.parent
            self = self.parent
        return self


def size_of(size: int | torch.SymInt) -> Size:
    """Return one size of a fake tensor as a number or an expression."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    expression = size.node.expr
    return int(expression) if isinstance(expression, sympy.Integer) else expression


def fresh(size: Size) -> Extent:
    """Return a dimension that nothing else is known of."""
    return [] if size == 1 else [Atom(size)]


def leaves(extent: Iterable[Atom]) -> Extent:
    """Return the factors of a dimension as they are known by now, outermost first."""
    found: Extent = []
    for atom in extent:
        root = atom.root()
        found += leaves(root.factors) if root.factors else [root]
    return found


def product(sizes: Iterable[Size]) -> Size:
    """Return the product of sizes."""
    total: Size = 1
    for size in sizes:
        total = total * size
    return total


def extent_size(extent: Iterable[Atom]) -> Size:
    """Return the size of a dimension."""
    return product(atom.size for atom in extent)


def pin(extents: Iterable[Extent], reason: str) -> None:
    """Note that the atoms of these dimensions cannot be cut, and why."""
    for extent in extents:
        for atom in leaves(extent):
            atom.pins[reason] = None


def unify(left: Extent, right: Extent, reason: str) -> None:
    """Note that two dimensions are one. Where their factors do not line up, all are pinned for `reason`."""
    a, b = leaves(left), leaves(right)
    while a and b:
        if not _match(a[0], b[0]):
            break
        a, b = leaves(a), leaves(b)
        a, b = a[1:], b[1:]
    if a or b:
        pin([a, b], reason)


def _match(x: Atom, y: Atom) -> bool:
    """Make the outermost factors of two leaves one; say whether that can be."""
    if x is y:
        return True
    if x.size == y.size:
        _union(x, y)
        return True
    for small, large in ((x, y), (y, x)):
        if quotient(large.size, small.size) is not None:
            outer, _ = refine(large, small.size)
            _union(outer, small)
            return True
    return False


def _union(x: Atom, y: Atom) -> None:
    y.parent = x
    x.pins |= y.pins
    x.statistics |= y.statistics
    x.outputs |= y.outputs


def refine(atom: Atom, outer: Size) -> tuple[Atom, Atom]:
    """Split a leaf into a factor of size `outer` and the rest, inside it; both keep what is known of it."""
    rest = quotient(atom.size, outer)
    parts = Atom(outer), Atom(rest)
    for part in parts:
        part.pins |= atom.pins
        part.statistics |= atom.statistics
        part.outputs |= atom.outputs
    atom.factors = parts
    return parts


def quotient(size: Size, divisor: Size) -> Size | None:
    """Return size / divisor where that is a whole size for every value of the symbols, else None."""
    if isinstance(size, int) and isinstance(divisor, int):
        return size // divisor if size % divisor == 0 else None
    if isinstance(size, int):
        return None
    ratio = sympy.cancel(sympy.sympify(size) / divisor)
    if sympy.fraction(ratio)[1] != 1 or not ratio.is_polynomial(*ratio.free_symbols):
        return None
    if not ratio.free_symbols:
        return int(ratio) if ratio.is_Integer else None
    whole = all(value.is_Integer for value in sympy.Poly(ratio, *ratio.free_symbols).coeffs())
    return ratio if whole else None


def regroup(shape: Sequence[Extent], sizes: Sequence[Size], reason: str) -> Shape:
    """Return the dimensions of sizes `sizes` that a reshape makes of `shape`.

    Where factors do not line up, all are pinned for `reason`, and so is the result.
    """
    flat = [atom for extent in shape for atom in leaves(extent)]
    made: Shape = []
    for size in sizes:
        taken = _take(flat, size)
        if taken is None:
            made = [fresh(each) for each in sizes]
            pin([*shape, *made], reason)
            return made
        made.append(taken)
    return made


def _take(flat: Extent, size: Size) -> Extent | None:
    """Take factors of product `size` off the front of `flat`, splitting the last if need be."""
    taken: Extent = []
    while size != 1:
        if not flat:
            return None
        first = flat[0]
        rest = quotient(size, first.size)
        if rest is None:
            if quotient(first.size, size) is None:
                return None
            refine(first, size)
            flat[:] = leaves(flat)
            continue
        taken.append(flat.pop(0))
        size = rest
    return taken


def pinned(node: fx.Node, reason: str) -> list[Shape]:
    """Return fresh dimensions for what a node gives; its fixed sizes are pinned."""
    made = unrelated(node)
    for shape in made:
        pin_static(shape, reason)
    return made


def unrelated(node: fx.Node) -> list[Shape]:
    """Return fresh dimensions for what a node gives."""
    return [[fresh(size_of(size)) for size in value.shape] for value in tensors_of(node)]


def pin_static(shape: Shape, reason: str) -> None:
    """Pin the atoms of fixed size."""
    for atom in (atom for extent in shape for atom in leaves(extent)):
        if isinstance(atom.size, int):
            atom.pins[reason] = None


def tensors_of(node: fx.Node) -> list[torch.Tensor]:
    """Return the fake tensors that a node gives."""
    value = node.meta.get("val")
    several = value if isinstance(value, list | tuple) else [value]
    return [item for item in several if isinstance(item, torch.Tensor)]
