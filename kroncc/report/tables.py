"""The closing table of a run: every measured model beside the original."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from rich.table import Table

from kroncc.plan.layout import Fitting, plain_table
from kroncc.plan.render import human
from kroncc.plan.stages import ModelReport, Plan
from kroncc.recipe.names import COSTS

Rows = Mapping[str, Sequence[str]]  # model -> cells
DISK = "disk"  # bytes of the weight files; a value `MODEL.disk`
LATENCY = "latency"  # milliseconds at batch 1; a value `MODEL.latency`


def closing_table(plan: Plan, values: Mapping[str, float]) -> Fitting:
    """Return a table with one row a model: sizes, FLOPs and every metric in `values` (`MODEL.metric`)."""
    measured = {name: _metrics(name, values) for name in plan.models}
    metrics = list(dict.fromkeys(metric for row in measured.values() for metric in row))
    base = plan.models["base"]
    shown = [name for name in measured if measured[name]] or [
        name for name in measured if f"{name}.{DISK}" in values
    ]
    rows = {
        name: [
            *_sizes(name, report, base, values),
            *(_cell(metric, measured[name], measured["base"]) for metric in metrics),
        ]
        for name, report in plan.models.items()
        if name == "base" or name in shown
    }
    title = f"{plan.name}: result ({plan.length} tokens, batch 1)"
    headings = ["parameters", "bytes on disk", "FLOPs", *(_heading(metric) for metric in metrics)]
    return Fitting(
        (_wide(title, headings, rows), _stacked(title, headings, rows), _listed(title, headings, rows))
    )


def _wide(title: str, headings: Sequence[str], rows: Rows) -> Table:
    """Return the table with a line a model."""
    table = plain_table(title)
    table.add_column("model", overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def _stacked(title: str, headings: Sequence[str], rows: Rows) -> Table:
    """Return the table with ratios below their figures, and long headings in two lines."""
    split = [re.sub(r"(?<=[._ ])(?=\w)", "\n", heading) for heading in headings]
    table = _wide(title, split, {name: [_in_two(cell) for cell in row] for name, row in rows.items()})
    table.collapse_padding = True
    return table


def _in_two(cell: str) -> str:
    return cell.replace(" (", "\n(")


def _listed(title: str, headings: Sequence[str], rows: Rows) -> Table:
    """Return the table with a line a figure."""
    table = plain_table(title)
    for column in ("model", "figure"):
        table.add_column(column, overflow="fold")
    table.add_column("value", justify="right", no_wrap=True)
    for name, cells in rows.items():
        known = [(heading, cell) for heading, cell in zip(headings, cells, strict=True) if cell]
        for index, (heading, cell) in enumerate(known):
            table.add_row("" if index else name, heading, cell, end_section=index == len(known) - 1)
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
