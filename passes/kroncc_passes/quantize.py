"""The pass `quantize`: weights as packed integers of 2 to 8 bits, and linear maps that multiply bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn
from transformers.pytorch_utils import Conv1D

from kroncc.api import Calibration, PassError, Site, SitePass, Skip
from kroncc_passes._dense import bias_of
from kroncc_passes._quantize_budget import CHOICES, rounding_error, split, unmeasured
from kroncc_passes._quantize_gobo import coded_weight, count_outliers
from kroncc_passes._quantize_gptq import compensated
from kroncc_passes._quantize_grid import Granularity, Grid
from kroncc_passes._quantize_live import TrainedInt8, TrainedWeight, int8_linear
from kroncc_passes._quantize_sites import candidates, is_quantised, layout_of, saves, unquantisable
from kroncc_passes._quantize_stores import PackedWeight, packed_weight
from kroncc_passes._stored import Store, stored

Count = Annotated[int, Field(gt=0, strict=True)]
Bits = Annotated[int, Field(ge=2, le=8, strict=True)]
PLAIN = (nn.Linear, Conv1D)


class Quantize(SitePass):
    """Round weights to 2 to 8 bits and keep them packed, on disk and in memory.

    ## What it does

    Every matrix W of a module, that of a Linear, Conv1D or Embedding as well as the factors and values that
    another pass made, becomes integers q with a scale: w = q scale, symmetric, scale = max abs(w) /
    (2^(bits-1) - 1) over the tensor, over an output (`channel`; a row of a table) or over `group` columns of
    it. 3 bits take 3/8 byte. Where W is needed it is formed from the integers; of an embedding only the rows
    looked up. With `outliers` (GOBO), weights that are unlikely under a Gaussian fit of W stay exact and the
    rest become one of 2^bits centroids. With `activations`, a Linear or Conv1D rounds its inputs to int8 and
    multiplies bytes. `rounding: gptq` lets later columns make up for the error of earlier ones. Under
    `during`, W trains while the forward pass sees it rounded, with straight-through gradients; at the end it
    is packed as by this pass. Scales are in the type of the model; integers stay as they are in any type.

    ## When it helps

    Where a model must be small: 8 bits cost next to nothing, 4 bits in groups little, less wants `during` or
    `gptq`. On a CPU, `activations: dynamic-int8` is faster too; packed weights alone are not.

    ## When it is skipped

    No weight is a matrix (biases, LayerNorm); packed with its scales it would be no smaller than in half
    precision; `activations` or `gptq` meet a module that is no Linear or Conv1D (of tables they pack the
    weight alone); an LSTM or GRU; an embedding with `max_norm`, `scale_grad_by_freq` or `sparse`.

    ## Cost

    bits / 8 bytes a weight, and of each scale the bytes of a float (and one of the zero, if not symmetric).
    With `outliers`, 4 bytes for a place and a float each. As many FLOPs as before; unpacking comes on top.

    ## Example

        - quantize: {targets: ["@attention.*", "@ffn.*"], bits: 4, group: 64}
        - quantize: {targets: ["@embedding.word"], bits: 8}
        - quantize: {targets: ["@ffn.*"], bits: 8, activations: dynamic-int8}
        - quantize: {targets: ["@attention.*", "@ffn.*"], bits: 3, outliers: -4.0}

    ## References

    Zafrir et al., Q8BERT, 2019. Shen et al., Q-BERT, AAAI 2020 (groups, mixed bits). Zadeh et al., GOBO, MICRO
    2020. Frantar et al., GPTQ, 2022. Bengio et al., Estimating or propagating gradients through stochastic
    neurons, 2013 (straight-through).
    """

    kind: ClassVar[str] = "quantize"
    order: ClassVar[int] = 40
    accepts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Module,)

    bits: Bits | Literal["auto"] = Field(
        description="bits a weight, 2 to 8; auto: of all modules together the split that does least harm within "
        "`budget`"
    )
    granularity: Granularity | None = Field(
        None,
        description="which weights share a scale: tensor | channel (an output, or a row of a table) | group "
        "(`group` columns of one); channel if left out, group if `group` is given",
    )
    group: Count | None = Field(None, description="columns that share a scale; the last group may be shorter")
    symmetric: bool = Field(True, description="false: the range runs from the least weight to the largest")
    outliers: Annotated[float, Field(lt=0)] | None = Field(
        None,
        description="GOBO: a weight whose log-likelihood under a Gaussian fit of its matrix is below this (-4 in "
        "the paper) stays exact, the rest become one of 2^bits centroids",
    )
    rounding: Literal["nearest", "gptq"] = Field(
        "nearest", description="gptq: columns make up for the errors of those before, by the inputs measured"
    )
    sequential: bool = Field(
        False, description="with gptq: measure a module's inputs when all modules before it are rounded"
    )
    activations: Literal["float", "dynamic-int8", "static-int8"] = Field(
        "float",
        description="int8: inputs too are rounded, and bytes are multiplied; each vector by its own range "
        "(dynamic), or all by a range that is learnt under `during` (static: moving average, decay 0.9999)",
    )
    budget: Count | None = Field(
        None, description="with bits: auto, the bytes that all modules of this pass may take, with scales"
    )
    sensitivity: Literal["outputs", "fisher"] = Field(
        "outputs",
        description="with bits: auto, the harm of rounding: relative squared error of a module's outputs | "
        "squared error of its weights, each times its mean squared gradient",
    )
    start: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="under `during`: share of the training after which weights are seen rounded"
    )
    train_scales: bool = Field(
        False, description="scales and centroids go on training when weights are packed"
    )
    weights: tuple[str, ...] | None = Field(
        None,
        description="names of the weights of a module, such as [a]; all that are large enough if left out",
    )
    counts: tuple[Annotated[int, Field(ge=0, strict=True)], ...] | None = Field(
        None, description="outliers of each of `weights`; as many as there are if left out"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        refused = (
            (self.granularity == "group" and self.group is None, "`granularity: group` wants a `group`"),
            (
                self.group is not None and self.granularity in ("tensor", "channel"),
                f"`group` does not go with `granularity: {self.granularity}`",
            ),
            ((self.bits == "auto") != (self.budget is not None), "`bits: auto` and `budget` go together"),
            (self.counts is not None and self.outliers is None, "`counts` wants `outliers`"),
            (self.sequential and self.rounding != "gptq", "`sequential` wants `rounding: gptq`"),
            (self.sequential and self.bits == "auto", "`sequential` does not go with `bits: auto`"),
            (
                self.outliers is not None and not self._bare(),
                "`outliers` goes with `bits` and `weights` alone",
            ),
            (
                self.activations != "float" and not (self.bits == 8 and self._rowwise()),
                f"`activations: {self.activations}` wants `bits: 8`, symmetric, one scale a tensor or a channel, "
                "and `rounding: nearest`",
            ),
        )
        said = [message for wrong, message in refused if wrong]
        if said:
            raise ValueError("; ".join(said))
        return self

    def needs(self) -> Calibration:
        """Ask for what `gptq` and `bits: auto` look at."""
        fisher = self.bits == "auto" and self.sensitivity == "fisher"
        moments = self.rounding == "gptq" or (self.bits == "auto" and not fisher)
        return Calibration(moments=moments, fisher=fisher, sequential=self.sequential)

    def settled(self) -> bool:
        """Bits by sensitivity and outliers are only known with the weights."""
        return self.bits != "auto" and (self.outliers is None or self.counts is not None)

    def apportion(self, sites: Sequence[Site]) -> Mapping[str, Self]:
        """Give every site its bits. Raises PassError K474 (the budget is too small), K473 (not measured)."""
        if self.bits != "auto":
            return super().apportion(sites)
        resolved = {site.fqn: self._at(CHOICES[-1]).resolve(site) for site in sites}
        taken = [(site, one) for site in sites if not isinstance(one := resolved[site.fqn], Skip)]
        costs = [[one._at(bits)._bytes(site) for bits in CHOICES] for site, one in taken]
        self._check_budget(sum(row[0] for row in costs))
        assert self.budget is not None
        if any(parameter.is_meta for site in sites for parameter in site.module.parameters()):
            errors = [[4.0**-bits for bits in CHOICES]] * len(taken)
        else:
            errors = [
                [one._at(bits)._error(site, self.sensitivity) for bits in CHOICES] for site, one in taken
            ]
        chosen = split(costs, errors, self.budget)
        mine = {site.fqn: one._at(CHOICES[c]) for (site, one), c in zip(taken, chosen, strict=True)}
        return {site.fqn: mine.get(site.fqn, self._at(CHOICES[-1])) for site in sites}

    def resolve(self, site: Site) -> Self | Skip:
        """Return the pass with the names of weights and the counts of outliers explicit, or a `Skip`.

        Raises PassError K471 (quantised before), K477 (no weight of that name), and as `apportion`.
        """
        if self.bits == "auto":
            return self.apportion([site])[site.fqn].resolve(site)
        if is_quantised(site.module):
            raise PassError(
                f"{site.fqn} is quantised already",
                code="K471",
                expected="a module with weights of floats",
                remedy="quantise a module once: leave it out here with `exclude`",
            )
        if reason := unquantisable(site.module) or self._unsuited(site.module):
            return Skip(reason)
        table = isinstance(site.module, nn.Embedding)
        plain = self.model_copy(update={"activations": "float", "rounding": "nearest"}) if table else self
        return plain._named(site)

    def replace(self, site: Site) -> nn.Module | Skip:
        """Return the module with packed weights.

        Raises PassError as `resolve`, K472 (not finite), K473 (not measured), K476 (no range learnt).
        """
        resolved = self.resolve(site)
        if isinstance(resolved, Skip):
            return resolved
        _check_finite(site, resolved._held(site.module))
        if resolved.activations != "float":
            return resolved._int8(site)
        stores = {name: resolved._store(site, name) for name in resolved.weights or ()}
        return stored(site.module, stores).train(site.module.training)

    def live(self, site: Site) -> nn.Module | Skip:
        """Return the module that trains with rounded weights. Raises PassError K475 for `outliers`, `gptq`."""
        resolved = self.resolve(site)
        if isinstance(resolved, Skip):
            return resolved
        if resolved.outliers is not None or resolved.rounding == "gptq":
            raise PassError(
                f"{site.fqn}: `outliers` and `rounding: gptq` have no form that trains",
                code="K475",
                expected="rounding to the nearest of evenly spaced steps under `during`",
                remedy="leave them out here, or quantise in a compress step",
            )
        stores = {
            name: TrainedWeight(
                weight,
                layout_of(site.module, name, resolved._grid().bits),
                resolved._grid(),
                start=self.start,
                trained=self.train_scales,
            )
            for name, weight in resolved._held(site.module).items()
        }
        if resolved.activations == "float":
            return stored(site.module, stores).train(site.module.training)
        fixed = resolved.activations == "static-int8"
        new = TrainedInt8(stores["weight"], bias_of(site.module), fixed=fixed)
        return new.train(site.module.training)

    def _bare(self) -> bool:
        """Say whether nothing that shapes an even grid is set."""
        return (
            self.granularity in (None, "tensor")
            and self.group is None
            and self.symmetric
            and self.activations == "float"
            and self.rounding == "nearest"
            and self.bits != "auto"
        )

    def _rowwise(self) -> bool:
        """Say whether products of bytes can be scaled afterwards."""
        return self.group is None and self.symmetric and self.outliers is None and self.rounding == "nearest"

    def _at(self, bits: int) -> Self:
        return self.model_copy(update={"bits": bits, "budget": None})

    def _grid(self) -> Grid:
        assert self.bits != "auto"
        granularity = self.granularity or ("channel" if self.group is None else "group")
        return Grid(self.bits, granularity, self.group, self.symmetric)

    def _held(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """Return the weights to quantise."""
        return {name: module.get_parameter(name) for name in self.weights or ()}

    def _unsuited(self, module: nn.Module) -> str:
        """Return why the options do not fit the kind of module, or nothing."""
        if type(module) in (*PLAIN, nn.Embedding):
            return ""
        wants = "activations" if self.activations != "float" else "gptq" if self.rounding == "gptq" else ""
        return f"is a {type(module).__name__}; {wants} treats Linear and Conv1D" if wants else ""

    def _named(self, site: Site) -> Self | Skip:
        """Return the pass with `weights` and `counts` explicit."""
        grid = self._grid()
        found = candidates(site.module)
        if self.weights is None:
            names = [
                name
                for name in found
                if saves(layout_of(site.module, name, grid.bits), None if self.outliers is not None else grid)
            ]
        else:
            names = list(self.weights)
        if missing := next((name for name in names if name not in found), None):
            raise _unknown_weight(site, missing, list(found))
        if not names:
            small = f"its {', '.join(found)} would be no smaller than in half precision"
            return Skip(small if found else "it has no weight matrix")
        counts = self.counts
        if self.outliers is not None and counts is None:
            counts = tuple(count_outliers(found[name], self.outliers) for name in names)
        return self.model_copy(update={"weights": tuple(names), "counts": counts})

    def _store(self, site: Site, name: str) -> Store:
        """Return the packed form of one weight."""
        weight, grid = site.module.get_parameter(name), self._grid()
        layout = layout_of(site.module, name, grid.bits)
        if self.outliers is not None:
            count = dict(zip(self.weights or (), self.counts or (), strict=True))[name]
            return coded_weight(weight, layout, self.outliers, count, trained=self.train_scales)
        if self.rounding == "nearest" or weight.is_meta:
            return packed_weight(weight, layout, grid, trained=self.train_scales)
        if site.stats is None or site.stats.moment is None:
            raise unmeasured(site, "inputs", "give the step `calibrate`, or set `rounding: nearest`")
        matrix = layout.matrix(weight.detach())
        scale, zero = grid.fit(matrix)
        codes = compensated(matrix, site.stats.moment, grid, scale, zero)
        return PackedWeight(layout, grid, layout.pack(codes), scale, zero, trained=self.train_scales)

    def _int8(self, site: Site) -> nn.Module:
        """Return the linear map that multiplies bytes."""
        weight = site.module.get_parameter("weight")
        fixed = self.activations == "static-int8"
        if fixed and not weight.is_meta:
            raise PassError(
                f"{site.fqn}: the range of its inputs is not known",
                code="K476",
                expected="`static-int8` under `during`, where it is learnt",
                remedy="set `activations: dynamic-int8`, or move the pass to `during`",
            )
        reach = weight.new_zeros(()) if fixed else None
        layout = layout_of(site.module, "weight", 8)
        new = int8_linear(weight, layout, self._grid(), bias_of(site.module), reach)
        return new.train(site.module.training)

    def _bytes(self, site: Site) -> int:
        """Return the bytes that the quantised weights of a site take."""
        grid = self._grid()
        total = 0
        for name, weight in self._held(site.module).items():
            layout = layout_of(site.module, name, grid.bits)
            rows, row = layout.packed_shape
            many, groups = grid.scales(layout.rows, layout.columns)
            total += rows * row + many * groups * (weight.element_size() + (0 if self.symmetric else 1))
        return total

    @torch.no_grad()
    def _error(self, site: Site, sensitivity: str) -> float:
        """Return what rounding a site to nearest does."""
        new = self.model_copy(update={"rounding": "nearest"}).replace(site)
        assert isinstance(new, nn.Module)
        return rounding_error(site, new, sensitivity)

    def _check_budget(self, least: int) -> None:
        assert self.budget is not None
        if self.budget < least:
            raise PassError(
                f"with {CHOICES[0]} bits a weight the modules take {least:,} bytes, the budget is {self.budget:,}",
                code="K474",
                expected=f"a budget of {least} bytes or more",
                remedy="raise `budget`, or widen `group`",
            )


def _unknown_weight(site: Site, name: str, known: list[str]) -> PassError:
    return PassError(
        f"{site.fqn} has no weight {name!r}",
        code="K477",
        expected=f"of {', '.join(known)}" if known else "a module with a matrix",
        remedy="correct `weights`, or leave it out",
    )


def _check_finite(site: Site, weights: Mapping[str, nn.Parameter]) -> None:
    for name, weight in weights.items():
        if not weight.is_meta and not bool(torch.isfinite(weight).all()):
            raise PassError(
                f"{site.fqn}: {name} holds NaN or infinity",
                code="K472",
                expected="finite weights",
                remedy="look for the step whose training diverged",
            )
