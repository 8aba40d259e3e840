"""The JSON Schema of a recipe file as it is written, for editors (`kroncc schema`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from kroncc.recipe.build import LOSS_KINDS, PassSchemas, loss_schema, schema_of
from kroncc.recipe.schema import STEP_KINDS, Recipe, Scope

DRAFT = "https://json-schema.org/draft/2020-12/schema"
_STEP_NAME = r"^([A-Za-z]|\$\{)[A-Za-z0-9_${}-]*$"
_ENTRIES = {"passes": "pass", "during": "pass", "losses": "loss"}  # lists of - NAME: {...}
_UNFOLDED = ("PassCall", "LossSpec", "Scope")  # written in that short form alone
_VARIABLE = r"\$\{[A-Za-z_][A-Za-z0-9_]*\}"
_NOTES = ("title", "description", "default")
_FOR_EACH = {
    "type": "object",
    "description": "one copy of the step a value; ${name} stands for it in names and text",
    "minProperties": 1,
    "additionalProperties": {
        "type": "array",
        "minItems": 1,
        "items": {"type": ["string", "number", "boolean"]},
    },
}


def recipe_schema(passes: PassSchemas) -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of recipe files, the options of all `passes` included."""
    schema = Recipe.model_json_schema()
    definitions = {name: part for name, part in schema["$defs"].items() if name in ("ModelSpec", "DataSpec")}
    for kind, model in STEP_KINDS.items():
        step = json.loads(json.dumps(schema_of(model)))
        own = step.pop("$defs", {})
        definitions |= {name: part for name, part in own.items() if name not in _UNFOLDED}
        for key in _ENTRIES.keys() & step["properties"].keys():
            step["properties"][key]["items"] = {"$ref": f"#/$defs/{_ENTRIES[key]}"}
        definitions[kind] = step
    definitions["loss"] = _named({kind: dict(loss_schema(kind)) for kind in LOSS_KINDS})
    definitions["pass"] = _named(
        {name: _options(name, passes.schema(name), definitions) for name in passes.names()}
    )
    for name in definitions.keys() - {"ModelSpec", "DataSpec"}:
        definitions[name] = with_variables(definitions[name])
    definitions["step"] = {"oneOf": [_step(kind) for kind in STEP_KINDS]}
    properties = {
        **schema["properties"],
        "steps": {
            "type": "object",
            "propertyNames": {"pattern": _STEP_NAME},
            "additionalProperties": {"$ref": "#/$defs/step"},
        },
        "extends": {"type": "string", "description": "a recipe that this one is laid over"},
    }
    properties["data"] = {**schema["properties"]["data"], "additionalProperties": False}
    return {
        "$schema": DRAFT,
        "title": "kroncc recipe",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "if": {"required": ["extends"]},
        "else": {"required": ["kroncc", "name", "model", "steps"]},
        "$defs": definitions,
    }


def with_variables(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema that takes `${name}` of a `for_each` in place of numbers, true, false, fixed words."""
    grown = {key: _PARTS[key](part) if key in _PARTS else part for key, part in schema.items()}
    kinds = grown.get("type", ())
    if {"integer", "number", "boolean"} & ({kinds} if isinstance(kinds, str) else set(kinds)):
        variable = f"^{_VARIABLE}$"
    elif "enum" in grown or "const" in grown:
        variable = _VARIABLE
    else:
        return grown
    notes: dict[str, Any] = {key: grown.pop(key) for key in _NOTES if key in grown}
    return {"anyOf": [grown, {"type": "string", "pattern": variable}], **notes}


def _each(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [with_variables(part) for part in parts]


def _named_each(parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {name: with_variables(part) for name, part in parts.items()}


def _one(part: dict[str, Any] | bool) -> dict[str, Any] | bool:
    return with_variables(part) if isinstance(part, dict) else part


_PARTS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("anyOf", "oneOf", "allOf", "prefixItems"), _each),
    **dict.fromkeys(("properties", "patternProperties"), _named_each),
    **dict.fromkeys(("items", "additionalProperties"), _one),
}
"""What stands below a schema, by keyword."""


def _step(kind: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {kind: {"$ref": f"#/$defs/{kind}"}, "for_each": _FOR_EACH},
        "required": [kind],
        "additionalProperties": False,
    }


def _named(options: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the schema of an entry written `- NAME: {...}`, or `- NAME` alone."""
    one = {
        "type": "object",
        "properties": {name: {"anyOf": [part, {"type": "null"}]} for name, part in options.items()},
        "minProperties": 1,
        "maxProperties": 1,
        "additionalProperties": False,
    }
    return {"anyOf": [one, {"enum": sorted(options)}]}


def _options(name: str, schema: Mapping[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Return a pass's options together with the scope keys; its own definitions move to the top."""
    text = json.dumps(schema).replace('"#/$defs/', f'"#/$defs/{name}.')
    own = json.loads(text)
    definitions.update({f"{name}.{key}": part for key, part in own.pop("$defs", {}).items()})
    own["properties"] = {**own.get("properties", {}), **Scope.model_json_schema()["properties"]}
    return dict(own)
