"""Check a plain value against a JSON Schema, in plain words.

Knows the keywords that pydantic writes; any other keyword is passed over (the pydantic model that the schema
comes from has the last word). The same code checks the recipe's own keys and the options of passes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kroncc.errors import did_you_mean, nearest
from kroncc.recipe.node import Path, kind_of

Schema = Mapping[str, Any]


@dataclass(frozen=True)
class Fault:
    """One thing that does not fit: where (below the checked value), and whether the key itself is wrong."""

    code: str
    path: Path
    message: str
    expected: str = ""
    remedy: str = ""
    is_key: bool = False


def faults(value: Any, schema: Schema) -> Iterator[Fault]:
    """Yield all that is wrong with `value`.

    K130 unknown key, K131 missing key, K132 wrong type, K133 not one of the allowed values, K134 outside of
    the allowed range, length or pattern, K135 keys that exclude each other, K137 a key that is no good name.
    """
    yield from _faults(value, schema, (), schema)


def _faults(value: Any, schema: Schema, path: Path, root: Schema) -> Iterator[Fault]:
    schema = _resolved(schema, root)
    for part in schema.get("allOf", ()):
        yield from _faults(value, part, path, root)
    choices = schema.get("anyOf") or schema.get("oneOf")
    if choices and "properties" not in schema:
        yield from _union(value, choices, schema, path, root)
        return
    allowed = schema["enum"] if "enum" in schema else [schema["const"]] if "const" in schema else None
    if allowed is not None:
        yield from _enum(value, allowed, path)
        return
    if not fits_type(value, schema.get("type")):
        yield _wrong_type(value, schema, path, root)
        return
    yield from _bounds(value, schema, path)
    if isinstance(value, Mapping):
        wrong = list(_object(value, schema, path, root))
        yield from wrong or _together(value, schema, path)
    elif isinstance(value, list):
        yield from _array(value, schema, path, root)


def _resolved(schema: Schema, root: Schema) -> Schema:
    """Follow `$ref`s of the form #/$defs/Name."""
    for _ in range(20):
        reference = schema.get("$ref")
        if reference is None:
            return schema
        schema = root.get("$defs", {}).get(str(reference).rpartition("/")[2], {})
    return {}


def _union(value: Any, choices: list[Schema], schema: Schema, path: Path, root: Schema) -> Iterator[Fault]:
    """Report the branch whose type fits, if it is one alone; else what the union as a whole expects."""
    tried = [list(_faults(value, choice, path, root)) for choice in choices]
    if not all(tried):
        return
    inside = [found for found in tried if any(fault.path != path or fault.code == "K134" for fault in found)]
    if len(inside) == 1:
        yield from inside[0]
    else:
        yield _wrong_type(value, schema, path, root)


def _enum(value: Any, allowed: list[Any], path: Path) -> Iterator[Fault]:
    if any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
        return
    words = [one for one in allowed if isinstance(one, str)]
    remedy = did_you_mean(value, words) if isinstance(value, str) and words else ""
    yield Fault("K133", path, f"{shown(value)} is not allowed here", _listing(allowed), remedy)


_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "object": (dict,),
    "array": (list,),
    "null": (type(None),),
}


def fits_type(value: Any, name: str | list[str] | None) -> bool:
    """Say whether `value` is of a JSON Schema type; a whole number is a number, true is neither."""
    if name is None:
        return True
    if isinstance(name, list):
        return any(fits_type(value, one) for one in name)
    if isinstance(value, bool):
        return name == "boolean"
    return isinstance(value, _TYPES.get(name, ()))


def _wrong_type(value: Any, schema: Schema, path: Path, root: Schema) -> Fault:
    remedy = ""
    wants = _types(schema, root)
    if isinstance(value, str) and wants & {"integer", "number"}:
        remedy = "a number has no quotes and no leading zero"
    elif isinstance(value, str) and "boolean" in wants:
        remedy = "write true or false"
    elif "string" in wants and not isinstance(value, Mapping | list):
        remedy = "put text that reads as something else in quotes"
    return Fault("K132", path, f"{shown(value)} is {kind_of(value)}", describe(schema, root), remedy)


def _types(schema: Schema, root: Schema) -> set[str]:
    schema = _resolved(schema, root)
    found = {schema["type"]} if isinstance(schema.get("type"), str) else set(schema.get("type", ()))
    for choice in schema.get("anyOf") or schema.get("oneOf") or ():
        found |= _types(choice, root)
    return found


def _bounds(value: Any, schema: Schema, path: Path) -> Iterator[Fault]:
    wrong = False
    if isinstance(value, int | float) and not isinstance(value, bool):
        wrong = not math.isfinite(value) or any(
            limit in schema and not fits(value, schema[limit]) for limit, (_, fits) in _LIMITS.items()
        )
    elif isinstance(value, str):
        wrong = not _in(len(value), schema, "minLength", "maxLength") or not re.search(
            schema.get("pattern", ""), value
        )
    elif isinstance(value, list):
        wrong = not _in(len(value), schema, "minItems", "maxItems")
    if wrong:
        yield Fault("K134", path, f"{shown(value)} does not fit", _range(schema) or "a finite number")


_LIMITS: dict[str, tuple[str, Any]] = {
    "minimum": ("at least", lambda value, limit: value >= limit),
    "exclusiveMinimum": ("above", lambda value, limit: value > limit),
    "maximum": ("at most", lambda value, limit: value <= limit),
    "exclusiveMaximum": ("below", lambda value, limit: value < limit),
    "multipleOf": ("a multiple of", lambda value, limit: value % limit == 0),
}


def _in(size: int, schema: Schema, low: str, high: str) -> bool:
    return bool(schema.get(low, 0) <= size <= schema.get(high, math.inf))


def _object(value: Mapping[str, Any], schema: Schema, path: Path, root: Schema) -> Iterator[Fault]:
    known: Schema = schema.get("properties", {})
    patterns: Schema = schema.get("patternProperties", {})
    others = schema.get("additionalProperties", True)
    for key, child in value.items():
        here = (*path, key)
        matched = [part for pattern, part in patterns.items() if re.search(pattern, key)]
        name = schema.get("propertyNames", {})
        if (patterns and key not in known and not matched) or any(_faults(key, name, here, root)):
            expected = _range({"pattern": " or ".join(patterns), **name})
            yield Fault("K137", here, f"{shown(key)} is not a good name", f"a name {expected}", is_key=True)
        elif key in known:
            yield from _faults(child, known[key], here, root)
        elif matched:
            yield from _faults(child, matched[0], here, root)
        elif others is False:
            message = f"unknown key {shown(key)}"
            remedy = did_you_mean(key, known) if nearest(key, known) else ""
            yield Fault("K130", here, message, ", ".join(known) or "no keys", remedy, is_key=True)
        elif isinstance(others, Mapping):
            yield from _faults(child, others, here, root)
    for key in schema.get("required", ()):
        if key not in value:
            wanted = describe(known.get(key, {}), root)
            yield Fault("K131", path, f"the key {key!r} is missing", f"{key}: {wanted}")


def _together(value: Mapping[str, Any], schema: Schema, path: Path) -> Iterator[Fault]:
    """Check the rule that exactly one of several ways is taken, each a key or any of several."""
    ways = schema.get("oneOf", ()) if "properties" in schema else ()
    if ways and sum(_is_taken(value, way) for way in ways) != 1:
        message = f"give exactly one of: {'; '.join(map(_way, ways))}"
        yield Fault("K135", path, message, "keys that go together")


def _is_taken(value: Mapping[str, Any], way: Schema) -> bool:
    if "anyOf" in way:
        return any(_is_taken(value, one) for one in way["anyOf"])
    return all(value.get(key) is not None for key in way.get("required", ()))


def _way(way: Schema) -> str:
    if "anyOf" in way:
        return " and/or ".join(_way(one) for one in way["anyOf"])
    return " and ".join(f"`{key}`" for key in way.get("required", ()))


def _array(value: list[Any], schema: Schema, path: Path, root: Schema) -> Iterator[Fault]:
    first = schema.get("prefixItems", [])
    rest = schema.get("items", {})
    for index, child in enumerate(value):
        part = first[index] if index < len(first) else rest
        if isinstance(part, Mapping):
            yield from _faults(child, part, (*path, index), root)


def describe(schema: Schema, root: Schema) -> str:
    """Return what a schema expects in plain words: a whole number above 0, or a mapping to text."""
    schema = _resolved(schema, root)
    choices = schema.get("anyOf") or schema.get("oneOf")
    if choices:
        parts = dict.fromkeys(describe(one, root) for one in choices if one.get("type") != "null")
        return ", or ".join(parts)
    if "enum" in schema or "const" in schema:
        return _listing(schema.get("enum") or [schema.get("const")])
    kind = schema.get("type")
    if kind == "array" and schema.get("prefixItems"):
        return f"a list [{', '.join(describe(part, root) for part in schema['prefixItems'])}]"
    if kind == "array" and isinstance(schema.get("items"), Mapping):
        return f"a list ({describe(schema['items'], root)} each)"
    if kind == "object" and isinstance(schema.get("additionalProperties"), Mapping):
        return f"a mapping (to {describe(schema['additionalProperties'], root)})"
    names = {"string": "text", "integer": "a whole number", "number": "a number", "boolean": "true or false"}
    plain = {**names, "object": "a mapping", "array": "a list", "null": "nothing"}.get(str(kind), "a value")
    return " ".join(part for part in (plain, _range(schema)) if part)


def _range(schema: Schema) -> str:
    parts = [f"{word} {schema[limit]:g}" for limit, (word, _) in _LIMITS.items() if limit in schema]
    if "pattern" in schema:
        parts.append(f"matching {schema['pattern']}")
    for low, high, unit in (("minLength", "maxLength", "characters"), ("minItems", "maxItems", "entries")):
        if low in schema or high in schema:
            ends = {"at least": schema.get(low), "at most": schema.get(high)}
            both = " and ".join(f"{word} {end}" for word, end in ends.items() if end is not None)
            parts.append(f"{schema[low]} {unit}" if schema.get(low) == schema.get(high) else f"{both} {unit}")
    return ", ".join(parts)


def _listing(allowed: list[Any]) -> str:
    words = [shown(one) for one in allowed]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + f" or {words[-1]}"


def shown(value: Any) -> str:
    """Return a value as one short piece of a message."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
