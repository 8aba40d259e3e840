"""The plan as data: stages with resolved options, costs and content hashes; serialised as `plan.json`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from kroncc.rewrite.structure import Structure

StageKind = Literal["calibrate", "rewrite", "train", "reconstruct", "evaluate", "export"]


class Frozen(BaseModel):
    """Base of the plan's models."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Side(Frozen):
    """One module before or after: shape as text, parameters, FLOPs for one sequence."""

    shape: str
    params: int
    flops: int


class ModuleRow(Frozen):
    """One module of a model: what it was and what it is now."""

    fqn: str
    role: str = ""
    passes: str = Field("", alias="pass")  # names in order, joined by " + "; empty where nothing was done
    before: Side
    after: Side


class SkippedRow(Frozen):
    """A module that a target matched and a pass left alone."""

    fqn: str
    name: str = Field(alias="pass")
    reason: str


class Flops(Frozen):
    """FLOPs of one sequence: the linear maps alone, and everything counted."""

    linear: int
    total: int


class ModelReport(Frozen):
    """What the plan knows of one model of the recipe (`base`, or the name of the step that makes it)."""

    params: int
    bytes: int
    flops: Flops
    labels: int | None = None
    settled: bool = True  # false: weights or data decide on shapes, so these figures are an estimate
    structure: Structure = Structure()
    modules: tuple[ModuleRow, ...] = ()
    skipped: tuple[SkippedRow, ...] = ()


def costs(name: str, report: ModelReport) -> dict[str, float]:
    """Return what a model costs, as expectations name it: `NAME.params` and so on."""
    return {
        f"{name}.params": report.params,
        f"{name}.bytes": report.bytes,
        f"{name}.flops": report.flops.total,
        f"{name}.flops.total": report.flops.total,
        f"{name}.flops.linear": report.flops.linear,
    }


class Stage(Frozen):
    """One node of the DAG. `options` is the resolved step; `needs` names the stages it waits for."""

    name: str
    kind: StageKind
    needs: tuple[str, ...]
    options: dict[str, Any]
    seed: int = 0
    steps: int | None = None  # optimiser steps, where the data is at hand
    flops: int | None = None  # estimated FLOPs of the whole stage
    hash: str


class Plan(Frozen):
    """A compiled recipe."""

    kroncc: Literal[1] = 1
    name: str
    recipe: dict[str, Any]  # resolved: extends, --set and for_each applied
    file: str | None = None  # the recipe's file, relative to where the plan is saved
    overrides: tuple[str, ...] = ()
    length: int  # tokens of the sequence that FLOPs are counted for
    versions: dict[str, str]
    sources: dict[str, str | None]  # fingerprints of model and data; None where they could not be read
    stages: tuple[Stage, ...]
    models: dict[str, ModelReport]
    expectations: dict[str, bool | None] = Field(default_factory=dict)  # None: known only after a run

    def saved_in(self, directory: Path, recipe: Path, overrides: tuple[str, ...]) -> Plan:
        """Return the plan with the way from `directory`, where it is saved, to its recipe."""
        file = os.path.relpath(recipe.resolve(), directory.resolve())
        return self.model_copy(update={"file": file, "overrides": overrides})

    def to_json(self) -> str:
        """Return the plan as text, the same bytes for the same plan; steps and models stay in their order."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), indent=1) + "\n"
