"""What would fail when a stage runs and can be seen before any work: one check a mistake.

Nothing here reads weights or rows; what the compiler could not read (None) is passed over.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kroncc.data.labels import Labels
from kroncc.data.tokens import TASKS
from kroncc.errors import DataError, PlanError
from kroncc.graph.roles import module_infos
from kroncc.graph.taps import with_taps
from kroncc.model.save import write_error
from kroncc.model.source import Origin, Unreachable, tokenizer_for
from kroncc.plan.measures import CLASSES, LATENCY, NUMBERS, check_kind, fidelity_parts
from kroncc.plan.models import Models
from kroncc.plan.terms import all_taps
from kroncc.recipe.expect import parse_expectation
from kroncc.recipe.schema import (
    Action,
    Compress,
    Distill,
    Evaluate,
    Export,
    Finetune,
    LossSpec,
    Recipe,
    Scope,
    Training,
)
from kroncc.recipe.targets import select

VALIDATION = "validation"  # the split that `evaluate_every` reads


@dataclass(frozen=True)
class DataFacts:
    """What the plan knows of a data set that could be opened: its content and its rows a split."""

    fingerprint: str
    rows: Mapping[str, int]
    labels: Labels | None


def check_step(name: str, action: Action, models: Models, facts: Mapping[str, DataFacts | None]) -> None:
    """Raise what step `name`, already among `models`, would fail with when it runs.

    `PlanError`: K814 nothing left to train, K815 precision. `DataError`: K607 split, K610 task, K611, K618,
    K623 or K624 labels. `TargetError`: a `freeze` that matches nothing.
    """
    if isinstance(action, Training):
        _check_precision(action)
        _check_freeze(action, models, name)
    _check_task(action, models.task)
    _check_splits(action, facts)
    _check_labels(name, action, models, facts)


def check_source(origin: Origin, recipe: Recipe, *, offline: bool) -> None:
    """Raise `ModelError` K515 where a step needs text as tokens and no tokenizer lies beside the model."""
    if not any(_reads_rows(action) for action in recipe.steps.values()):
        return
    if offline and origin.directory is None and origin.id is None:
        return
    try:
        tokenizer_for(origin)
    except Unreachable:
        if not offline:
            raise


def check_expectations(recipe: Recipe, models: Models) -> None:
    """Raise `PlanError` K821 for a figure of fidelity that the task does not give."""
    for key, text in recipe.expect.items():
        for name in sorted(parse_expectation(key, text).names()):
            model, _, figure = name.partition(".")
            given = fidelity_parts(models.task, models.head(model))
            if figure.startswith("fidelity.") and figure.removeprefix("fidelity.") not in given:
                raise PlanError(
                    f"{name} is never measured: fidelity of task {models.task!r} has no such figure",
                    code="K821",
                    path=f"expect.{key}",
                    expected=", ".join(f"{model}.fidelity.{part}" for part in given),
                )


def check_exports(
    steps: Mapping[str, Action], root: Path, source: Path | None, run: Path | None, *, offline: bool
) -> None:
    """Raise `PlanError` for an export that could not be written: K827, and K802-K804 as when it runs.

    `root` is the folder that `to` starts from, `source` the model's directory, `run` the run directory.
    """
    taken: dict[Path, str] = {}
    for name, action in steps.items():
        if not isinstance(action, Export) or action.to is None:
            continue
        target, path = (root / action.to).resolve(), f"steps.{name}.export.to"
        twin = next((other for place, other in taken.items() if _overlap(place, target)), None)
        what = f"overlaps the export {twin!r}" if twin else export_refused(target, source, run)
        if what:
            raise cannot_export(target, what, path)
        _check_writable(target, path, probe=not offline)
        taken[target] = name


def cannot_export(target: Path, what: str, path: str = "") -> PlanError:
    """Return the error K827 for a directory that an export must not write to."""
    return PlanError(
        f"cannot export to {target}: it {what}",
        code="K827",
        path=path,
        expected="a new or empty directory, or one of an earlier export",
        remedy="change `to`",
    )


def export_refused(target: Path, source: Path | None, run: Path | None) -> str | None:
    """Say why nothing may be exported to `target` (absolute); None where it may."""
    if source is not None and _overlap(target, source.resolve()):
        return "is the source model" if target == source.resolve() else "overlaps the source model"
    if run is not None and _overlap(target, run.resolve()):
        return "overlaps the run directory"
    if target.exists() and not target.is_dir():
        return "is a file"
    if target.is_dir() and any(target.iterdir()) and not (target / "report.json").is_file():
        return "is not empty and was not written by an export"
    return None


def _overlap(one: Path, other: Path) -> bool:
    return one.is_relative_to(other) or other.is_relative_to(one)


def _check_writable(target: Path, path: str, *, probe: bool) -> None:
    """Ask the system whether a directory can be made beside `target`; with `probe`, by making one."""
    nearest = next(parent for parent in target.parents if parent.exists())
    try:
        if not nearest.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{nearest} is a file")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, f"{nearest} is not writable")
        if probe:
            Path(tempfile.mkdtemp(prefix=".kroncc-", dir=nearest)).rmdir()
    except OSError as error:
        problem = write_error(target, error.strerror or str(error), error.errno).problems[0]
        raise PlanError(problems=[replace(problem, path=path)]) from error


def _check_precision(action: Training) -> None:
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on", "y", "t")
    if action.precision == "fp16" and (on_cpu or not torch.accelerator.is_available()):
        raise PlanError(
            "precision fp16 cannot be had here: on a CPU its small gradients vanish",
            code="K815",
            path="precision",
            remedy="use precision: fp32 or bf16, or plan and apply on the machine with the GPU",
        )


def _check_freeze(action: Training, models: Models, name: str) -> None:
    if not action.freeze:
        return
    report = models.reports[name]
    graph = models.rebuilt(report.structure, report.labels)
    for fqn in select(Scope(targets=action.freeze), module_infos(graph)):
        graph.get(fqn).requires_grad_(False)
    specs: Sequence[LossSpec] = [LossSpec(kind="task")]
    if isinstance(action, Distill):
        specs = action.losses
    trained = with_taps(graph, all_taps(specs), outputs=False).parameters()
    if not any(parameter.requires_grad for parameter in trained):
        raise PlanError("no parameter is left to train", code="K814", path="freeze", remedy="freeze less")


def _reads_rows(action: Action) -> bool:
    if isinstance(action, Evaluate):
        return any(metric != LATENCY for metric in action.metrics)
    return any(_splits_read(action))


def _check_task(action: Action, task: str) -> None:
    if task not in TASKS and _reads_rows(action):
        raise DataError(
            f"data for task {task!r} is not supported yet",
            code="K610",
            path="data",
            expected=", ".join(TASKS),
        )


def _check_splits(action: Action, facts: Mapping[str, DataFacts | None]) -> None:
    """Raise `DataError` K607 where a step reads a split that its data does not have."""
    for data, split, path in _splits_read(action):
        known = facts[data]
        if known is not None and split not in known.rows:
            raise DataError(
                f"data {data!r} has no split {split!r}",
                code="K607",
                path=path,
                expected=f"one of {', '.join(known.rows)}",
                remedy=f"name its files under data.{data}.files, or set validation_fraction there",
            )


def _splits_read(action: Action) -> Iterator[tuple[str, str, str]]:
    """Yield each data set and split that a step reads, with the key that asks for it."""
    if isinstance(action, Compress):
        if action.calibrate is not None:
            yield action.calibrate.data, action.calibrate.split, "calibrate.split"
        return
    if isinstance(action, Export):
        return
    yield action.data, action.split, "split"
    if isinstance(action, Training) and action.evaluate_every is not None:
        yield action.data, VALIDATION, "evaluate_every"


def _check_labels(name: str, action: Action, models: Models, facts: Mapping[str, DataFacts | None]) -> None:
    """Raise `DataError` where a step reads labels that its data lacks (K624) or its head cannot give."""
    if not models.task.endswith("classification") or not _reads_labels(action):
        return
    data = str(getattr(action, "data", ""))
    known = facts[data]
    if known is None:
        return
    if known.labels is None:
        raise DataError(
            f"data {data!r} has no labels, which this step needs",
            code="K624",
            path="data",
            remedy=f"set data.{data}.label to its label column",
        )
    for model in action.models if isinstance(action, Evaluate) else (name,):
        known.labels.check_head(models.head(model), data)
        if isinstance(action, Evaluate):
            check_kind(action.metrics, known.labels.kind == "regression", models.head(model))


def _reads_labels(action: Action) -> bool:
    match action:
        case Finetune():
            return True
        case Distill():
            return any(loss.kind == "task" for loss in action.losses)
        case Evaluate():
            return bool({*CLASSES, *NUMBERS} & set(action.metrics))
    return False
