"""Build what takes the place of one weight: packed, packed with centroids, trained, or a product of bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from kroncc.api import PassError, Site
from kroncc_passes._dense import bias_of
from kroncc_passes._quantize_budget import unmeasured
from kroncc_passes._quantize_gobo import coded_weight
from kroncc_passes._quantize_gptq import compensated
from kroncc_passes._quantize_grid import Grid
from kroncc_passes._quantize_live import TrainedInt8, TrainedWeight, int8_linear
from kroncc_passes._quantize_sites import layout_of
from kroncc_passes._quantize_stores import PackedWeight, packed_weight
from kroncc_passes._stored import Store

Activations = Literal["float", "dynamic-int8", "static-int8"]


@dataclass(frozen=True)
class Form:
    """The options of `quantize` that say what a weight becomes."""

    grid: Grid
    outliers: float | None = None
    gptq: bool = False
    train_scales: bool = False
    start: float = 0.0


def packed(site: Site, name: str, form: Form, count: int | None) -> Store:
    """Return the packed form of the weight `name`; `count` is that of its outliers, if it has such.

    Raises PassError K472 (not finite), K473 (`gptq`, and its inputs were not measured).
    """
    weight = _finite(site, name)
    layout = layout_of(site.module, name, form.grid.bits)
    if form.outliers is not None:
        return coded_weight(weight, layout, form.outliers, count, trained=form.train_scales)
    if not form.gptq or weight.is_meta:
        return packed_weight(weight, layout, form.grid, trained=form.train_scales)
    if site.stats is None or site.stats.moment is None:
        raise unmeasured(site, "inputs", "give the step `calibrate`, or set `rounding: nearest`")
    matrix = layout.matrix(weight.detach())
    scale, zero = form.grid.fit(matrix)
    codes = compensated(matrix, site.stats.moment, form.grid, scale, zero)
    return PackedWeight(layout, form.grid, layout.pack(codes), scale, zero, trained=form.train_scales)


def int8_product(site: Site, form: Form, activations: Activations) -> nn.Module:
    """Return the linear map that multiplies bytes. Raises PassError K472, K476 (no range learnt)."""
    weight = _finite(site, "weight")
    fixed = activations == "static-int8"
    if fixed and not weight.is_meta:
        raise PassError(
            f"{site.fqn}: the range of its inputs is not known",
            code="K476",
            expected="`static-int8` under `during`, where it is learnt",
            remedy="set `activations: dynamic-int8`, or move the pass to `during`",
        )
    layout = layout_of(site.module, "weight", form.grid.bits)
    reach = weight.new_zeros(()) if fixed else None
    return int8_linear(weight, layout, form.grid, bias_of(site.module), reach)


def trained(site: Site, name: str, form: Form) -> TrainedWeight:
    """Return the weight `name`, itself, seen rounded. Raises PassError K472, K475 (`outliers`, `gptq`)."""
    if form.outliers is not None or form.gptq:
        raise PassError(
            f"{site.fqn}: `outliers` and `rounding: gptq` have no form that trains",
            code="K475",
            expected="rounding to the nearest of evenly spaced steps under `during`",
            remedy="leave them out here, or quantise in a compress step",
        )
    layout = layout_of(site.module, name, form.grid.bits)
    weight = _finite(site, name)
    return TrainedWeight(weight, layout, form.grid, start=form.start, trained=form.train_scales)


def trained_int8(site: Site, form: Form, activations: Activations) -> TrainedInt8:
    """Return the linear map that trains as the product of bytes. Raises PassError as `trained`."""
    weight = trained(site, "weight", form)
    return TrainedInt8(weight, bias_of(site.module), fixed=activations == "static-int8")


def packed_bytes(site: Site, name: str, grid: Grid) -> int:
    """Return the bytes that the weight `name` takes on `grid`."""
    layout = layout_of(site.module, name, grid.bits)
    rows, row = layout.packed_shape
    many, groups = grid.scales(layout.rows, layout.columns)
    each = site.module.get_parameter(name).element_size() + (0 if grid.symmetric else 1)
    return rows * row + many * groups * each


def _finite(site: Site, name: str) -> nn.Parameter:
    weight = site.module.get_parameter(name)
    if not weight.is_meta and not bool(weight.isfinite().all()):
        raise PassError(
            f"{site.fqn}: {name} holds NaN or infinity",
            code="K472",
            expected="finite weights",
            remedy="look for the step whose training diverged",
        )
    return weight
