"""A recipe as a tree of nodes that remember where they were written, and the map from paths to places."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from kroncc.errors import Place

Scalar = str | int | float | bool | None
Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Node:
    """A value with the place where it stands, and the place of its key if it is in a mapping."""

    value: Scalar | dict[str, Node] | list[Node]
    place: Place
    key: Place | None = None

    @property
    def children(self) -> dict[str, Node]:
        """The entries of a mapping; empty for anything else."""
        return self.value if isinstance(self.value, dict) else {}

    @property
    def items(self) -> list[Node]:
        """The entries of a list; empty for anything else."""
        return self.value if isinstance(self.value, list) else []

    def plain(self) -> Any:
        """Return the value without places."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        return [child.plain() for child in self.value] if isinstance(self.value, list) else self.value

    def walk(self, path: Path = ()) -> Iterator[tuple[Path, Node]]:
        """Yield this node and all below it, each with its path."""
        yield path, self
        for key, child in self.children.items():
            yield from child.walk((*path, key))
        for index, child in enumerate(self.items):
            yield from child.walk((*path, index))

    def kind(self) -> str:
        """Return what this is in plain words: text, a number, a mapping, ..."""
        return kind_of(self.value)


def kind_of(value: object) -> str:
    """Return the kind of a plain value in plain words."""
    if value is None:
        return "nothing (null)"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return names.get(type(value), "a mapping" if isinstance(value, Mapping) else "a list")


def text_of(path: Path) -> str:
    """Return a path as it is shown: steps.factored.compress.passes[0].a."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return "".join(parts).removeprefix(".")


@dataclass(frozen=True)
class PlaceMap:
    """From paths in a resolved recipe to places in its files.

    A path may leave out the name of a pass or a loss: `passes[0].a` is `passes[0].kronecker.a`.
    """

    values: Mapping[str, Place] = field(default_factory=dict)
    keys: Mapping[str, Place] = field(default_factory=dict)

    def find(self, path: str) -> Place | None:
        """Return the place of a value, or of its nearest known parent."""
        return self._longest(path, self.values)

    def find_key(self, path: str) -> Place | None:
        """Return the place of a key, or of its nearest known parent."""
        return self.keys.get(path) or self.find(path)

    def _longest(self, path: str, places: Mapping[str, Place]) -> Place | None:
        while path:
            if path in places:
                return places[path]
            path = _PARENT.sub("", path) if _PARENT.search(path) else ""
        return places.get("")


_PARENT = re.compile(r"(\.[^.\[\]]*|\[\d+\])$")


def place_map(root: Node) -> PlaceMap:
    """Return the places of all nodes under `root`. A mapping or list stands where its key does."""
    values: dict[str, Place] = {}
    keys: dict[str, Place] = {}
    for path, node in root.walk():
        is_scalar = not isinstance(node.value, dict | list)
        for text in _spellings(path):
            values.setdefault(text, node.place if is_scalar else node.key or node.place)
            keys.setdefault(text, node.key or node.place)
    return PlaceMap(values, keys)


def _spellings(path: Path) -> Iterator[str]:
    yield text_of(path)
    if len(path) > 5 and path[0] == "steps" and isinstance(path[4], int):
        yield text_of(path[:5] + path[6:])
