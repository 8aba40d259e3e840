"""The cache of pass schemas: one JSON file under the user's cache directory, keyed by what is installed.

`KRONCC_CACHE` names another directory. Reading never fails and neither does writing: a missing, corrupt or
read-only cache only costs time.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

FORMAT = 1


def directory() -> Path:
    """Return kroncc's cache directory; it may not exist."""
    own = os.environ.get("KRONCC_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kroncc"


def key(points: Iterable[importlib.metadata.EntryPoint]) -> str:
    """Return a hash of all that the schemas depend on.

    That is the base class of passes, and each entry point with its distribution's name and version; of an
    editable install also the size and time of its source files.
    """
    parts = [f"format {FORMAT}", *_stamps(Path(__file__).with_name("base.py"))]
    for point in sorted(points, key=lambda one: (one.name, one.value)):
        dist = point.dist
        parts.append(f"{point.name}={point.value} {dist.name if dist else ''} {dist.version if dist else ''}")
        if dist is None or _editable(dist):
            parts += _source_stamps(point.value.partition(":")[0].strip())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def read(key: str) -> dict[str, dict[str, Any]]:
    """Return the schemas stored under `key`; empty where there are none that can be read."""
    try:
        stored = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError, RecursionError):
        return {}
    if not (isinstance(stored, dict) and stored.get("key") == key and isinstance(stored.get("passes"), dict)):
        return {}
    return {name: schema for name, schema in stored["passes"].items() if isinstance(schema, dict)}


def write(key: str, schemas: Mapping[str, dict[str, Any]]) -> None:
    """Store `schemas` under `key`: written beside and renamed, nothing said where that cannot be done."""
    try:
        file = _file()
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, beside = tempfile.mkstemp(prefix=file.name, dir=file.parent)
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            json.dump({"key": key, "passes": dict(schemas)}, stream)
        Path(beside).replace(file)
    except (OSError, RuntimeError):
        return


def _file() -> Path:
    """One file an environment: a new version replaces the old one's schemas."""
    environment = hashlib.sha256(sys.prefix.encode()).hexdigest()[:12]
    return directory() / f"passes-{environment}.json"


def _editable(dist: importlib.metadata.Distribution) -> bool:
    try:
        return bool(json.loads(dist.read_text("direct_url.json") or "{}").get("dir_info", {}).get("editable"))
    except (ValueError, AttributeError):
        return False


def _source_stamps(module: str) -> Iterator[str]:
    """Yield a stamp of every source file of the package that `module` is in; nothing is imported."""
    try:
        spec = importlib.util.find_spec(module.split(".")[0])
    except (ImportError, ValueError):
        return
    if spec is None:
        return
    if spec.submodule_search_locations is None:
        yield from _stamps(Path(spec.origin or ""))
        return
    for location in spec.submodule_search_locations:
        for file in sorted(Path(location).rglob("*.py")):
            yield from _stamps(file)


def _stamps(file: Path) -> Iterator[str]:
    try:
        found = file.stat()
    except OSError:
        return
    yield f"{file} {found.st_size} {found.st_mtime_ns}"
