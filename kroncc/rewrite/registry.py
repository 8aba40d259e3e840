"""Which passes are installed: found by entry point, loaded only when used.

A distribution offers passes in the entry point group `kroncc.passes`. The value of an entry point is a
mapping from recipe name to `"module:Class"`, or one pass class (the entry point's name is then the recipe
name). The JSON Schemas of all passes are cached in one file, so that checking a recipe imports no torch.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from kroncc.errors import PassError, did_you_mean
from kroncc.rewrite import schema_cache

if TYPE_CHECKING:
    from kroncc.rewrite.base import Pass

GROUP = "kroncc.passes"


@dataclass(frozen=True)
class Entry:
    """One installed pass: its recipe name, the distribution that offers it, and where its class is."""

    name: str
    owner: str
    target: str  # "module:Class"
    loaded: type | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Broken:
    """A distribution whose entry point cannot be read, and why."""

    owner: str
    value: str
    cause: Exception


def pass_names() -> dict[str, Entry]:
    """Return the installed passes by recipe name, without importing their modules.

    Raises `PassError` K411 (two distributions offer the same name), K412 (an entry point fails to load).
    """
    table, broken = _table()
    if broken:
        raise _load_error(broken[0].value, broken[0].owner, broken[0].cause)
    return dict(table)


def get_pass(name: str) -> type[Pass]:
    """Return the class of a pass.

    Raises `PassError` K410 (no such pass), K411 (name clash), K412 (fails to load), K413 (not a pass).
    """
    table, broken = _table()
    if name not in table:
        raise _unknown(name, table, broken)
    return _load(table[name])


def pass_schema(name: str) -> dict[str, Any]:
    """Return the JSON Schema of a pass's options, from the cache where it is there; errors as `get_pass`."""
    return schemas().schema(name)


def schemas() -> Schemas:
    """Return the table of option schemas that `kroncc.recipe.loader.load_recipe` checks pass calls with."""
    return Schemas()


class Schemas:
    """The JSON Schemas of pass options: from the cache; where it lacks one, all passes are loaded and it is
    written anew."""

    def __init__(self) -> None:
        self._key = schema_cache.key(_entry_points())
        self._known = schema_cache.read(self._key)

    def names(self) -> list[str]:
        """Return the names of all installed passes, sorted."""
        return sorted(self._known or _table()[0])

    def schema(self, name: str) -> dict[str, Any]:
        """Return the schema of the options of pass `name`; errors as `get_pass`."""
        if name not in self._known:
            get_pass(name)
            self._known = _all_schemas()
            schema_cache.write(self._key, self._known)
        return self._known[name]


def _all_schemas() -> dict[str, dict[str, Any]]:
    """Return the schemas of every pass that loads; the others speak for themselves when they are used."""
    found = {}
    for name, entry in sorted(_table()[0].items()):
        try:
            found[name] = _load(entry).model_json_schema()
        except PassError:
            continue
    return found


@lru_cache(maxsize=1)
def _entry_points() -> tuple[importlib.metadata.EntryPoint, ...]:
    return tuple(importlib.metadata.entry_points(group=GROUP))


@lru_cache(maxsize=1)
def _table() -> tuple[dict[str, Entry], tuple[Broken, ...]]:
    table: dict[str, Entry] = {}
    broken: list[Broken] = []
    for point in _entry_points():
        owner = point.dist.name if point.dist else point.value
        try:
            entries = _entries(point, owner)
        except Exception as cause:  # a plugin may fail in any way; its owner is named when it matters
            broken.append(Broken(owner, point.value, cause))
            continue
        for entry in entries:
            other = table.setdefault(entry.name, entry)
            if other != entry:
                raise PassError(
                    f"two distributions offer a pass called {entry.name!r}: {other.owner} and {entry.owner}",
                    code="K411",
                    expected="one owner for each name",
                    remedy=f"uninstall {other.owner} or {entry.owner}, or rename one of the passes",
                )
    return table, tuple(broken)


def _entries(point: importlib.metadata.EntryPoint, owner: str) -> list[Entry]:
    value = point.load()
    if isinstance(value, type):
        return [Entry(point.name, owner, f"{value.__module__}:{value.__qualname__}", value)]
    if not isinstance(value, Mapping):
        raise TypeError(f"{point.value} is {type(value).__name__}, not a mapping of names or a pass class")
    for name, target in value.items():
        if not (isinstance(name, str) and isinstance(target, str) and target.count(":") == 1):
            raise TypeError(f"{point.value} maps {name!r} to {target!r}, not a name to 'module:Class'")
    return [Entry(name, owner, target) for name, target in value.items()]


def _load(entry: Entry) -> type[Pass]:
    from kroncc.rewrite.base import Pass

    found = entry.loaded
    if found is None:
        module, _, name = entry.target.partition(":")
        try:
            found = getattr(importlib.import_module(module), name)
        except Exception as cause:  # whatever a plugin's module raises on import
            raise _load_error(entry.target, entry.owner, cause) from cause
    if not (isinstance(found, type) and issubclass(found, Pass)):
        raise PassError(
            f"{entry.target} of {entry.owner} is not a pass",
            code="K413",
            expected="a subclass of kroncc.api.Pass",
        )
    if getattr(found, "kind", None) != entry.name:
        raise PassError(
            f"{entry.target} of {entry.owner} is called {getattr(found, 'kind', None)!r}, "
            f"its entry point says {entry.name!r}",
            code="K413",
            expected="the same name in `kind` and in the entry point",
        )
    return found


def _load_error(target: str, owner: str, cause: Exception, before: str = "") -> PassError:
    error = PassError(
        f"{before}{target} of {owner} fails to load: {type(cause).__name__}: {cause}",
        code="K412",
        remedy=f"mend, upgrade or uninstall {owner}",
    )
    error.__cause__ = cause
    return error


def _unknown(name: str, table: Mapping[str, Entry], broken: tuple[Broken, ...]) -> PassError:
    if broken:  # the pass may well be one of theirs
        return _load_error(broken[0].value, broken[0].owner, broken[0].cause, f"no pass is called {name!r}; ")
    return PassError(
        f"no pass is called {name!r}",
        code="K410",
        expected="an installed pass",
        remedy=did_you_mean(name, table) or "install the distribution that offers it",
    )
