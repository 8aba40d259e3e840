"""The pass `prune-neurons`: feed-forward pairs keep their most useful neurons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from kroncc.api import Axes, Calibration, ModelGraph, Site, Skip, Units, neurons
from kroncc_passes._narrowing import (
    Narrowing,
    Stats,
    energy,
    gate_gradients,
    meant,
    measured,
    random_scores,
    weight_norms,
)

NEEDS = {"activation": Calibration(moments=True), "taylor": Calibration(saliency=frozenset({1}))}


class PruneNeurons(Narrowing):
    """Keep the neurons of each feed-forward pair that matter most, and cut the others out.

    ## What it does

    A neuron is a row of the map up (and of the gate), its bias, and the column of the map down that reads it.
    Neurons are ranked by `by`: `norm`, the norm of all of these weights; `activation`, the energy that the
    neuron adds to the pair's output, E[x^2] norm(w)^2 with its column w, over the rows of `calibrate`;
    `taylor`, the first-order change of the loss without it, E abs(x dL/dx) by example; `random`. The rest is
    removed from all weights, which become smaller dense ones: the result equals the model with the other
    neurons silenced. `scope: global` ranks the neurons of all layers together, scores scaled to norm 1 a
    layer.

    ## When it helps

    Half or more of a transformer's weights outside the tables are in these pairs, and the cut makes plain
    dense products smaller: it is faster on any hardware. Distil afterwards.

    ## When it is skipped

    A target that is not part of a feed-forward pair; neurons that a norm is taken over, or that an operator
    touches which the analysis does not understand (a map that another pass has factored).

    ## Cost

    Each neuron costs a row of each map up and a column of the map down, and as many multiply-adds a token.

    ## Example

        - prune-neurons: {targets: ["@ffn.up"], ratio: 0.5, by: taylor}
        - prune-neurons: {targets: ["@ffn.up[0:6]"], keep: 1024, by: norm}

    ## References

    Hou et al., DynaBERT: Dynamic BERT with adaptive width and depth, NeurIPS 2020 (Taylor score of neurons).
    Molchanov et al., Pruning convolutional neural networks for resource efficient inference, ICLR 2017.
    """

    kind: ClassVar[str] = "prune-neurons"

    by: Literal["norm", "activation", "taylor", "random"] = Field(
        "norm", description="what neurons are ranked by"
    )

    def requests(self, graph: ModelGraph, sites: Sequence[Site]) -> Mapping[str, Calibration]:
        """Return what is to be measured at the maps down."""
        if self.by not in NEEDS:
            return {}
        units, _ = self.find(Axes(graph), sites)
        return {fqn: NEEDS[self.by] for one in units for fqn in one.outs}

    def find(self, axes: Axes, sites: Sequence[Site]) -> tuple[list[Units], dict[str, Skip]]:
        """Return the neurons of the pairs that the sites are part of."""
        return meant(neurons(axes), sites, "a feed-forward pair")

    def scores(self, axes: Axes, units: Units, stats: Stats, seed: int) -> Tensor:
        """Return the score of each neuron [neurons]."""
        if self.by == "norm":
            return weight_norms(axes, units)
        if self.by == "random":
            return random_scores(units, seed)
        down = units.outs[0]
        seen = measured(stats, down, self.by, self.kind)
        if self.by == "taylor":
            return gate_gradients(axes, units, down, seen)
        return energy(axes, units, down, seen)
