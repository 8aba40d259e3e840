"""Compile a recipe into a plan: capture on meta tensors, run the passes, count costs, hash the stages.

Nothing here reads a weight. Data is opened only to fingerprint it and to count its rows.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from kroncc.data.sources import is_hub
from kroncc.data.splits import open_data
from kroncc.errors import DataError, KronccError
from kroncc.hashing import content_hash
from kroncc.model.source import resolve
from kroncc.plan.blocks import batch_count, block_steps
from kroncc.plan.calibration import Measurement, calibrate_stage, measurements
from kroncc.plan.dag import order
from kroncc.plan.effort import Effort
from kroncc.plan.models import BASE, Models
from kroncc.plan.preflight import DataFacts, check_expectations, check_exports, check_source, check_step
from kroncc.plan.stages import ModelReport, Plan, Stage, StageKind, costs
from kroncc.recipe.expect import parse_expectation
from kroncc.recipe.loader import Loaded
from kroncc.recipe.schema import (
    Action,
    Compress,
    DataSpec,
    Distill,
    Evaluate,
    Export,
    Finetune,
    Recipe,
    Reconstruct,
    Training,
    inputs_of,
)

KINDS: dict[type[Action], StageKind] = {
    Compress: "rewrite",
    Finetune: "train",
    Distill: "train",
    Reconstruct: "reconstruct",
    Evaluate: "evaluate",
    Export: "export",
}
LIBRARIES = ("kroncc", "torch", "transformers")
DEFAULT_TASK = "feature-extraction"
NO_FILE = "K602"
NO_RESULT = ("checkpoint_every", "evaluate_every")  # options that leave the trained model as it is


def compile_recipe(loaded: Loaded, *, offline: bool = False, directory: Path | None = None) -> Plan:
    """Return the plan of a recipe; every mistake that can be found without weights is raised here.

    With `offline`, what cannot be read is noted as unread (`sources` holds None) instead of raising: data of
    the hub, files that are not there, a model whose `config` is given. Such a plan shows shapes and costs,
    and cannot be run. `directory` is the run directory, where it is known.
    """
    recipe, root = loaded.recipe, loaded.path.parent
    with _at(loaded, "model.source"):
        origin = resolve(recipe.model, root, cached=offline and recipe.model.config is not None)
        if not offline and origin.fingerprint is None:
            origin.fetch(weights=False)  # says that there is no model to run
        check_source(origin, recipe, offline=offline)
    with _at(loaded, ""):
        check_exports(recipe.steps, root, origin.directory, directory, offline=offline)
    lengths = [spec.max_length for spec in recipe.data.values()]
    models = Models(origin, recipe.model.task or DEFAULT_TASK)
    with _at(loaded, "model"):
        models.add_base(recipe.model.labels, lengths)
    facts = {name: _data_facts(loaded, name, spec, offline) for name, spec in recipe.data.items()}
    source = origin.fingerprint or content_hash(recipe.model.model_dump(mode="json"))
    effort, stages = Effort(models), dict[str, Stage]()
    needs = {
        name: [model for model in inputs_of(action) if model != BASE] for name, action in recipe.steps.items()
    }
    for name in order(needs):
        action = recipe.steps[name]
        with _at(loaded, f"steps.{name}.{_kind_name(action)}"):
            models.add(name, action)
            check_step(name, action, models, facts)
    measured = measurements(recipe, models.requests)
    for name in order(needs):
        if (first := measured.get(name)) is not None and first.name not in stages:
            stages[first.name] = calibrate_stage(first, recipe, effort, facts, stages, source)
        stages[name] = _stage(name, recipe, effort, facts, stages, source, measured.get(name))
    with _at(loaded, ""):
        check_expectations(recipe, models)
    return Plan(
        name=recipe.name,
        recipe=recipe.model_dump(mode="json", exclude_defaults=True),
        length=models.length,
        versions={library: importlib.metadata.version(library) for library in LIBRARIES},
        sources={"model": origin.fingerprint}
        | {f"data.{name}": one and one.fingerprint for name, one in facts.items()},
        stages=tuple(stages.values()),
        models=models.reports,
        expectations=_judged(recipe, models.reports),
    )


def _judged(recipe: Recipe, reports: Mapping[str, ModelReport]) -> dict[str, bool | None]:
    """Return for each expectation whether it is met; None for those that only a run can tell."""
    values = static_values(reports)
    return {
        f"{key}: {text}": parse_expectation(key, text).evaluate(values) for key, text in recipe.expect.items()
    }


def static_values(reports: Mapping[str, ModelReport]) -> dict[str, float]:
    """Return the figures known before any training, as expectations name them: `MODEL.params` and so on."""
    values: dict[str, float] = {}
    for name, report in reports.items():
        values |= costs(name, report) if report.settled else {}
    return values


def _kind_name(action: Action) -> str:
    return type(action).__name__.lower()


@contextmanager
def _at(loaded: Loaded, path: str) -> Iterator[None]:
    """Give every error raised inside the place in the recipe where it belongs."""
    try:
        yield
    except KronccError as error:
        placed = []
        for problem in error.problems:
            is_full = problem.path.startswith("model.")  # errors of the source know where they belong
            full = problem.path if is_full else ".".join(filter(None, (path, problem.path)))
            placed.append(replace(problem, path=full, place=problem.place or loaded.places.find(full)))
        raise type(error)(problems=placed) from error


def _data_facts(loaded: Loaded, name: str, spec: DataSpec, offline: bool) -> DataFacts | None:
    if offline and is_hub(spec):
        return None
    try:
        with _at(loaded, f"data.{name}"):
            data = open_data(spec, name, loaded.path.parent)
    except DataError as error:
        if offline and error.problems[0].code == NO_FILE:
            return None
        raise
    return DataFacts(data.fingerprint(), data.rows(), data.labels)


def _stage(
    name: str,
    recipe: Recipe,
    effort: Effort,
    facts: Mapping[str, DataFacts | None],
    done: Mapping[str, Stage],
    source: str,
    measured: Measurement | None,
) -> Stage:
    """Return the stage of one step. Its hash covers all that its result depends on."""
    action = recipe.steps[name]
    data = getattr(getattr(action, "calibrate", action), "data", None)
    known = facts.get(data) if data else None
    report = effort.models.reports.get(name)
    options = action.model_dump(mode="json", exclude_none=True)
    before = (measured.name,) if measured else ()
    identity = {
        "kind": KINDS[type(action)],
        "options": {key: value for key, value in options.items() if key not in NO_RESULT},
        "structure": report.structure.model_dump(mode="json", by_alias=True) if report else None,
        "inputs": [done[one].hash if one in done else source for one in (*inputs_of(action), *before)],
        "data": [recipe.data[data].model_dump(mode="json"), known and known.fingerprint] if data else None,
    }
    steps = _steps(action, known, effort.models.blocks.get(name, 0))
    length = recipe.data[data].max_length if data else effort.models.length
    return Stage(
        name=name,
        kind=KINDS[type(action)],
        needs=tuple(dict.fromkeys(one for one in (*inputs_of(action), *before) if one in done)),
        options=options,
        seed=getattr(action, "seed", 0),
        steps=steps,
        flops=effort.training_flops(name, action, steps, length),
        hash=content_hash(identity),
    )


def _steps(action: Action, facts: DataFacts | None, blocks: int) -> int | None:
    """Return the optimiser steps of a training stage; None where it is none or its rows are not known."""
    if isinstance(action, Reconstruct) and facts is not None:
        return blocks * block_steps(action, batch_count(action, facts.rows.get(action.split, 0)))
    if not isinstance(action, Training):
        return None
    if action.max_steps is not None:
        return action.max_steps
    if facts is None or action.epochs is None:
        return None
    batches = math.ceil(facts.rows.get(action.split, 0) / action.batch_size)
    return math.ceil(batches / action.accumulate * action.epochs)
