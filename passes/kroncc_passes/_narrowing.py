"""What the passes that make a model narrower share: how many units stay, and which ones."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, Self

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
    Site,
    SiteStats,
    Skip,
    Span,
    TreePass,
    Units,
    apply_cuts,
    narrow,
)

Count = Annotated[int, Field(gt=0, strict=True)]
Part = Annotated[float, Field(gt=0, le=1)]
Stats = Mapping[str, SiteStats]


class Narrowing(TreePass):
    """Base of the passes that cut units out of a model."""

    keep: Count | None = Field(None, description="how many stay")
    ratio: Part | None = Field(None, description="the part that stays, above 0 to 1; one at least stays")
    scope: Literal["layer", "global"] = "layer"
    cuts: tuple[Narrowed, ...] = Field(
        (), description="what becomes of each module; found by the pass itself"
    )

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.keep is None) == (self.ratio is None) and not self.cuts:
            raise ValueError("give exactly one of: `keep`; `ratio`")
        return self

    def settled(self) -> bool:
        """Say whether every group keeps as many as the others: not where all compete."""
        return self.scope == "layer"

    @abstractmethod
    def find(self, axes: Axes, sites: Sequence[Site]) -> tuple[list[Units], dict[str, Skip]]:
        """Return the units that the sites mean, and the sites that are left alone."""

    @abstractmethod
    def scores(self, axes: Axes, units: Units, stats: Stats, seed: int) -> Tensor:
        """Return how much each unit matters [units]; at least 0."""

    def resolve_tree(
        self, graph: ModelGraph, sites: Sequence[Site], stats: Stats | None, seed: int
    ) -> Resolved:
        """Return the pass with the new sizes of all modules that change, which are its sites.

        Raises PassError K486 (more are to stay than there are), K487 (nothing was measured), K485 (the model
        does not run narrower).
        """
        axes = Axes(graph)
        units, skipped = self.find(axes, sites)
        if not units:
            return Resolved(self, (), skipped)
        real = not any(parameter.is_meta for parameter in graph.model.parameters())
        groups = self.chosen(axes, units, stats or {}, seed) if real else self.planned(units)
        modules, cuts = narrow(graph, axes, groups)
        explicit = self.model_copy(update={"keep": None, "ratio": None, "cuts": tuple(modules.values())})
        return Resolved(explicit, tuple(modules), skipped, cuts if real else None)

    def planned(self, units: Sequence[Units]) -> list[Group]:
        """Return how many of each units stay, without saying which."""
        return [Group(one.atom, self._count(one)) for one in units if one.atom is not None]

    def chosen(self, axes: Axes, units: Sequence[Units], stats: Stats, seed: int) -> list[Group]:
        """Return which of each units stay: the best of each, or the best of all with one of each."""
        scores = [self.scores(axes, one, stats, seed) for one in units]
        counts = [group.keep for group in self.planned(units)]
        if self.scope == "layer":
            kept = [_best(one, count) for one, count in zip(scores, counts, strict=True)]
        else:
            kept = _best_of_all(scores, sum(counts))
        atoms = [one.atom for one in units if one.atom is not None]
        return [Group(atom, len(stay), stay) for atom, stay in zip(atoms, kept, strict=True)]

    def rewrite(self, model: nn.Module, sites: Sequence[str], choice: Sequence[Cut] | None = None) -> None:
        """Narrow the modules; with `choice`, the units that it names keep their weights."""
        apply_cuts(model, sites, self.cuts, choice)

    def _count(self, units: Units) -> int:
        """Return how many units stay."""
        if self.ratio is not None:
            return max(1, round(self.ratio * units.size))
        assert self.keep is not None
        if self.keep <= units.size:
            return self.keep
        where = units.maps[0] if units.maps else "the residual stream"
        raise PassError(
            f"{where}: {self.keep} are to stay of {units.size}",
            code="K486",
            expected=f"`keep` of 1 to {units.size}",
            remedy="lower `keep`, or give `ratio`",
        )


def meant(units: Sequence[Units], sites: Sequence[Site], what: str) -> tuple[list[Units], dict[str, Skip]]:
    """Return the units around the maps that the sites are, and why the other sites are left alone.

    Without sites, all units are meant.
    """
    if not sites:
        skipped = {one.maps[0]: Skip(one.reason) for one in units if one.reason and one.maps}
        return [one for one in units if not one.reason], skipped
    found: list[Units] = []
    skipped = {}
    for site in sites:
        names = {site.fqn, *site.tied}
        mine = [one for one in units if names.intersection(one.maps)]
        reasons = [one.reason for one in mine if one.reason] if mine else [f"is not part of {what}"]
        if reasons:
            skipped[site.fqn] = Skip(reasons[0])
            continue
        found += [one for one in mine if all(one is not other for other in found)]
    return found, skipped


def measured(stats: Stats, fqn: str, by: str, kind: str) -> SiteStats:
    """Return what was measured at a module. Raises PassError K487 where nothing was."""
    if fqn in stats:
        return stats[fqn]
    raise PassError(
        f"{kind} by {by} needs what was measured at {fqn}",
        code="K487",
        expected="`calibrate` beside `passes` in the compress step",
        remedy="add calibrate: {data: ..., rows: 512}, or choose `by: norm`",
    )


def weight_norms(axes: Axes, units: Units) -> Tensor:
    """Return the norm of all weights that a unit has, in every tensor it is cut from [units]."""
    assert units.atom is not None
    tensors = dict(axes.graph.model.named_parameters(remove_duplicate=False))
    total = torch.zeros(units.size)
    for span in axes.spans(units.atom):
        if span.names[0] in tensors:
            total += by_unit(tensors[span.names[0]].detach().float().square().cpu(), span)
    return total.sqrt()


def by_unit(value: Tensor, span: Span) -> Tensor:
    """Sum a tensor over all that is not the unit [units]."""
    rest = tuple(dim for dim in range(value.dim()) if dim != span.dim)
    vector = value.sum(rest) if rest else value
    return vector.reshape(span.outer, span.size, span.inner).sum((0, 2))


def read_by(axes: Axes, units: Units, fqn: str) -> Span:
    """Return where the units lie in the input of the linear map `fqn`."""
    assert units.atom is not None
    module = axes.graph.get(fqn)
    dim = 1 if isinstance(module, nn.Linear) else 0
    weight = f"{fqn}.weight"
    return next(one for one in axes.spans(units.atom) if weight in one.names and one.dim == dim)


def energy(axes: Axes, units: Units, fqn: str, stats: SiteStats) -> Tensor:
    """Return sum E[x^2] norm(w)^2 over the inputs of a unit: what it adds to the map's output [units]."""
    assert stats.moment is not None
    span = read_by(axes, units, fqn)
    weight = axes.graph.get(fqn).get_parameter("weight").detach().float().cpu()
    columns = weight.square().sum(1 - span.dim)
    return (stats.moment.diagonal() * columns).reshape(span.outer, span.size, span.inner).sum((0, 2))


def gate_gradients(axes: Axes, units: Units, fqn: str, stats: SiteStats) -> Tensor:
    """Return E abs(dL/dgate) of a gate of 1 on each unit, over examples [units]."""
    span = read_by(axes, units, fqn)
    return stats.saliency[span.inner].reshape(span.outer, span.size).sum(0)


def random_scores(units: Units, seed: int) -> Tensor:
    """Return random scores, the same for the same seed and maps [units]."""
    digest = hashlib.sha256(f"{seed}:{' '.join(units.maps)}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
    return torch.rand(units.size, generator=generator)


def _best_of_all(scores: Sequence[Tensor], count: int) -> list[tuple[int, ...]]:
    """Return the places of the `count` best of all, by group; scores are scaled to norm 1 a group."""
    scaled = [one / one.norm().clamp_min(torch.finfo(one.dtype).tiny) for one in scores]
    for one in scaled:
        one[one.argmax()] += 2  # above all others, which are at most 1
    stay = set(_best(torch.cat(scaled), count))
    starts = [sum(len(one) for one in scaled[:at]) for at in range(len(scaled))]
    return [
        tuple(unit for unit in range(len(one)) if start + unit in stay)
        for start, one in zip(starts, scaled, strict=True)
    ]


def _best(scores: Tensor, count: int) -> tuple[int, ...]:
    """Return the places of the `count` largest scores, in order; of equal ones, the first."""
    order = torch.sort(scores, descending=True, stable=True).indices[:count]
    return tuple(sorted(order.tolist()))
