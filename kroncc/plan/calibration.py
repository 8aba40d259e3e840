"""The `calibrate` stages of a plan: one for all compress steps that measure one model on the same rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kroncc.hashing import content_hash
from kroncc.plan.effort import Effort
from kroncc.plan.preflight import DataFacts
from kroncc.plan.stages import Stage
from kroncc.recipe.schema import CalibrationSpec, Compress, Recipe
from kroncc.rewrite.base import Calibration
from kroncc.rewrite.demands import Requests, dump_requests


@dataclass
class Measurement:
    """One calibrate stage to be: its name, the model, the rows, and what every step asks for, by module."""

    name: str
    model: str
    spec: CalibrationSpec
    requests: dict[str, Calibration] = field(default_factory=dict)


def measurements(recipe: Recipe, demands: Mapping[str, Requests]) -> dict[str, Measurement]:
    """Return the measurement of each step that needs one; `demands` holds the requests of compress steps.

    The first of a model is called `MODEL.calibrate`, those with other rows `MODEL.calibrate-2` and so on: no
    step's name has a dot.
    """
    found: dict[tuple[str, str], Measurement] = {}
    by_step: dict[str, Measurement] = {}
    for step, requests in demands.items():
        action = recipe.steps[step]
        if not (requests and isinstance(action, Compress) and action.calibrate):
            continue
        key = action.model, action.calibrate.model_dump_json()
        if key not in found:
            count = sum(one.model == action.model for one in found.values()) + 1
            name = f"{action.model}.calibrate" + (f"-{count}" if count > 1 else "")
            found[key] = Measurement(name, action.model, action.calibrate)
        one = by_step[step] = found[key]
        for fqn, request in requests.items():
            one.requests[fqn] = one.requests.get(fqn, Calibration()) | request
    return by_step


def calibrate_stage(
    one: Measurement,
    recipe: Recipe,
    effort: Effort,
    facts: Mapping[str, DataFacts | None],
    done: Mapping[str, Stage],
    source: str,
) -> Stage:
    """Return the stage of a measurement. Its hash covers the model, the rows and the requests."""
    known = facts[one.spec.data]
    options = {
        "model": one.model,
        "calibrate": one.spec.model_dump(mode="json"),
        "requests": dump_requests(one.requests),
    }
    identity = {
        "kind": "calibrate",
        "options": options,
        "task": effort.models.task,
        "inputs": [done[one.model].hash if one.model in done else source],
        "data": [recipe.data[one.spec.data].model_dump(mode="json"), known and known.fingerprint],
    }
    backward = any(request.fisher or request.saliency for request in one.requests.values())
    rows = None if known is None else min(one.spec.rows, known.rows.get(one.spec.split, 0))
    return Stage(
        name=one.name,
        kind="calibrate",
        needs=(one.model,) if one.model in done else (),
        options=options,
        seed=one.spec.seed,
        flops=effort.measuring_flops(one.model, rows, recipe.data[one.spec.data].max_length, backward),
        hash=content_hash(identity),
    )
