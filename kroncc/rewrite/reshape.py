"""The part of a structure that changes the module tree itself, and its repetition on a dense model."""

from __future__ import annotations

from torch import nn

from kroncc.rewrite.base import TreePass
from kroncc.rewrite.registry import get_pass
from kroncc.rewrite.structure import Structure


def tree_part(structure: Structure) -> Structure:
    """Return the tree passes of `structure`: what its graph is captured with."""
    return Structure(
        passes=tuple(applied for applied in structure.passes if issubclass(get_pass(applied.name), TreePass))
    )


def reshape(model: nn.Module, structure: Structure) -> None:
    """Repeat the tree passes of `structure` on `model`, dense and of the class it was made for, on meta."""
    for applied in tree_part(structure).passes:
        pass_ = get_pass(applied.name)(**applied.options)
        assert isinstance(pass_, TreePass)
        pass_.rewrite(model, applied.sites)
