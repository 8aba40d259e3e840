"""The plan as a page: tables for a terminal, and a Mermaid diagram of the stages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kroncc.plan.layout import Fitting, plain_table
from kroncc.plan.notes import notes
from kroncc.plan.stages import ModelReport, ModuleRow, Plan, SkippedRow, Stage

SIDE_BY_SIDE = 110  # columns from which before and after stand side by side
_UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def human(value: float) -> str:
    """Return a count with three to four digits and a unit: 14655754 -> 14.66 M."""
    for scale, unit in _UNITS:
        if abs(value) >= scale:
            return f"{value / scale:.2f} {unit}"
    return f"{value:g}"


@dataclass(frozen=True)
class Folded:
    """Modules that differ only in the layer they stand in, shown as one row."""

    name: str
    count: int
    row: ModuleRow


def fold(rows: Iterable[ModuleRow]) -> list[Folded]:
    """Join rows that are equal but for numbers in their FQN: `layer.0.q`, `layer.1.q` -> `layer.{0-1}.q`."""
    groups: dict[tuple[object, ...], list[ModuleRow]] = {}
    for row in rows:
        key = (re.sub(r"\d+", "#", row.fqn), row.role, row.passes, row.before, row.after)
        groups.setdefault(key, []).append(row)
    return [Folded(fold_names([row.fqn for row in group]), len(group), group[0]) for group in groups.values()]


def fold_names(fqns: Sequence[str]) -> str:
    """Return one name for many that differ only in numbers: runs as `{0-5}`, others as `{0,2,5}`."""
    parts = [re.split(r"(\d+)", fqn) for fqn in fqns]
    return "".join(_span([part[i] for part in parts]) for i in range(len(parts[0])))


def _span(texts: Sequence[str]) -> str:
    distinct = list(dict.fromkeys(texts))
    if len(distinct) == 1:
        return distinct[0]
    numbers = sorted(int(text) for text in distinct)
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{{{numbers[0]}-{numbers[-1]}}}"
    return "{" + ",".join(map(str, numbers)) + "}"


def module_table(title: str, report: ModelReport, base: ModelReport) -> Fitting:
    """Return the table of one model: every module with parameters, before and after."""
    return Fitting((_wide(title, report, base), _narrow(title, report, base)), least=SIDE_BY_SIDE)


def _wide(title: str, report: ModelReport, base: ModelReport) -> Table:
    """Return the table with before and after side by side."""
    table = plain_table(title, show_footer=True)
    table.add_column("module", footer="total", overflow="fold")
    table.add_column("role", overflow="fold")
    table.add_column("n", justify="right", no_wrap=True)
    table.add_column("before -> after", footer=_ratio(report, base), overflow="fold")
    for heading, footer in (
        ("parameters", f"{base.params:,}"),
        ("after", f"{report.params:,}"),
        ("FLOPs", human(base.flops.total)),
        ("after", human(report.flops.total)),
    ):
        table.add_column(heading, justify="right", no_wrap=True, footer=footer)
    for group in _shown(report):
        shape, params, flops = _sides(group)
        table.add_row(group.name, group.row.role, str(group.count), " -> ".join(shape), *params, *flops)
    return table


def _narrow(title: str, report: ModelReport, base: ModelReport) -> Table:
    """Return the table with after below before, and the role below the module."""
    table = plain_table(title, show_footer=True)
    table.add_column("module\nrole", footer="total", overflow="fold")
    table.add_column("n", justify="right", no_wrap=True)
    table.add_column("before\n-> after", footer=_ratio(report, base), overflow="fold")
    flops = f"{human(base.flops.total)}\n{human(report.flops.total)}"
    table.add_column(
        "parameters\nafter", justify="right", footer=f"{base.params:,}\n{report.params:,}", no_wrap=True
    )
    table.add_column("FLOPs\nafter", justify="right", footer=flops, no_wrap=True)
    for group in _shown(report):
        name = "\n".join(filter(None, (group.name, group.row.role)))
        shape, params, cost = _sides(group)
        cells = ("\n-> ".join(shape), *("\n".join(filter(None, side)) for side in (params, cost)))
        table.add_row(name, str(group.count), *cells)
    return table


def _ratio(report: ModelReport, base: ModelReport) -> str:
    return f"{base.params / report.params:.2f}x smaller" if report.params else ""


def _shown(report: ModelReport) -> list[Folded]:
    return fold(row for row in report.modules if row.before.params or row.before.flops)


def _sides(group: Folded) -> tuple[tuple[str, ...], tuple[str, str], tuple[str, str]]:
    """Return shapes, parameters and FLOPs, each before and after; nothing after where nothing was done."""
    before, after = group.row.before, group.row.after
    changed = bool(group.row.passes) or before != after
    return (
        (before.shape, after.shape) if changed else (before.shape,),
        (f"{before.params:,}", f"{after.params:,}" if changed else ""),
        (
            human(before.flops) if before.flops else "",
            human(after.flops) if changed and after.flops else "",
        ),
    )


def skipped_table(rows: Sequence[SkippedRow]) -> Table:
    """Return the table of modules that a target matched and a pass left alone."""
    table = plain_table("skipped")
    for column in ("module", "pass", "reason"):
        table.add_column(column, overflow="fold")
    groups: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        groups.setdefault((re.sub(r"\d+", "#", row.fqn), row.name, row.reason), []).append(row.fqn)
    for (_, name, reason), fqns in groups.items():
        table.add_row(fold_names(fqns), name, reason)
    return table


def stage_table(plan: Plan) -> Fitting:
    """Return the table of stages: what they wait for, what they cost; a narrow one leaves out hashes."""
    return Fitting((_stages(plan, hashes=True), _stages(plan, hashes=False)))


def _stages(plan: Plan, *, hashes: bool) -> Table:
    table = plain_table("stages")
    for column in ("stage", "kind", "needs"):
        table.add_column(column, overflow="fold")
    for column in ("steps", "FLOPs", "parameters"):
        table.add_column(column, justify="right", no_wrap=True)
    if hashes:
        table.add_column("hash", no_wrap=True)
    for stage in plan.stages:
        table.add_row(*_stage_cells(stage, plan.models.get(stage.name))[: len(table.columns)])
    return table


def _stage_cells(stage: Stage, report: ModelReport | None) -> tuple[str, ...]:
    trains = stage.kind in ("train", "reconstruct")
    steps, flops = "?" * trains, "?" * (trains or stage.kind == "calibrate")
    return (
        stage.name,
        stage.kind,
        ", ".join(stage.needs) or "base",
        f"{stage.steps:,}" if stage.steps is not None else steps,
        f"<= {human(stage.flops)}" if stage.flops is not None else flops,
        f"{report.params:,}" if report else "",
        stage.hash[:8],
    )


def render(plan: Plan) -> RenderableType:
    """Return the whole plan for a terminal."""
    base = plan.models["base"]
    parts: list[RenderableType] = [Text(f"{plan.name}: FLOPs for one sequence of {plan.length} tokens\n")]
    for stage in plan.stages:
        if stage.kind != "rewrite" and not stage.options.get("during"):
            continue
        report = plan.models[stage.name]
        parts.append(module_table(stage.name, report, base))
        linear = f"{human(base.flops.linear)} -> {human(report.flops.linear)}"
        parts.append(Text(f"linear maps of the layers: {linear} FLOPs; stored bytes {report.bytes:,}\n"))
        if not report.settled:
            parts.append(Text("an estimate: weights or data decide on shapes when the plan is applied\n"))
        if report.skipped:
            parts.append(skipped_table(report.skipped))
    parts.append(stage_table(plan))
    unread = [name for name, mark in plan.sources.items() if mark is None]
    if unread:
        parts.append(
            Text(f"not read: {', '.join(unread)} (needed to apply; '?' above is not known without it)")
        )
    parts += [Text(f"note: {note}", style="bold") for note in notes(plan)]
    for expectation, met in plan.expectations.items():
        parts.append(Text(f"expect {expectation}: {_verdict(met)}"))
    return Group(*parts)


def _verdict(met: bool | None) -> str:
    return "known after the run" if met is None else "met" if met else "NOT MET"


def mermaid(plan: Plan) -> str:
    """Return the stages as a Mermaid flowchart."""
    ids = {name: f"s{index}" for index, name in enumerate(["base", *(stage.name for stage in plan.stages)])}
    lines = ["flowchart LR", f'  {ids["base"]}(["base<br/>{human(plan.models["base"].params)} parameters"])']
    for stage in plan.stages:
        lines.append(f'  {ids[stage.name]}["{stage.name}<br/>{stage.kind}"]')
        lines += [f"  {ids[before]} --> {ids[stage.name]}" for before in _origins(stage)]
    return "\n".join(lines) + "\n"


def _origins(stage: Stage) -> tuple[str, ...]:
    """Return what a stage takes, `base` included, each once."""
    keys = ("model", "student", "teacher", "against")
    named = [stage.options[key] for key in keys if stage.options.get(key)]
    return tuple(dict.fromkeys([*named, *stage.options.get("models", []), *stage.needs]))
