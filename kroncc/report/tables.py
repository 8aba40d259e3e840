"""The closing table of a run: every measured model beside the original."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from kroncc.plan.render import human, plain_table
from kroncc.plan.stages import ModelReport, Plan
from kroncc.recipe.names import COSTS

DISK = "disk"  # bytes of the weight files; a value `MODEL.disk`
LATENCY = "latency"  # milliseconds at batch 1; a value `MODEL.latency`


def closing_table(plan: Plan, values: Mapping[str, float]) -> Table:
    """Return a table with one row a model: sizes, FLOPs and every metric in `values` (`MODEL.metric`)."""
    measured = {name: _metrics(name, values) for name in plan.models}
    metrics = list(dict.fromkeys(metric for row in measured.values() for metric in row))
    table = plain_table(f"{plan.name}: result ({plan.length} tokens, batch 1)")
    table.add_column("model", overflow="fold")
    for column in ("parameters", "bytes on disk", "FLOPs", *(_heading(metric) for metric in metrics)):
        table.add_column(column, justify="right", overflow="fold")
    base = plan.models["base"]
    shown = [name for name in measured if measured[name]] or [
        name for name in measured if f"{name}.{DISK}" in values
    ]
    for name, report in plan.models.items():
        if name != "base" and name not in shown:
            continue
        cells = [_cell(metric, measured[name], measured["base"]) for metric in metrics]
        table.add_row(name, *_sizes(name, report, base, values), *cells)
    return table


def _metrics(name: str, values: Mapping[str, float]) -> dict[str, float]:
    """Return the measured values of one model, without its name; `a.b` belongs to the longest model name."""
    found = {key[len(name) + 1 :]: value for key, value in values.items() if key.startswith(f"{name}.")}
    return {key: value for key, value in found.items() if key not in COSTS}


def _sizes(
    name: str, report: ModelReport, base: ModelReport, values: Mapping[str, float]
) -> tuple[str, str, str]:
    params = int(values.get(f"{name}.params", report.params))
    flops = int(values.get(f"{name}.flops", report.flops.total))
    return (
        f"{params:,}{_ratio(base.params, params)}",
        _disk(values.get(f"{name}.{DISK}"), values.get(f"base.{DISK}")),
        f"{human(flops)}{_ratio(base.flops.total, flops)}",
    )


def _disk(size: float | None, base: float | None) -> str:
    if size is None:
        return ""
    return f"{size / 1e6:.1f} MB{_ratio(base, size) if base else ''}"


def _ratio(before: float, after: float) -> str:
    return "" if before == after or not after else f" ({before / after:.2f}x)"


def _heading(metric: str) -> str:
    return "latency" if metric == LATENCY else metric


def _cell(metric: str, row: Mapping[str, float], base: Mapping[str, float]) -> str:
    value = row.get(metric)
    if value is None:
        return ""
    if metric != LATENCY:
        return f"{value:.4f}"
    return f"{value:.1f} ms{_ratio(base[metric], value) if metric in base else ''}"
