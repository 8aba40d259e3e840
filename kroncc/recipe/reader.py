"""Read one YAML file into nodes: libyaml's events, bounded in size, depth and alias expansion.

Only plain data comes out: mappings with text keys, lists, text, numbers, booleans, null. Tags that build
objects are refused. Duplicate keys are errors. Merge keys (`<<: *name`) work, the mapping's own keys win.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from kroncc.errors import Place, Problem, RecipeError
from kroncc.recipe.node import Node
from kroncc.recipe.scalars import TAG, resolve_scalar, resolve_tagged

MAX_BYTES = 1_000_000
MAX_DEPTH = 50
MAX_NODES = 100_000
MAX_PROBLEMS = 200

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_QUOTE = "put the value in quotes if it begins with @ * & ! > | % ` or a tab, or contains ': '"
_COLLECTION_TAGS = (None, "!", TAG + "map", TAG + "seq")


def read_file(path: Path) -> str:
    """Return the text of a recipe file. Raises `RecipeError` K101 (unreadable), K102 (too large), K103."""
    place = Place(str(path))
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as cause:
        reason = getattr(cause, "strerror", None) or str(cause)
        raise RecipeError(
            f"the recipe cannot be read: {reason}", code="K101", place=place, expected="a YAML file"
        ) from cause
    if len(raw) > MAX_BYTES:
        raise RecipeError(
            "the recipe is too large", code="K102", place=place, expected=f"at most {MAX_BYTES:,} bytes"
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        line = raw.count(b"\n", 0, cause.start) + 1
        column = cause.start - raw.rfind(b"\n", 0, cause.start)
        raise RecipeError(
            "the recipe is not UTF-8 text",
            code="K103",
            place=Place(str(path), line, column),
            expected="UTF-8",
        ) from cause


def read_yaml(text: str, file: str) -> Node:
    """Return the one document of `text`; `file` is how places name it.

    Raises `RecipeError` with codes K103-K114.
    """
    builder = _Builder(file)
    try:
        text.encode()
        root = builder.build(yaml.parse(text, Loader=_Loader))
    except UnicodeEncodeError as cause:
        raise RecipeError(
            "the recipe is not text", code="K103", place=Place(file), expected="UTF-8"
        ) from cause
    except yaml.MarkedYAMLError as cause:
        raise _syntax_error(cause, builder) from cause
    except yaml.YAMLError as cause:
        raise RecipeError(
            "the recipe holds a control character",
            code="K103",
            place=_position(text, file, cause),
            expected="text",
        ) from cause
    if builder.problems:
        raise RecipeError(problems=builder.problems)
    return root


def _syntax_error(error: yaml.MarkedYAMLError, builder: _Builder) -> RecipeError:
    mark = error.problem_mark or error.context_mark
    place = Place(builder.file, mark.line + 1, mark.column + 1) if mark else Place(builder.file)
    reason = " ".join(part for part in (error.context, error.problem) if part) or "it cannot be read"
    return RecipeError(
        problems=[
            *builder.problems,
            Problem("K104", f"not YAML: {reason}", place, expected="YAML", remedy=_QUOTE),
        ]
    )


def _position(text: str, file: str, error: yaml.YAMLError) -> Place:
    at = getattr(error, "position", None)
    if not isinstance(at, int):
        return Place(file)
    before = text[: next((i for i, letter in enumerate(text) if _is_control(letter)), at)]
    return Place(file, before.count("\n") + 1, len(before) - before.rfind("\n"))


def _is_control(letter: str) -> bool:
    return (ord(letter) < 32 and letter not in "\t\n\r") or (127 <= ord(letter) < 160 and letter != "\x85")


@dataclass(frozen=True, slots=True)
class _Anchored:
    """A node that aliases may repeat, with what repeating it costs."""

    node: Node
    nodes: int
    height: int


class _Builder:
    """Builds nodes from events; problems that do not stop the reading are collected."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.problems: list[Problem] = []
        self.anchors: dict[str, _Anchored | None] = {}  # None while the node is being read
        self.nodes = 0
        self.height = 0  # deepest level reached under the node being read

    def build(self, events: Iterator[Any]) -> Node:
        """Return the document; `events` come from `yaml.parse`."""
        self.events = events
        next(events)
        if isinstance(next(events), yaml.StreamEndEvent):
            raise self._fault(
                "K105", "the recipe is empty", Place(self.file, 1, 1), "a mapping: kroncc: 1, ..."
            )
        root = self._node(next(events), 0)
        next(events)
        after = next(events)
        if not isinstance(after, yaml.StreamEndEvent):
            raise self._fault(
                "K106", "the file holds more than one document", self._place(after), "one document"
            )
        return root

    def _node(self, event: Any, depth: int) -> Node:
        place = self._place(event)
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event, depth)
        self._count(1, depth, place)
        anchor, before, outer = event.anchor, self.nodes, self.height
        if anchor:
            self.anchors[anchor] = None
        self.height = depth
        if isinstance(event, yaml.ScalarEvent):
            node = Node(self._scalar(event), place)
        elif isinstance(event, yaml.SequenceStartEvent):
            node = Node(self._list(event, depth), place)
        else:
            node = Node(self._mapping(event, depth), place)
        if anchor:
            self.anchors[anchor] = _Anchored(node, self.nodes - before + 1, self.height - depth)
        self.height = max(outer, self.height)
        return node

    def _alias(self, event: Any, depth: int) -> Node:
        place = self._place(event)
        known = self.anchors.get(event.anchor)
        if known is None:
            inside = event.anchor in self.anchors
            message = (
                f"*{event.anchor} repeats a value inside itself" if inside else f"no &{event.anchor} before"
            )
            raise self._fault("K111", message, place, "the name of an earlier &anchor", _QUOTE)
        self._count(known.nodes, depth + known.height, place)
        self.height = max(self.height, depth + known.height)
        return known.node

    def _scalar(self, event: Any) -> Any:
        if event.tag is None:
            return resolve_scalar(event.value) if event.implicit[0] else event.value
        try:
            return resolve_tagged(event.tag, event.value)
        except ValueError as cause:
            remedy = "remove the tag" if event.tag.startswith(TAG) else _QUOTE
            self._note(
                "K112", f"the tag {_short(event.tag)} is refused: {cause}", event, "plain data", remedy
            )
            return event.value

    def _list(self, event: Any, depth: int) -> list[Node]:
        self._check_tag(event)
        items = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            items.append(self._node(event, depth + 1))
        return items

    def _mapping(self, event: Any, depth: int) -> dict[str, Node]:
        self._check_tag(event)
        found: dict[str, Node] = {}
        merged: list[Node] = []
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key = self._node(event, depth + 1)
            value = self._node(next(self.events), depth + 1)
            if isinstance(event, yaml.ScalarEvent) and event.value == "<<" and event.implicit[0]:
                merged += self._merge_sources(value, event)
            elif not isinstance(event, yaml.ScalarEvent):
                self._note("K113", "a key must be plain text", event, "a word, then ':'", _QUOTE)
            elif event.value in found:
                first = found[event.value].key
                self._note("K108", f"duplicate key {event.value!r}, first at {first}", event, "each key once")
            else:
                found[event.value] = replace(value, key=key.place)
        for source in merged:
            found = {**source.children, **found}
        return found

    def _merge_sources(self, value: Node, event: Any) -> list[Node]:
        sources = value.items or [value]
        if all(isinstance(source.value, dict) for source in sources):
            return sources
        self._note("K114", "'<<' merges mappings only", event, "<<: *name, where &name marks a mapping")
        return []

    def _check_tag(self, event: Any) -> None:
        if event.tag not in _COLLECTION_TAGS:
            self._note(
                "K112", f"the tag {_short(event.tag)} is refused", event, "plain data", "remove the tag"
            )

    def _count(self, nodes: int, depth: int, place: Place) -> None:
        self.nodes += nodes
        if depth > MAX_DEPTH:
            raise self._fault("K109", "the recipe is nested too deeply", place, f"at most {MAX_DEPTH} levels")
        if self.nodes > MAX_NODES:
            raise self._fault(
                "K110",
                "the recipe is too large once its aliases are expanded",
                place,
                f"at most {MAX_NODES:,} values",
            )

    def _place(self, event: Any) -> Place:
        mark = event.start_mark
        return Place(self.file, mark.line + 1, mark.column + 1)

    def _note(self, code: str, message: str, event: Any, expected: str, remedy: str = "") -> None:
        self.problems.append(Problem(code, message, self._place(event), expected=expected, remedy=remedy))
        if len(self.problems) >= MAX_PROBLEMS:
            raise self._fault("K199", "there are more problems than these", self._place(event), "fewer")

    def _fault(self, code: str, message: str, place: Place, expected: str, remedy: str = "") -> RecipeError:
        last = Problem(code, message, place, expected=expected, remedy=remedy)
        return RecipeError(problems=[*self.problems, last])


def _short(tag: str) -> str:
    name = tag.replace(TAG, "!!")
    return repr(name if len(name) <= 60 else name[:57] + "...")
