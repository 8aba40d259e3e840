"""Checks of a distillation that need shapes, no weights: taps exist, layers pair up, widths and heads fit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from kroncc.errors import PlanError, Problem
from kroncc.graph.model_graph import ModelGraph
from kroncc.graph.roles import module_infos
from kroncc.graph.taps import tap_shapes
from kroncc.plan.terms import Shape, check_term, needed_taps
from kroncc.recipe.schema import Distill, LossSpec, Scope
from kroncc.recipe.targets import select


def check_distill(action: Distill, student: ModelGraph, teacher: ModelGraph) -> None:
    """Raise one `PlanError` with everything in a distillation that the two models cannot do."""
    problems: list[Problem] = []
    for index, spec in enumerate(action.losses):
        try:
            _check_loss(spec, student, teacher)
        except PlanError as error:
            at = f"losses[{index}].{spec.kind}"
            problems += [replace(p, path=f"{at}.{p.path}" if p.path else at) for p in error.problems]
    if problems:
        raise PlanError(problems=problems)
    for targets in (action.copy_from_teacher, action.freeze):
        if targets:
            select(Scope(targets=targets), module_infos(student))


def _check_loss(spec: LossSpec, student: ModelGraph, teacher: ModelGraph) -> None:
    mine, theirs = needed_taps([spec])
    logits = () if spec.kind == "task" or spec.at != "logits" else ("logits",)
    check_term(spec, _shapes(student, (*mine, *logits)), _shapes(teacher, (*theirs, *logits)))


def _shapes(graph: ModelGraph, taps: Iterable[str]) -> dict[str, list[Shape]]:
    return {tap: [tuple(shape) for shape in tap_shapes(graph, tap)] for tap in taps}
