"""The pass `quantize`: weights as packed integers of 2 to 8 bits, and linear maps that multiply bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn
from transformers.pytorch_utils import Conv1D

from kroncc.api import Calibration, PassError, Site, SitePass, Skip
from kroncc_passes._quantize_budget import CHOICES, rounding_error, split
from kroncc_passes._quantize_build import (
    Activations,
    Form,
    int8_product,
    packed,
    packed_bytes,
    trained,
    trained_int8,
)
from kroncc_passes._quantize_gobo import count_outliers
from kroncc_passes._quantize_grid import Granularity, Grid
from kroncc_passes._quantize_sites import candidates, is_quantised, layout_of, saves, unquantisable
from kroncc_passes._stored import stored

Count = Annotated[int, Field(gt=0, strict=True)]
Bits = Annotated[int, Field(ge=2, le=8, strict=True)]
KNOWN = (nn.Linear, Conv1D, nn.Embedding)


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

    Zafrir et al., Q8BERT, 2019. Shen et al., Q-BERT, AAAI 2020 (groups, mixed bits). Zadeh et al., GOBO,
    MICRO 2020. Frantar et al., GPTQ, 2022. Bengio et al., Estimating or propagating gradients through
    stochastic neurons, 2013 (straight-through).
    """

    kind: ClassVar[str] = "quantize"
    order: ClassVar[int] = 40
    accepts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Module,)

    bits: Bits | Literal["auto"] = Field(
        description="bits a weight, 2 to 8; auto: shared out among the modules for least harm within `budget`"
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
        description="GOBO: a weight whose log-likelihood under a Gaussian fit of its matrix is below this "
        "(-4 in the paper) stays exact, the rest become one of 2^bits centroids",
    )
    rounding: Literal["nearest", "gptq"] = Field(
        "nearest", description="gptq: columns make up for the errors of those before, by the inputs measured"
    )
    sequential: bool = Field(
        False, description="with gptq: measure a module's inputs when all modules before it are rounded"
    )
    activations: Activations = Field(
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
        int8 = self.activations != "float"
        refused = {
            "`granularity: group` wants a `group`": self.granularity == "group" and self.group is None,
            f"`group` does not go with `granularity: {self.granularity}`": self.group is not None
            and self.granularity in ("tensor", "channel"),
            "`bits: auto` and `budget` go together": (self.bits == "auto") != (self.budget is not None),
            "`counts` wants `outliers`": self.counts is not None and self.outliers is None,
            "`sequential` wants `rounding: gptq`": self.sequential and self.rounding != "gptq",
            "`sequential` does not go with `bits: auto`": self.sequential and self.bits == "auto",
            "`outliers` wants 2 to 8 `bits`, and no other way of rounding": self.outliers is not None
            and not (self._even() and self.granularity != "channel" and not int8 and self.bits != "auto"),
            f"`activations: {self.activations}` wants `bits: 8`, and no `group`, `outliers`, `gptq`, "
            "`symmetric: false`": int8 and not (self._even() and self.bits == 8 and self.outliers is None),
        }
        said = [message for message, wrong in refused.items() if wrong]
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
        form, names = resolved._form(), resolved.weights or ()
        if resolved.activations != "float":
            return int8_product(site, form, resolved.activations).train(site.module.training)
        counts = resolved.counts or [None] * len(names)
        stores = {name: packed(site, name, form, count) for name, count in zip(names, counts, strict=True)}
        return stored(site.module, stores).train(site.module.training)

    def live(self, site: Site) -> nn.Module | Skip:
        """Return the module that trains with rounded weights.

        Raises PassError as `resolve`, K472 (not finite), K475 (`outliers` and `gptq` do not train).
        """
        resolved = self.resolve(site)
        if isinstance(resolved, Skip):
            return resolved
        form = resolved._form()
        if resolved.activations != "float":
            return trained_int8(site, form, resolved.activations).train(site.module.training)
        stores = {name: trained(site, name, form) for name in resolved.weights or ()}
        return stored(site.module, stores).train(site.module.training)

    def _even(self) -> bool:
        """Say whether nothing is set that only a grid of groups, with a zero of its own, or `gptq` has."""
        return self.group is None and self.symmetric and self.rounding == "nearest"

    def _at(self, bits: int) -> Self:
        return self.model_copy(update={"bits": bits, "budget": None})

    def _grid(self) -> Grid:
        assert self.bits != "auto"
        granularity = self.granularity or ("channel" if self.group is None else "group")
        return Grid(self.bits, granularity, self.group, self.symmetric)

    def _form(self) -> Form:
        return Form(self._grid(), self.outliers, self.rounding == "gptq", self.train_scales, self.start)

    def _unsuited(self, module: nn.Module) -> str:
        """Return why the options do not fit the kind of module, or nothing."""
        if type(module) in KNOWN:
            return ""
        wants = "activations" if self.activations != "float" else "gptq" if self.rounding == "gptq" else ""
        return f"is a {type(module).__name__}; {wants} treats Linear and Conv1D" if wants else ""

    def _named(self, site: Site) -> Self | Skip:
        """Return the pass with `weights` and `counts` explicit."""
        found = candidates(site.module)
        names = self.weights
        if names is None:
            grid = None if self.outliers is not None else self._grid()
            bits = self._grid().bits
            names = tuple(name for name in found if saves(layout_of(site.module, name, bits), grid))
        if missing := next((name for name in names if name not in found), None):
            raise _unknown_weight(site, missing, list(found))
        if not names:
            small = f"its {', '.join(found)} would be no smaller than in half precision"
            return Skip(small if found else "it has no weight matrix")
        counts = self.counts
        if self.outliers is not None and counts is None:
            counts = tuple(count_outliers(found[name], self.outliers) for name in names)
        return self.model_copy(update={"weights": names, "counts": counts})

    def _bytes(self, site: Site) -> int:
        """Return the bytes that the quantised weights of a site take."""
        return sum(packed_bytes(site, name, self._grid()) for name in self.weights or ())

    @torch.no_grad()
    def _error(self, site: Site, sensitivity: str) -> float:
        """Return what rounding a site to nearest does."""
        new = self.model_copy(update={"rounding": "nearest"}).replace(site)
        assert isinstance(new, nn.Module)
        return rounding_error(site, new, sensitivity)

    def _check_budget(self, least: int) -> None:
        if self.budget is not None and self.budget < least:
            raise PassError(
                f"`budget` is {self.budget:,} bytes; at {CHOICES[0]} bits the modules take {least:,}",
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
