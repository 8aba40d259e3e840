"""Reading a saved plan, and finding out whether it still holds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kroncc.errors import PlanError
from kroncc.plan.stages import Plan

_SHOWN = 12


def read_plan(path: Path) -> Plan:
    """Return the plan saved at `path`; raise `PlanError` where the file is no plan or of a newer version."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlanError(f"cannot read the plan {path}: {error}", code="K720") from error
    version = value.get("kroncc") if isinstance(value, dict) else None
    if version != 1:
        raise PlanError(
            f"{path} is not a plan of this version",
            code="K721",
            expected='"kroncc": 1',
            remedy="make it again with `kroncc plan RECIPE -o plan.json`, or upgrade kroncc",
        )
    try:
        return Plan.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise PlanError(f"{path} is damaged at {where}: {first['msg']}", code="K722") from error


def write_plan(plan: Plan, path: Path) -> None:
    """Write `plan` to `path`, whole or not at all; `PlanError` K726 where that cannot be done."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(plan.to_json(), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise PlanError(
            f"cannot write the plan to {path}: {error.strerror}",
            code="K726",
            remedy="give another path with -o",
        ) from error


def differences(saved: Any, current: Any, path: str = "") -> Iterator[str]:
    """Yield one line for each place where two JSON values differ: `steps.task.epochs: 5 -> 3`."""
    if isinstance(saved, Mapping) and isinstance(current, Mapping):
        for key in dict.fromkeys([*saved, *current]):
            yield from differences(saved.get(key), current.get(key), f"{path}.{key}" if path else str(key))
    elif saved != current:
        yield f"{path}: {_short(saved)} -> {_short(current)}"


def check_fresh(saved: Plan, current: Plan) -> None:
    """Raise `PlanError` with what changed if `saved` is not what the recipe, model and data give now."""
    changed = [
        *differences(saved.recipe, current.recipe, "recipe"),
        *differences(saved.sources, current.sources, "sources"),
        *differences(saved.versions, current.versions, "versions"),
    ]
    hashes = {stage.name: stage.hash for stage in current.stages}
    if not changed:
        changed = [
            f"stage {s.name} compiles differently" for s in saved.stages if hashes.get(s.name) != s.hash
        ]
    if not changed:
        return
    more = f"\n  ... and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
    raise PlanError(
        "the saved plan no longer holds; changed since:\n  " + "\n  ".join(changed[:_SHOWN]) + more,
        code="K723",
        remedy="make the plan again with `kroncc plan RECIPE -o plan.json`, or apply the recipe itself",
    )


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
