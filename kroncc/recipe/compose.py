"""Composition of recipes before anything is checked: `extends`, then `--set`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from kroncc.errors import Place, Problem, RecipeError, did_you_mean
from kroncc.recipe.node import Node, kind_of
from kroncc.recipe.reader import read_file, read_yaml

MAX_CHAIN = 20
_SEGMENT = re.compile(r"(?P<name>[^\[\]]*)(?P<indices>(\[\d{1,6}\])*)")


def merge(below: Node, above: Node) -> Node:
    """Return `above` laid over `below`: mappings join key by key, anything else is replaced."""
    if not (isinstance(below.value, dict) and isinstance(above.value, dict)):
        return above
    joined = dict(below.value)
    for key, child in above.value.items():
        joined[key] = merge(joined[key], child) if key in joined else child
    return replace(above, value=joined)


def read_extended(root: Node, path: Path, display: str) -> Node:
    """Return `root` laid over the recipe that it extends, and so on down the chain.

    Names are relative to the file that says `extends`. Raises `RecipeError` K120 (not a file name), K121 (a
    circle or too long a chain), and what reading the other file raises.
    """
    layers, seen = [root], [path.resolve()]
    while (asked := layers[-1].children.get("extends")) is not None:
        if not isinstance(asked.value, str) or not asked.value:
            raise RecipeError(
                f"extends is {kind_of(asked.value)}",
                code="K120",
                place=asked.place,
                path="extends",
                expected="a file name",
            )
        path, display = path.parent / asked.value, str(Path(display).parent / asked.value)
        if path.resolve() in seen or len(seen) == MAX_CHAIN:
            chain = " -> ".join(one.name for one in [*seen, path])
            raise RecipeError(
                f"extends goes in a circle: {chain}"
                if len(seen) < MAX_CHAIN
                else f"extends goes too deep: {chain}",
                code="K121",
                place=asked.place,
                path="extends",
                expected=f"a chain of at most {MAX_CHAIN} files that ends",
            )
        seen.append(path.resolve())
        layers.append(_read_layer(path, display, asked.place))
    merged = layers.pop()
    while layers:
        merged = merge(merged, layers.pop())
    return replace(merged, value={key: node for key, node in merged.children.items() if key != "extends"})


def _read_layer(path: Path, display: str, asked: Place) -> Node:
    try:
        text = read_file(path)
    except RecipeError as error:
        problems = [
            replace(problem, message=f"{display}: {problem.message}", place=asked)
            for problem in error.problems
        ]
        raise RecipeError(problems=problems) from error
    return as_mapping(read_yaml(text, display))


def as_mapping(root: Node) -> Node:
    """Return `root` if it is a mapping; raise `RecipeError` K107 if not."""
    if isinstance(root.value, dict):
        return root
    raise RecipeError(
        f"the recipe is {root.kind()}",
        code="K107",
        place=root.place,
        expected="a mapping: kroncc: 1, name: ...",
    )


Override = tuple[str, Node]


def parse_override(text: str) -> Override:
    """Return the path and the value of `PATH=VALUE`; the value is YAML. Raises `RecipeError` K122."""
    path, equals, value = text.partition("=")
    place = Place(f"--set {text}" if len(text) <= 80 else f"--set {text[:77]}...")
    if not equals or not path.strip():
        raise RecipeError(
            f"--set {text!r} has no value",
            code="K122",
            place=place,
            expected="--set steps.task.distill.epochs=1",
        )
    try:
        node = read_yaml(value, place.file) if value.strip() else Node("", place)
    except RecipeError as error:
        problems = [replace(problem, place=place, path=path.strip()) for problem in error.problems]
        raise RecipeError(problems=problems) from error
    return path.strip(), _at(node, place)


def _at(node: Node, place: Place) -> Node:
    value = node.value
    if isinstance(value, dict):
        return Node({key: _at(child, place) for key, child in value.items()}, place, place)
    return Node([_at(child, place) for child in value] if isinstance(value, list) else value, place, place)


def override(root: Node, path: str, value: Node) -> Node:
    """Return `root` with the value at `path` set.

    Every part but the last must be there; the last may be new, and is checked like any other key. Keys that
    hold dots are found as written (`expect.task.accuracy`). Raises `RecipeError` K123 with the nearest key.
    """
    return _override(root, path, value, path)


def _override(node: Node, rest: str, value: Node, path: str) -> Node:
    if rest.startswith("["):
        return _override_item(node, rest, value, path)
    if not isinstance(node.value, dict):
        raise _no_path(path, rest, value, f"what holds {rest!r} is {node.kind()}", [])
    key, after = _split_key(node, rest, is_flat=path.startswith("expect.") and rest != path)
    if not after:
        return replace(node, value={**node.value, key: value})
    if key not in node.value:
        raise _no_path(path, rest, value, f"there is no {key!r}", list(node.value))
    child = _override(node.value[key], after, value, path)
    return replace(node, value={**node.value, key: child})


def _override_item(node: Node, rest: str, value: Node, path: str) -> Node:
    found = re.match(r"\[(\d{1,6})\]\.?", rest)
    size = len(node.items)
    if not found or int(found[1]) >= size:
        there = f"a list of {size}" if isinstance(node.value, list) else node.kind()
        raise _no_path(path, rest, value, f"{rest!r} asks for an entry of {there}", [])
    items, index, after = list(node.items), int(found[1]), rest[found.end() :]
    items[index] = _override(items[index], after, value, path) if after else replace(value, key=None)
    return replace(node, value=items)


def _split_key(node: Node, rest: str, is_flat: bool) -> tuple[str, str]:
    """Split off the first key: the longest one that exists, else up to the next dot or bracket."""
    for key in sorted(node.children, key=len, reverse=True):
        if rest == key or (rest.startswith(key) and rest[len(key)] in ".["):
            return key, rest[len(key) :].removeprefix(".")
    if is_flat:
        return rest, ""
    end = re.search(r"[.\[]", rest)
    if end is None:
        return rest, ""
    return rest[: end.start()], rest[end.start() :].removeprefix(".") or "."


def _no_path(path: str, rest: str, value: Node, reason: str, valid: list[str]) -> RecipeError:
    name = re.split(r"[.\[]", rest)[0]
    return RecipeError(
        f"--set: {reason}",
        code="K123",
        place=value.place,
        path=path,
        expected="a path that is in the recipe",
        remedy=did_you_mean(name, valid),
    )


def apply_overrides(root: Node, overrides: Sequence[Override]) -> tuple[Node, list[Override]]:
    """Return `root` with the overrides that find their path set, and those that do not."""
    left = []
    for path, value in overrides:
        try:
            root = override(root, path, value)
        except RecipeError:
            left.append((path, value))
    return root, left


def collect(problems: list[Problem], attempt: Callable[[], Node], otherwise: Node) -> Node:
    """Return what `attempt` returns; where it fails, keep its problems and return `otherwise`."""
    try:
        return attempt()
    except RecipeError as error:
        problems += error.problems
        return otherwise
