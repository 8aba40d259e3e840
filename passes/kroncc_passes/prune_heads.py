"""The pass `prune-heads`: attentions keep their most useful heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from kroncc.api import Axes, Calibration, ModelGraph, Site, Skip, Units, heads
from kroncc_passes._narrowing import (
    Narrowing,
    Stats,
    gate_gradients,
    meant,
    measured,
    random_scores,
    read_by,
    weight_norms,
)


class PruneHeads(Narrowing):
    """Keep the heads of each attention that matter most, and cut the others out.

    ## What it does

    A head is its rows of the maps to queries, keys and values and its columns of the map out. Where several
    heads of queries share one of keys and values, such a group is the unit; the size of a head stays. Heads
    that a shared table of position biases joins across layers (T5, MPNet) are cut together. Heads are ranked
    by `by`: `gradient`, E abs(dL/dgate) of a gate of 1 on the head's output, the absolute value taken by
    example over the rows of `calibrate`; `norm`, the norm of all of its weights; `random`. The result equals
    the model with the other heads silenced. `scope: global` ranks the heads of all layers together, scores
    scaled to norm 1 a layer, and leaves each layer one at least.

    ## When it helps

    Many heads of a trained model can go with little loss. To cut step by step with new scores each time, use
    several compress steps, each with its own `calibrate`. Distil afterwards.

    ## When it is skipped

    A target that is no map of an attention; an attention with one head; heads that a norm is taken over, or
    that an operator touches which the analysis does not understand (a map that another pass has factored).

    ## Cost

    Each head costs its rows and columns in the four maps, as many multiply-adds a token, and one map of
    scores, 4 size multiply-adds a pair of tokens.

    ## Example

        - prune-heads: {targets: ["@attention.*"], ratio: 0.5, by: gradient}
        - prune-heads: {targets: ["@attention.out"], keep: 6, by: gradient, scope: global}

    ## References

    Michel, Levy and Neubig, Are sixteen heads really better than one?, NeurIPS 2019.
    """

    kind: ClassVar[str] = "prune-heads"

    by: Literal["norm", "gradient", "random"] = Field("norm", description="what heads are ranked by")

    def requests(self, graph: ModelGraph, sites: Sequence[Site]) -> Mapping[str, Calibration]:
        """Return what is to be measured at the maps out."""
        if self.by != "gradient":
            return {}
        axes = Axes(graph)
        units, _ = self.find(axes, sites)
        sizes = {fqn: read_by(axes, one, fqn).inner for one in units for fqn in one.outs}
        return {fqn: Calibration(saliency=frozenset({size})) for fqn, size in sizes.items()}

    def find(self, axes: Axes, sites: Sequence[Site]) -> tuple[list[Units], dict[str, Skip]]:
        """Return the heads of the attentions that the sites are part of."""
        return meant(heads(axes), sites, "an attention")

    def scores(self, axes: Axes, units: Units, stats: Stats, seed: int) -> Tensor:
        """Return the score of each head [heads]."""
        if self.by == "norm":
            return weight_norms(axes, units)
        if self.by == "random":
            return random_scores(units, seed)
        total = torch.zeros(units.size)
        for fqn in units.outs:
            one = gate_gradients(axes, units, fqn, measured(stats, fqn, self.by, self.kind))
            total += one / one.norm().clamp_min(torch.finfo(one.dtype).tiny)
        return total
