"""Read data files and hub data sets through the `datasets` library, and turn its failures into our errors."""

from __future__ import annotations

import csv
import glob
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from logging import CRITICAL
from pathlib import Path
from typing import Any, Literal

import datasets
import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]

from kroncc.data.corpus import python_docs
from kroncc.data.sources import PYTHON_DOCS, find_files
from kroncc.errors import DataError, did_you_mean
from kroncc.recipe.names import FILE_SOURCES
from kroncc.recipe.schema import DataSpec

NO_ROWS = ("corresponds to no data", "the first 0 values")  # how `datasets` says that it found no rows
ENCODING = "utf-8-sig"  # UTF-8, with or without a byte order mark


def load_splits(spec: DataSpec, name: str, root: Path, cache: Path) -> dict[str, datasets.Dataset]:
    """Return the raw splits of a data set under the source's own names; copies of files are kept in `cache`.

    Raises `DataError` for what is missing, unreadable or not what its kind says.
    """
    with quiet():
        if spec.source == PYTHON_DOCS:
            return {
                split: datasets.Dataset.from_dict({"text": list(rows)})
                for split, rows in python_docs().items()
            }
        if spec.source in FILE_SOURCES:
            return _from_files(spec, name, find_files(spec, name, root), cache)
        return _from_hub(spec, name)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the library's progress bars and warnings from the terminal."""
    bars, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(CRITICAL)  # its errors reach the user as ours
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


def cached_map(
    rows: datasets.Dataset,
    function: Callable[..., dict[str, list[Any]]],
    features: dict[str, Any],
    file: Path,
    key: str,
) -> datasets.Dataset:
    """Return `rows` mapped in batches into `features`; kept in `file`, and read from there the next time.

    The file is written beside and renamed. One that cannot be read is made again.
    """
    with quiet():
        for last in (False, True):
            try:
                return rows.map(
                    function,
                    batched=True,
                    remove_columns=rows.column_names,
                    features=datasets.Features(features),
                    new_fingerprint=key,
                    cache_file_name=str(file),
                    load_from_cache_file=True,
                )
            except (pyarrow.ArrowException, OSError) as error:
                damaged = file.exists() and not (isinstance(error, OSError) and error.errno)
                if last or not damaged:
                    raise
                file.unlink()
    raise AssertionError("unreachable")


def check_columns(wanted: Sequence[str], columns: Sequence[str], where: str) -> None:
    """Raise `DataError` that names the wanted columns which are not there, and the nearest that are."""
    missing = [column for column in wanted if column not in columns]
    if missing:
        raise DataError(
            f"{where} has no column {', '.join(repr(column) for column in missing)}",
            code="K604",
            expected=f"one of its columns: {', '.join(columns)}",
            remedy=did_you_mean(missing[0], columns),
        )


def _from_files(
    spec: DataSpec, name: str, files: dict[str, list[Path]], cache: Path
) -> dict[str, datasets.Dataset]:
    # `datasets` refuses a split of only empty files with an internal error: such a split has no rows
    filled = {split: [path for path in paths if path.stat().st_size] for split, paths in files.items()}
    empty = [split for split, paths in filled.items() if not paths]
    if empty:
        raise DataError(
            f"data {name!r}: split {empty[0]!r} has only empty files: {', '.join(map(str, files[empty[0]]))}",
            code="K605",
            path="files",
        )
    options = _options(spec, name, filled)
    patterns = {split: [glob.escape(str(path)) for path in paths] for split, paths in filled.items()}
    try:
        loaded = datasets.load_dataset(spec.source, data_files=patterns, cache_dir=str(cache), **options)
    except Exception as error:
        cause = _cause(error)
        if isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno):
            raise cause from None  # trouble of the machine, not of the data
        raise _unreadable(cause, spec, name, files) from error
    return dict(loaded)


def _options(spec: DataSpec, name: str, files: dict[str, list[Path]]) -> dict[str, Any]:
    if spec.source in ("text", "json"):
        return {"encoding": ENCODING}
    if spec.source != "csv":
        return {}
    wanted = [*spec.text, *([spec.label] if spec.label else [])]
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if spec.quoting else csv.QUOTE_NONE
    columns: dict[str, type[str]] = {}
    for path in (path for paths in files.values() for path in paths):
        header = _header(path, spec.delimiter, quoting)
        check_columns(wanted, header, f"data {name!r}: {path}")
        columns.update(dict.fromkeys(header, str))
    return {
        "delimiter": spec.delimiter,
        "quoting": quoting,
        "encoding": ENCODING,
        "converters": columns,  # text stays text: no 007 -> 7
        "na_filter": False,  # nor "NA" -> missing
    }


def _header(path: Path, delimiter: str, quoting: Literal[0, 3]) -> list[str]:
    """Return the column names of a file, whose first row must have as many fields."""
    try:
        with path.open(encoding=ENCODING, newline="") as file:
            lines = (line for line in csv.reader(file, delimiter=delimiter, quoting=quoting) if line)
            header = next(lines, [])
            first = next(lines, header)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{path}: {error}", code="K603", path="files", expected="UTF-8 text with a line of column names"
        ) from error
    if len(first) > len(header):  # pandas would take the first field as a name of the row, and shift the rest
        raise DataError(
            f"{path}: the first row has {len(first)} fields, and there are {len(header)} column names",
            code="K603",
            path="files",
            remedy="check `delimiter`, and set `quoting: false` where quote characters are part of the text",
        )
    return header


def _cause(error: BaseException) -> BaseException:
    """Return the first of a chain of exceptions: what `datasets` wrapped in its own."""
    seen = {id(error)}
    while (before := error.__cause__ or error.__context__) is not None and id(before) not in seen:
        error = before
        seen.add(id(error))
    return error


def _unreadable(cause: BaseException, spec: DataSpec, name: str, files: dict[str, list[Path]]) -> DataError:
    every = [path for paths in files.values() for path in paths]
    no_rows = any(sign in str(cause) for sign in NO_ROWS)
    empty = [path for path in every if no_rows and _is_without_rows(path, spec.source)]
    listed = [str(path) for path in empty or every]
    shown = ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
    if no_rows:
        return DataError(f"data {name!r}: no rows in {shown}", code="K605", path="files")
    remedies = {
        "csv": "check `delimiter`, and set `quoting: false` where quote characters are part of the text",
        "json": "write one object a line (JSON lines), or one list of objects",
        "parquet": "the file is damaged or of another kind: copy it again",
        "text": "convert the file to UTF-8",
    }
    first = str(cause).strip().split("\n")[0]
    return DataError(
        f"data {name!r}: cannot read {shown} as {spec.source}: {first or type(cause).__name__}",
        code="K603",
        path="files",
        remedy=remedies[spec.source],
    )


def _is_without_rows(path: Path, source: str) -> bool:
    """Say whether a file holds no row of data; of a csv, no more than the column names."""
    if source == "parquet":
        return bool(pyarrow.parquet.read_metadata(path).num_rows == 0)
    with path.open(encoding=ENCODING, errors="replace") as file:
        lines = list(itertools.islice((line.strip() for line in file if line.strip()), 2))
    return len(lines) <= (source == "csv") or lines == ["[]"]


def _from_hub(spec: DataSpec, name: str) -> dict[str, datasets.Dataset]:
    try:
        loaded = datasets.load_dataset(spec.source, spec.name)
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        known = isinstance(error, ValueError) and "onfig" in first
        raise DataError(
            f"data {name!r}: cannot load {spec.source!r} from the hub: {first}",
            code="K619" if known else "K608",
            path="name" if known else "source",
            expected=""
            if known
            else f"{', '.join(FILE_SOURCES)}, {PYTHON_DOCS}, or the id of a hub data set",
            remedy="set `name:` to one of its configurations"
            if known
            else "check the id and the network, or name downloaded files with `source: parquet` or `csv`",
        ) from error
    return dict(loaded)
