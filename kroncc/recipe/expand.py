"""`for_each`: a step written once becomes one a value, with `${variable}` replaced in names and text."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from kroncc.errors import Place, Problem, did_you_mean
from kroncc.recipe.node import Node, Path, Scalar, kind_of, text_of

MAX_STEPS = 1000
MAX_SIZE = 200_000
MAX_VALUE = 100
KEY = "for_each"

_VARIABLE = re.compile(r"\$\{([^{}]*)\}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)


@dataclass(frozen=True)
class Expanded:
    """A recipe without `for_each`, the template each step came from, and what was wrong."""

    root: Node
    templates: Mapping[str, str]
    problems: tuple[Problem, ...]


def expand_steps(root: Node) -> Expanded:
    """Return the recipe with every `for_each` step replaced by its copies, in place.

    Several variables make all combinations. Text that is nothing but `${v}` takes the value itself: a number
    stays one. Problems: K108 (variables make two keys equal), K125 (`for_each` is malformed), K126 (a
    variable is missing in the step's name), K127 (no such variable), K128 (two steps of one name), K129 (too
    many).
    """
    problems: list[Problem] = []
    outside = replace(root, value={key: node for key, node in root.children.items() if key != "steps"})
    _check_variables(outside, (), {}, problems)
    steps = root.children.get("steps")
    if steps is None or not isinstance(steps.value, dict):
        return Expanded(root, {}, tuple(problems))
    found: dict[str, Node] = {}
    templates: dict[str, str] = {}
    room = MAX_SIZE
    for template, step in steps.value.items():
        size = _size(step)
        values = _combinations(template, step, min(MAX_STEPS - len(found), room // size), problems)
        room -= size * len(values)
        for variables in values:
            name, copy = _copy(template, step, variables, problems)
            if name in found:
                problems.append(_twice(template, templates[name], name, step))
            found[name] = copy
            templates[name] = template
    expanded = replace(root, value={**root.children, "steps": replace(steps, value=found)})
    return Expanded(expanded, templates, tuple(dict.fromkeys(problems)))


def _size(step: Node) -> int:
    texts = (len(node.value) if isinstance(node.value, str) else 0 for _, node in step.walk())
    return sum(1 + length // 20 for length in texts)


def _combinations(template: str, step: Node, room: int, problems: list[Problem]) -> list[dict[str, Scalar]]:
    """Return the values of each copy of a step: one empty mapping for a step without `for_each`.

    Where the names would be equal or the copies too many, one copy is left, so that those who name it are not
    blamed too.
    """
    asked = step.children.get(KEY)
    path = ("steps", template, KEY)
    if asked is None:
        return [{}]
    malformed = _malformed(asked, path)
    if malformed:
        problems.append(malformed)
        return []
    columns = [[item.value for item in child.items] for child in asked.children.values()]
    count = math.prod(len(column) for column in columns)
    expected = f"at most {MAX_STEPS} steps"
    problem = _nameless(template, asked, path)
    if count > room:
        problem = _problem("K129", f"for_each makes {count} copies", asked, path, expected)
    if problem:
        problems.append(problem)
        columns = [column[:1] for column in columns]
    return [dict(zip(asked.children, row, strict=True)) for row in itertools.product(*columns)]  # type: ignore[arg-type]


def _malformed(asked: Node, path: Path) -> Problem | None:
    example = "for_each: {task: [sst2, mrpc]}"
    if not asked.children:
        return _problem("K125", f"for_each is {kind_of(asked.value)}", asked, path, example)
    for name, child in asked.children.items():
        if not _NAME.fullmatch(name):
            return _problem(
                "K125", f"{name!r} is not a variable's name", child, (*path, name), "letters, digits, _"
            )
        if not child.items or not all(_is_short(item.value) for item in child.items):
            return _problem("K125", f"{name!r} takes no list of plain values", child, (*path, name), example)
    return None


def _is_short(value: object) -> bool:
    return isinstance(value, str | int | float) and len(str(value)) <= MAX_VALUE


def _nameless(template: str, asked: Node, path: Path) -> Problem | None:
    used = set(_VARIABLE.findall(template))
    missing = [name for name in asked.children if name not in used]
    if not missing:
        return None
    shown = "-".join([template, *(f"${{{name}}}" for name in missing)])
    return _problem(
        "K126", f"the copies of step {template!r} would have one name", asked, path, f"a name such as {shown}"
    )


def _copy(
    template: str, step: Node, variables: Mapping[str, Scalar], problems: list[Problem]
) -> tuple[str, Node]:
    body = (
        replace(step, value={k: v for k, v in step.children.items() if k != KEY}) if step.children else step
    )
    path = ("steps", template)
    _check_text(template, step.key or step.place, path, variables, problems)
    _check_variables(body, path, variables, problems)
    return _fill_text(template, variables), _fill(body, variables)


def _fill(node: Node, variables: Mapping[str, Scalar]) -> Node:
    if isinstance(node.value, dict):
        filled = {_fill_text(key, variables): _fill(child, variables) for key, child in node.value.items()}
        return replace(node, value=filled)
    if isinstance(node.value, list):
        return replace(node, value=[_fill(child, variables) for child in node.value])
    if not isinstance(node.value, str) or "${" not in node.value:
        return node
    whole = _VARIABLE.fullmatch(node.value)
    if whole and whole[1] in variables:
        return replace(node, value=variables[whole[1]])
    return replace(node, value=_fill_text(node.value, variables))


def _fill_text(text: str, variables: Mapping[str, Scalar]) -> str:
    return _VARIABLE.sub(lambda found: _shown(variables.get(found[1], found[0])), text)


def _shown(value: Scalar) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _check_variables(
    node: Node, path: Path, variables: Mapping[str, Scalar], problems: list[Problem]
) -> None:
    for below, child in node.walk():
        here = (*path, *below)
        for key, entry in child.children.items():
            _check_text(key, entry.key or entry.place, (*here, key), variables, problems)
        if len({_fill_text(key, variables) for key in child.children}) < len(child.children):
            problems.append(_problem("K108", "variables make two keys equal", child, here, "each key once"))
        if isinstance(child.value, str):
            _check_text(child.value, child.place, here, variables, problems)


def _check_text(
    text: str, place: Place, path: Path, variables: Mapping[str, Scalar], problems: list[Problem]
) -> None:
    for name in _VARIABLE.findall(text) if "${" in text else ():
        if name in variables:
            continue
        remedy = did_you_mean(name, variables) or f"add for_each: {{{name}: [...]}} to the step that uses it"
        expected = (
            "a variable of the step's for_each" if path[:1] == ("steps",) else "no variable outside of steps"
        )
        message = f"no variable is called {name!r}"
        problems.append(Problem("K127", message, place, text_of(path), expected, remedy))


def _twice(template: str, other: str, name: str, step: Node) -> Problem:
    return _problem(
        "K128",
        f"the steps {other!r} and {template!r} both make a step {name!r}",
        step,
        ("steps", template),
        "each name once",
    )


def _problem(code: str, message: str, node: Node, path: Path, expected: str, remedy: str = "") -> Problem:
    is_text = isinstance(node.value, str)
    place = node.place if is_text else node.key or node.place
    return Problem(code, message, place, text_of(path), expected, remedy)
