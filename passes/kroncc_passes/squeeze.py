"""The pass `squeeze`: weights of a smaller model as learned maps of those of the larger one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from kroncc.api import (
    Axes,
    Cut,
    Group,
    ModelGraph,
    Narrowed,
    PassError,
    Resolved,
    Rewriter,
    Site,
    Span,
    TreePass,
    Units,
    apply_cuts,
    keep_units,
    narrow,
    neurons,
    streams,
)
from kroncc_passes._narrowing import Count, Stats, weight_norms
from kroncc_passes._squeeze_layers import KINDS, Mapping, Squeezed


class Squeeze(TreePass):
    """Train a narrower model whose weights are learned maps of the frozen weights of the wider one.

    ## What it does

    Under `during`, each weight W of the narrower model is L W' R, where W' is the weight of the model as it
    came, frozen, and L, R are trained; a side that keeps its width has no map. They start as the selection
    of the features and neurons with the largest weights, which is what `prune-hidden` and `prune-neurons`
    with `by: norm` keep. When training ends the products are merged: what is saved is a plain narrower model.
    In a compress step the selection alone is taken.

    ## When it helps

    For a student that is narrower than its teacher, where random weights would need much more training.

    ## When it is skipped

    Nothing is skipped; a residual stream that cannot be cut is an error.

    ## Cost

    As `prune-hidden` and `prune-neurons` to the same widths. While it trains, the frozen weights and their
    maps are in memory too, and each step forms the products.

    ## Example

        distill:
          during:
            - squeeze: {hidden: 192, neurons: 768}

    ## References

    Chumachenko et al., Weight squeezing: reparameterization for knowledge transfer and model compression,
    2020.
    """

    kind: ClassVar[str] = "squeeze"

    hidden: Count | None = Field(None, description="width of the hidden state")
    neurons: Count | None = Field(None, description="neurons of each feed-forward pair")
    cuts: tuple[Narrowed, ...] = Field(
        (), description="what becomes of each module; found by the pass itself"
    )

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.hidden is None and self.neurons is None and not self.cuts:
            raise ValueError("give `hidden`, `neurons`, or both")
        return self

    def resolve_tree(
        self,
        graph: ModelGraph,
        sites: Sequence[Site],  # noqa: ARG002
        stats: Stats | None,  # noqa: ARG002
        seed: int,  # noqa: ARG002
    ) -> Resolved:
        """Return the pass with the new sizes of all modules that change, which are its sites.

        Raises PassError K486 (more are to stay than there are), K488 (a width that cannot be cut).
        """
        axes = Axes(graph)
        asked = [(one, self.hidden) for one in streams(axes)] if self.hidden else []
        asked += [(one, self.neurons) for one in neurons(axes)] if self.neurons else []
        groups = [_group(axes, units, keep) for units, keep in asked if keep is not None]
        modules, cuts = narrow(graph, axes, groups)
        explicit = self.model_copy(update={"hidden": None, "neurons": None, "cuts": tuple(modules.values())})
        known = all(group.units is not None for group in groups)
        return Resolved(explicit, tuple(modules), choice=cuts if known else None)

    def rewrite(self, model: nn.Module, sites: Sequence[str], choice: Sequence[Cut] | None = None) -> None:
        """Narrow the modules; with `choice`, the features that it names keep their weights."""
        apply_cuts(model, sites, self.cuts, choice)

    def begin(self, model: nn.Module, sites: Sequence[str], choice: Sequence[Cut] | None = None) -> None:
        """Narrow the modules, and put maps of their old weights in the place of the new ones."""
        modules = dict(model.named_modules())
        old = {fqn: modules[fqn].weight for fqn in sites if type(modules.get(fqn)) in KINDS}
        apply_cuts(model, sites, self.cuts, choice)
        mappings: dict[int, Mapping] = {}
        for fqn, change in zip(sites, self.cuts, strict=True):
            if fqn not in old or "weight" not in change.tensors:
                continue
            large = old[fqn]
            assert isinstance(large, nn.Parameter)
            if id(large) not in mappings:
                shape = change.tensors["weight"]
                sides = [_selection(large, dim, shape[dim], f"{fqn}.weight", choice) for dim in (0, 1)]
                mappings[id(large)] = _mapping(large, sides)
            _put(model, fqn, Squeezed(modules[fqn], mappings[id(large)]))

    def attach(self, graph: ModelGraph, rewriter: Rewriter, sites: Sequence[str]) -> None:
        """Nothing: the maps are in the tree already."""

    def end(self, model: nn.Module, sites: Sequence[str], choice: Sequence[Cut] | None = None) -> None:
        """Nothing: the maps were merged when training ended."""


def _group(axes: Axes, units: Units, keep: int) -> Group:
    """Return the units that stay: those with the largest weights; on meta, how many."""
    if units.reason or units.atom is None:
        raise PassError(
            f"{units.maps[0] if units.maps else 'the residual stream'} {units.reason}",
            code="K488",
            expected="a width that every operator keeps apart from other dimensions",
            remedy="apply squeeze before the passes that replace modules",
        )
    if keep > units.size:
        raise PassError(
            f"{units.maps[0] if units.maps else 'the residual stream'}: {keep} are to stay of {units.size}",
            code="K486",
            expected=f"1 to {units.size}",
            remedy="lower `hidden` or `neurons`",
        )
    if any(parameter.is_meta for parameter in axes.graph.model.parameters()):
        return Group(units.atom, keep)
    order = torch.sort(weight_norms(axes, units), descending=True, stable=True).indices[:keep]
    return Group(units.atom, keep, tuple(sorted(order.tolist())))


def _selection(
    large: Tensor, dim: int, size: int | None, name: str, choice: Sequence[Cut] | None
) -> nn.Parameter | None:
    """Return the map [size, old] that picks what stays of one dimension; None where all of it does."""
    if size is None:
        return None
    old = large.shape[dim]
    if large.is_meta or choice is None:
        return nn.Parameter(large.new_empty(size, old))
    cut, span = next(
        (cut, span) for cut in choice for span in cut.spans if name in span.names and span.dim == dim
    )
    rows = Span(span.names, 0, span.outer, span.size, span.inner)
    eye = torch.eye(old, dtype=large.dtype, device=large.device)
    return nn.Parameter(keep_units(eye, rows, cut.units or ()))


def _mapping(large: nn.Parameter, sides: Sequence[nn.Parameter | None]) -> Mapping:
    left, right = sides
    turned = None if right is None else nn.Parameter(right.data.t().contiguous())
    return Mapping(large, (left, turned))


def _put(model: nn.Module, fqn: str, module: nn.Module) -> None:
    """Put a module at all names of the one at `fqn`."""
    old = model.get_submodule(fqn)
    for name in [name for name, one in model.named_modules(remove_duplicate=False) if one is old]:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)
