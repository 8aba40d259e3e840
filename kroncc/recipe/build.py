"""From nodes to the recipe's models: unfold short forms, check shapes, keep all faults."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from kroncc.errors import KronccError, Problem, did_you_mean
from kroncc.recipe.node import Node, Path, PlaceMap, text_of
from kroncc.recipe.schema import (
    SCOPE_KEYS,
    STEP_KINDS,
    Action,
    DataSpec,
    LossSpec,
    ModelSpec,
    Recipe,
    Scope,
)
from kroncc.recipe.shape import Fault, Schema, faults, shown

LOSS_KINDS: tuple[str, ...] = get_args(LossSpec.model_fields["kind"].annotation)
MAX_PROBLEMS = 200
M = TypeVar("M", bound=BaseModel)


class PassSchemas(Protocol):
    """What the loader asks of the installed passes; `kroncc.rewrite.registry.schemas()` gives it."""

    def names(self) -> list[str]:
        """Return the names of all passes."""

    def schema(self, name: str) -> Mapping[str, Any]:
        """Return the JSON Schema of a pass's options; raise `PassError` if there is no such pass."""


class TooManyProblems(Exception):
    """Looking for more problems is of no use; the draft has those found so far."""


@dataclass
class Draft:
    """A recipe on the way: the parts that are right so far, and every problem."""

    places: PlaceMap
    passes: PassSchemas | None
    problems: list[Problem] = field(default_factory=list)
    model: ModelSpec | None = None
    data: dict[str, DataSpec] = field(default_factory=dict)
    steps: dict[str, Action] = field(default_factory=dict)
    bodies: dict[str, tuple[str, dict[str, Any]]] = field(default_factory=dict)
    """Kind and body of each step as written, where it has one kind: what names are checked on."""
    expect: dict[str, str] = field(default_factory=dict)
    written_data: tuple[str, ...] = ()  # also those with faults, so that their names are known
    written_steps: tuple[str, ...] = ()

    def note(
        self, code: str, path: Path, message: str, expected: str = "", remedy: str = "", at_key: bool = False
    ) -> None:
        """Keep a problem at `path`."""
        text = text_of(path)
        place = self.places.find_key(text) if at_key else self.places.find(text)
        self.problems.append(Problem(code, message, place, text, expected, remedy))
        if len(self.problems) >= MAX_PROBLEMS:
            raise TooManyProblems

    def check(self, value: Any, schema: Schema, path: Path) -> bool:
        """Keep the faults of `value` at `path`; say whether there were none."""
        before = len(self.problems)
        for fault in faults(value, schema):
            self._note_fault(fault, path)
        return len(self.problems) == before

    def _note_fault(self, fault: Fault, path: Path) -> None:
        full = path + fault.path
        self.note(fault.code, full, fault.message, fault.expected, fault.remedy, fault.is_key)

    def make(self, kind: type[M], value: Any, path: Path, schema: Schema | None = None) -> M | None:
        """Return `value` as a model, or None with its problems kept."""
        if not self.check(value, schema or schema_of(kind), path):
            return None
        try:
            # strict: "3" is no number; as JSON, because there lists may become tuples
            return kind.model_validate_json(json.dumps(value), strict=True)
        except ValidationError as error:
            for one in error.errors(include_url=False):
                message = str(one.get("ctx", {}).get("error", one["msg"]))
                self.note("K135", path, message, "keys that go together")
            return None


@lru_cache(maxsize=32)
def schema_of(kind: type[BaseModel]) -> Schema:
    """Return the JSON Schema of one part of the recipe as it is written, before short forms are unfolded."""
    schema = kind.model_json_schema()
    for key in LISTS.keys() & schema["properties"].keys():
        schema["properties"][key]["items"] = {}
    return schema


@lru_cache(maxsize=1)
def _outline() -> Schema:
    """The top of a recipe; what is inside its parts is checked part by part."""
    schema = Recipe.model_json_schema()
    named = {key: schema["properties"][key] for key in ("data", "steps")}
    parts = {
        key: {**part, "patternProperties": {pattern: {} for pattern in part["patternProperties"]}}
        for key, part in named.items()
    }
    properties = {**schema["properties"], **parts, "model": {"type": "object"}, "kroncc": {}}
    return {**schema, "properties": properties, "required": ["name", "model", "steps"]}


def build(root: Node, draft: Draft) -> None:
    """Fill `draft` from a composed recipe, and note its problems of shape (K130-K150, K41x)."""
    value = root.plain()
    draft.check(value, _outline(), ())
    _check_version(draft, value)
    if isinstance(value.get("model"), dict):
        draft.model = draft.make(ModelSpec, value["model"], ("model",))
    data = _mapping(value.get("data"))
    steps = _mapping(value.get("steps"))
    draft.written_data, draft.written_steps = tuple(data), tuple(steps)
    for name, part in data.items():
        spec = draft.make(DataSpec, part, ("data", name))
        if spec:
            draft.data[name] = spec
    for name, part in steps.items():
        action = _step(draft, part, ("steps", name))
        if action:
            draft.steps[name] = action
    draft.expect = {key: text for key, text in _mapping(value.get("expect")).items() if isinstance(text, str)}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _check_version(draft: Draft, value: dict[str, Any]) -> None:
    version = value.get("kroncc")
    if "kroncc" not in value:
        draft.note("K131", (), "the key 'kroncc' is missing", "kroncc: 1 (the version of the recipe schema)")
    elif isinstance(version, bool) or version != 1:
        newer = isinstance(version, int | float) and version > 1
        remedy = "upgrade kroncc" if newer else "write kroncc: 1"
        draft.note(
            "K136", ("kroncc",), f"this kroncc does not read recipe schema {shown(version)}", "1", remedy
        )


def _step(draft: Draft, part: Any, path: Path) -> Action | None:
    """Return the action of `{KIND: {...}}`."""
    expected = f"one of {', '.join(STEP_KINDS)}, and what it does"
    if not isinstance(part, dict):
        draft.note("K142", path, f"the step is {shown(part)}", expected)
        return None
    unknown = [key for key in part if key not in STEP_KINDS]
    for key in unknown:
        remedy = did_you_mean(key, [*STEP_KINDS, "for_each"])
        draft.note("K140", (*path, key), f"no kind of step is called {key!r}", expected, remedy, at_key=True)
    kinds = [key for key in part if key in STEP_KINDS]
    if len(kinds) > 1 or not (kinds or unknown):
        message = f"the step has {len(kinds)} kinds: {', '.join(kinds)}" if kinds else "the step has no kind"
        draft.note("K141", path, message, expected, "make each kind a step of its own" if kinds else "")
    if len(kinds) != 1 or unknown:
        return None
    kind, body = kinds[0], part[kinds[0]]
    if isinstance(body, dict):
        draft.bodies[str(path[-1])] = (kind, body)
    if isinstance(body, dict):
        body = _unfold(draft, body, (*path, kind))
    return None if body is None else draft.make(STEP_KINDS[kind], body, (*path, kind))


def _unfold(draft: Draft, body: dict[str, Any], path: Path) -> dict[str, Any] | None:
    """Unfold the entries of lists written `- NAME: {...}`; None where one of them is wrong."""
    step = STEP_KINDS[str(path[-1])]
    listed = [key for key in LISTS if key in step.model_fields and isinstance(body.get(key), list)]
    before = len(draft.problems)
    unfolded = {
        key: [_entry(draft, entry, (*path, key, index), LISTS[key]) for index, entry in enumerate(body[key])]
        for key in listed
    }
    if len(draft.problems) == before:
        return {**body, **unfolded}
    draft.check({**body, **{key: [{}] for key in listed}}, schema_of(step), path)
    return None


def _entry(draft: Draft, entry: Any, path: Path, one: Any) -> Any:
    """Return one unfolded entry. `- NAME` alone is short for `- NAME: {}`."""
    if isinstance(entry, str):
        entry = {entry: {}}
    what = "a loss" if one is _loss else "a pass"
    example = "- mse: {at: hidden}" if one is _loss else "- kronecker: {targets: [...], ...}"
    if not isinstance(entry, dict) or len(entry) != 1:
        found = f"{len(entry)} names: {', '.join(entry)}" if isinstance(entry, dict) else shown(entry)
        draft.note("K146", path, f"{what} has one name, this is {found}", example)
        return None
    name, body = next(iter(entry.items()))
    if body is None:
        body = {}
    if not isinstance(body, dict):
        draft.note("K132", (*path, name), f"{shown(body)} is no mapping of options", example)
        return None
    return one(draft, name, body, (*path, name))


def _pass_call(draft: Draft, name: str, body: dict[str, Any], path: Path) -> Any:
    scope = {key: body[key] for key in SCOPE_KEYS if key in body}
    options = {key: value for key, value in body.items() if key not in SCOPE_KEYS}
    own = schema_of(Scope)
    if draft.passes is None:
        draft.check(scope, own, path)
        return {"name": name, "scope": scope, "options": options}
    try:
        schema = draft.passes.schema(name)
    except KronccError as error:
        for problem in error.problems:
            draft.note(problem.code, path, problem.message, problem.expected, problem.remedy, at_key=True)
        draft.check(scope, own, path)
        return None
    properties = {**schema.get("properties", {}), **own["properties"]}
    draft.check(body, {**schema, "properties": properties}, path)
    return {"name": name, "scope": scope, "options": options}


def _loss(draft: Draft, kind: str, body: dict[str, Any], path: Path) -> Any:
    if kind not in LOSS_KINDS:
        remedy = did_you_mean(kind, LOSS_KINDS)
        draft.note("K150", path, f"no loss is called {kind!r}", ", ".join(LOSS_KINDS), remedy, at_key=True)
        return None
    draft.check(body, loss_schema(kind), path)
    usual = {"at": "attention.values"} if kind == "relation" else {}
    return {"kind": kind, **usual, **body}


@lru_cache(maxsize=16)
def loss_schema(kind: str) -> Schema:
    """Return the schema of a loss's options: those that mean something for its kind."""
    schema = LossSpec.model_json_schema()
    unused = {"kind", *({"at", "temperature", "layers"} if kind == "task" else ())}
    if kind not in ("kl", "soft-ce"):
        unused.add("temperature")
    if kind != "relation":
        unused.add("heads")
    properties = {key: part for key, part in schema["properties"].items() if key not in unused}
    return {**schema, "properties": properties, "required": []}


LISTS: Mapping[str, Any] = {"passes": _pass_call, "losses": _loss, "during": _pass_call}
"""Lists of a step that are written `- NAME: {...}`, and what unfolds one entry."""
