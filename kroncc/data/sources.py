"""Where data comes from: which kinds there are, which files a recipe names, and the hash of their content."""

from __future__ import annotations

import functools
import glob
import hashlib
from pathlib import Path

from kroncc.data.corpus import python_docs
from kroncc.errors import DataError, did_you_mean
from kroncc.hashing import content_hash
from kroncc.recipe.names import BUILTIN_SOURCES, FILE_SOURCES
from kroncc.recipe.schema import DataSpec

PYTHON_DOCS = "builtin:python-docs"
MATTERS = (
    "source",
    "files",
    "name",
    "split",
    "text",
    "label",
    "delimiter",
    "quoting",
    "limit",
    "validation_fraction",
)


def find_files(spec: DataSpec, name: str, root: Path) -> dict[str, list[Path]]:
    """Return the files of each split, sorted within a pattern; relative names and globs start at `root`.

    A string or a list names files of `train`. Raises `DataError` for a name or pattern that matches no file.
    """
    if spec.files is None:
        raise DataError(
            f"data {name!r} of source {spec.source!r} names no files",
            code="K601",
            path="files",
            expected="a file, a list of files, or a mapping split -> files",
            remedy="add `files:`, relative to the recipe's directory",
        )
    splits = spec.files if isinstance(spec.files, dict) else {"train": spec.files}
    found = {split: _expand(names, name, root) for split, names in splits.items()}
    if not any(found.values()):
        raise DataError(
            f"data {name!r}: `files` is empty", code="K601", path="files", remedy="name one file or more"
        )
    return found


def is_hub(spec: DataSpec) -> bool:
    """Return whether a data set comes from the hub."""
    return spec.source not in (*FILE_SOURCES, *BUILTIN_SOURCES)


def check_source(spec: DataSpec, name: str) -> None:
    """Refuse a source whose options do not go together, before anything is read."""
    if spec.source.startswith("builtin:") and spec.source not in BUILTIN_SOURCES:
        raise DataError(
            f"data {name!r}: there is no source {spec.source!r}",
            code="K615",
            path="source",
            remedy=did_you_mean(spec.source, BUILTIN_SOURCES),
        )
    if spec.source not in FILE_SOURCES and spec.files is not None:
        raise DataError(
            f"data {name!r}: source {spec.source!r} takes no `files`",
            code="K616",
            path="files",
            expected=f"a source that reads files: {', '.join(FILE_SOURCES)}",
            remedy=did_you_mean(spec.source, FILE_SOURCES),
        )
    if not 1 <= len(spec.text) <= 2:
        raise DataError(
            f"data {name!r} names {len(spec.text)} text columns",
            code="K609",
            path="text",
            expected="one, or two for pairs",
        )
    if len(spec.delimiter) != 1:
        raise DataError(
            f"data {name!r}: the delimiter is {spec.delimiter!r}",
            code="K617",
            path="delimiter",
            expected="one character",
            remedy='write a tab as "\\t", in double quotes',
        )


def source_fingerprint(spec: DataSpec, name: str, root: Path) -> str:
    """Return a hash of what the rows are made from: content of the files, and the options that choose rows.

    Paths do not count, so data may move. A hub data set is taken by its name alone.
    """
    options = spec.model_dump(mode="json", include=set(MATTERS) - {"files"})
    if spec.source == PYTHON_DOCS:
        return content_hash([options, python_docs()])
    if spec.source not in FILE_SOURCES:
        return content_hash([options])
    files = find_files(spec, name, root)
    return content_hash(
        [options, {split: [file_hash(path) for path in paths] for split, paths in files.items()}]
    )


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file; read once for a given size and time of change.

    Raises `DataError` for a file that cannot be read.
    """
    try:
        stat = path.stat()
        return _file_hash(path, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", code="K603", path="files") from error


@functools.lru_cache(maxsize=4096)
def _file_hash(path: Path, _size: int, _changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _expand(names: str | list[str], data: str, root: Path) -> list[Path]:
    found: list[Path] = []
    for pattern in [names] if isinstance(names, str) else names:
        path = root / Path(pattern).expanduser()
        if path.is_file():
            found.append(path)
            continue
        matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))  # noqa: PTH207 - Path.glob takes no `..`
        files = [match for match in matches if match.is_file()]
        if not files:
            raise _not_found(pattern, path, data)
        found.extend(files)
    return [path.resolve() for path in dict.fromkeys(found)]


def _not_found(pattern: str, path: Path, data: str) -> DataError:
    folder = next(parent for parent in path.parents if parent.is_dir())
    if path.is_dir():
        message, remedy = f"{pattern!r} is a directory", f"name the files in it: {pattern.rstrip('/')}/*"
    elif folder != path.parent:
        message, remedy = f"no file {pattern!r}", f"the directory {path.parent} does not exist; {folder} does"
    else:
        message = f"no file {pattern!r} in {folder}"
        remedy = did_you_mean(path.name, (child.name for child in folder.iterdir())) or f"{folder} is empty"
    return DataError(f"data {data!r}: {message}", code="K602", path="files", remedy=remedy)
