"""The pass `prune-hidden`: the residual stream keeps its most useful features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from kroncc.api import Axes, Calibration, ModelGraph, PassError, Site, Skip, Units, features, streams
from kroncc_passes._narrowing import (
    Narrowing,
    Stats,
    energy,
    measured,
    random_scores,
    weight_norms,
)


class PruneHidden(Narrowing):
    """Keep the features of the hidden state that matter most, and cut the others out of the whole model.

    ## What it does

    A feature of the residual stream runs through the whole model: a column of every table, a place in every
    norm, a column of every map that reads the stream, a row of every map that adds to it, of the pooler and
    of the head. What is cut together is found from the data flow, not from names. Heads keep their size and
    number, feed-forward pairs their neurons. Norms are taken over the features that stay, so the result is
    another model, not the old one with features silenced. Features are ranked by `by`: `norm`, the norm of
    all their weights; `activation`, the part they have in what the maps that read the stream give,
    E[x^2] norm(w)^2 with their columns w, summed over maps, over the rows of `calibrate`; `random`.

    Without targets, the streams that enter the layers are cut. With targets, what the modules that they match
    give: `@embedding.word` means the narrower embedding of ALBERT, `@pooler` the pooler's own width.

    ## When it helps

    Everything becomes narrower at once, tables too. It hurts more than cutting neurons or heads of the same
    size, so distil afterwards, with losses on the hidden states: they are projected to the teacher's width.

    ## When it is skipped

    A target whose output is laid out in heads or groups; features that an operator touches which the analysis
    does not understand (a map that another pass has factored).

    ## Cost

    All that reads or adds to the stream shrinks in proportion.

    ## Example

        - prune-hidden: {keep: 256, by: activation}
        - prune-hidden: {targets: ["@embedding.word"], keep: 64}

    ## References

    Khetan and Karnin, schuBERT: Optimizing elements of BERT, ACL 2020. Fang et al., DepGraph: Towards any
    structural pruning, CVPR 2023.
    """

    kind: ClassVar[str] = "prune-hidden"

    by: Literal["norm", "activation", "random"] = Field("norm", description="what features are ranked by")
    scope: Literal["layer"] = Field("layer", description="each stream is ranked alone")

    def requests(self, graph: ModelGraph, sites: Sequence[Site]) -> Mapping[str, Calibration]:
        """Return what is to be measured at the maps that read the streams."""
        if self.by != "activation":
            return {}
        units, _ = self.find(Axes(graph), sites)
        return {fqn: Calibration(moments=True) for one in units for fqn in one.outs}

    def find(self, axes: Axes, sites: Sequence[Site]) -> tuple[list[Units], dict[str, Skip]]:
        """Return the features that the sites give; without sites, those of the streams."""
        found = [features(axes, site.fqn) for site in sites] if sites else streams(axes)
        stuck = [one for one in found if one.reason]
        if stuck and not sites:
            raise PassError(
                f"the residual stream {stuck[0].reason}",
                code="K488",
                expected="a stream whose width every operator keeps apart from other dimensions",
                remedy="apply prune-hidden before the passes that replace modules, or leave it out",
            )
        units = {id(one.atom.root()): one for one in reversed(found) if one.atom and not one.reason}
        return list(reversed(units.values())), {one.maps[0]: Skip(one.reason) for one in stuck}

    def scores(self, axes: Axes, units: Units, stats: Stats, seed: int) -> Tensor:
        """Return the score of each feature [features]."""
        if self.by == "norm":
            return weight_norms(axes, units)
        if self.by == "random":
            return random_scores(units, seed)
        total = torch.zeros(units.size)
        for fqn in units.outs:
            one = energy(axes, units, fqn, measured(stats, fqn, self.by, self.kind))
            total += one / one.sum().clamp_min(torch.finfo(one.dtype).tiny)
        return total
