"""A data set of a recipe, opened: splits with columns `text`, `text_2` and `label`, and a fingerprint."""

from __future__ import annotations

import functools
import hashlib
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from kroncc.data.labels import Labels, infer_labels
from kroncc.data.loading import cached_map, check_columns, load_splits
from kroncc.data.sources import check_source, source_fingerprint
from kroncc.errors import DataError, did_you_mean
from kroncc.hashing import content_hash
from kroncc.recipe.names import FILE_SOURCES
from kroncc.recipe.schema import DataSpec

VERSION = 1  # of the rows that this file makes; part of every fingerprint
SCALARS = ("string", "large_string", "int", "uint", "float", "double", "bool")


@dataclass(frozen=True)
class Split:
    """The rows of one split. Columns: `text`, `text_2` for pairs, `label` where it is labelled."""

    name: str
    rows: datasets.Dataset
    labels: Labels | None
    key: str  # content hash of these rows
    dropped: int = 0  # rows left out because they hold no text

    def __len__(self) -> int:
        return len(self.rows)


class SplitData(Mapping[str, Split]):
    """An opened data set: split name -> `Split`; an unknown split raises `DataError`."""

    def __init__(self, name: str, splits: Mapping[str, Split], fingerprint: str) -> None:
        self.name = name
        self._splits = dict(splits)
        self._fingerprint = fingerprint

    def __getitem__(self, split: str) -> Split:
        if split not in self._splits:
            raise DataError(
                f"data {self.name!r} has no split {split!r}",
                code="K607",
                remedy=f"{did_you_mean(split, self._splits)}"
                + ("; or set `validation_fraction`" if split == "validation" else ""),
            )
        return self._splits[split]

    def __iter__(self) -> Iterator[str]:
        return iter(self._splits)

    def __len__(self) -> int:
        return len(self._splits)

    def rows(self) -> dict[str, int]:
        """Return the number of rows of each split."""
        return {name: len(split) for name, split in self._splits.items()}

    def fingerprint(self) -> str:
        """Return a hash of the files' content and of the options that choose rows; paths do not count."""
        return self._fingerprint

    @property
    def labels(self) -> Labels | None:
        """What the label column holds; None for data without labels."""
        return next((split.labels for split in self._splits.values() if split.labels), None)


def open_data(spec: DataSpec, name: str, root: Path, cache_dir: Path | None = None) -> SplitData:
    """Open a data set of a recipe.

    One non-empty line of a `text` source is one row. Rows without text are left out and counted. File names
    are relative to `root`, the recipe's directory. What `datasets` writes goes into `cache_dir`; without one,
    into a temporary directory that goes away with the result.

    Raises `DataError`: unknown source, missing file or column, unreadable content, labels of no use, no rows.
    """
    check_source(spec, name)
    fingerprint = content_hash([VERSION, source_fingerprint(spec, name, root)])
    cache = cache_dir or Path(tempfile.mkdtemp(prefix="kroncc-data-"))
    try:
        cache.mkdir(parents=True, exist_ok=True)
        raw = _chosen(load_splits(spec, name, root, cache), spec, name)
        labels = _labels(raw, spec, name)
        splits = {
            split: _normalised(rows, split, labels, spec, name, cache, content_hash([fingerprint, split]))
            for split, rows in raw.items()
        }
        data = SplitData(name, _finished(splits, spec, name), fingerprint)
    except BaseException:
        if cache_dir is None:
            shutil.rmtree(cache, ignore_errors=True)
        raise
    if cache_dir is None:
        weakref.finalize(data, shutil.rmtree, cache, ignore_errors=True)
    return data


def _chosen(raw: dict[str, datasets.Dataset], spec: DataSpec, name: str) -> dict[str, datasets.Dataset]:
    """Return the splits that the recipe asks for, under its names, with their columns checked."""
    for theirs in (spec.split or {}).values():
        if theirs not in raw:
            raise DataError(
                f"data {name!r}: the source has no split {theirs!r}",
                code="K607",
                path="split",
                remedy=did_you_mean(theirs, raw),
            )
    chosen = {ours: raw[theirs] for ours, theirs in spec.split.items()} if spec.split else raw
    for split, rows in chosen.items():
        label = [spec.label] if spec.label and (spec.source in FILE_SOURCES or split == "train") else []
        check_columns([*spec.text, *label], rows.column_names, f"data {name!r}, split {split!r},")
        for column in spec.text:
            _check_text(rows, column, name)
    return chosen


def _check_text(rows: datasets.Dataset, column: str, name: str) -> None:
    kind = rows.features[column]
    if not isinstance(kind, datasets.Value) or not kind.dtype.startswith(SCALARS):
        raise DataError(
            f"data {name!r}: column {column!r} holds {kind}, not text",
            code="K620",
            path="text",
            expected="one text a row",
        )


def _labels(raw: dict[str, datasets.Dataset], spec: DataSpec, name: str) -> Labels | None:
    if spec.label is None:
        return None
    values: set[Any] = set()
    names = None
    for rows in raw.values():
        feature = rows.features.get(spec.label)
        if isinstance(feature, datasets.ClassLabel):
            names = tuple(feature.names)
        elif feature is not None and not isinstance(feature, datasets.Value):
            raise DataError(
                f"data {name!r}: the label column {spec.label!r} holds {feature}",
                code="K606",
                path="label",
                expected="one class or one number a row",
            )
        if _is_labelled(rows, spec.label):
            values.update(rows.unique(spec.label))
    if not values and any(map(len, raw.values())):
        raise DataError(f"data {name!r}: the label column {spec.label!r} is empty", code="K606", path="label")
    return infer_labels(values, name, spec.label, names) if values else None


def _is_labelled(rows: datasets.Dataset, column: str) -> bool:
    """Return whether a split has labels; hub test splits often hold -1 or nothing in their place."""
    return column in rows.column_names and not set(rows.unique(column)) <= {-1, None}


def _normalised(
    rows: datasets.Dataset,
    split: str,
    labels: Labels | None,
    spec: DataSpec,
    name: str,
    cache: Path,
    key: str,
) -> Split:
    """Return the rows with our columns, blank ones left out; stored in `cache` under their key."""
    labelled = labels if spec.label and labels and _is_labelled(rows, spec.label) else None
    features = {
        f"text{suffix}": datasets.Value("string") for suffix, _ in zip(("", "_2"), spec.text, strict=False)
    }
    if labelled:
        features["label"] = datasets.Value("float64" if labelled.kind == "regression" else "int64")
    columns = functools.partial(_columns, spec=spec, labels=labelled, name=name)
    made = cached_map(rows, columns, features, cache / f"rows-{key}.arrow", key)
    return Split(split, made, labelled, key, len(rows) - len(made))


def _columns(
    batch: Mapping[str, list[Any]], spec: DataSpec, labels: Labels | None, name: str
) -> dict[str, list[Any]]:
    texts = [["" if value is None else str(value) for value in batch[column]] for column in spec.text]
    _check_quotes(texts, spec, name)
    kept = [row for row, parts in enumerate(zip(*texts, strict=True)) if any(part.strip() for part in parts)]
    made: dict[str, list[Any]] = {}
    for column, values in zip(("text", "text_2"), texts, strict=False):
        made[column] = [values[row] for row in kept]
    if labels is not None and spec.label is not None:
        made["label"] = [labels.number(batch[spec.label][row]) for row in kept]
    return made


def _check_quotes(texts: list[list[str]], spec: DataSpec, name: str) -> None:
    """Refuse a field that swallowed other lines of a tab-separated file: a stray quote opened it."""
    if spec.source != "csv" or not spec.quoting or spec.delimiter != "\t":
        return
    swallowed = next((text for part in texts for text in part if "\n" in text and "\t" in text), None)
    if swallowed is not None:
        raise DataError(
            f"data {name!r}: a quote character joined several lines into one field: {swallowed[:60]!r}...",
            code="K621",
            path="quoting",
            remedy="set `quoting: false`",
        )


def _finished(splits: dict[str, Split], spec: DataSpec, name: str) -> dict[str, Split]:
    if spec.validation_fraction > 0 and "validation" not in splits and "train" in splits:
        splits = _set_aside(splits, spec.validation_fraction)
    limits = spec.limit if isinstance(spec.limit, dict) else dict.fromkeys(splits, spec.limit or 0)
    unknown = [split for split in limits if split not in splits]
    if unknown:
        raise DataError(
            f"data {name!r}: `limit` names the split {unknown[0]!r}",
            code="K607",
            path="limit",
            remedy=did_you_mean(unknown[0], splits),
        )
    for split, rows in splits.items():
        if not len(rows):
            raise DataError(
                f"data {name!r}: split {split!r} has no rows with text", code="K605", path="files"
            )
    return {split: _first(rows, limits.get(split, 0)) for split, rows in splits.items()}


def _first(split: Split, limit: int) -> Split:
    if not limit or limit >= len(split):
        return split
    rows = split.rows.select(range(limit))
    return Split(split.name, rows, split.labels, content_hash([split.key, limit]), split.dropped)


def _set_aside(splits: dict[str, Split], fraction: float) -> dict[str, Split]:
    """Split `train` by a hash of each row's text, so that equal texts stay together whatever their order."""
    train = splits["train"]
    columns = [column for column in ("text", "text_2") if column in train.rows.column_names]
    digests = [
        hashlib.sha256("\0".join(row[column] for column in columns).encode()).digest()
        for row in train.rows.select_columns(columns)
    ]
    count = max(1, round(fraction * len(digests))) if digests else 0
    cut = sorted(digests)[count - 1] if count else b""
    parts = {
        "train": [row for row, digest in enumerate(digests) if digest > cut],
        "validation": [row for row, digest in enumerate(digests) if digest <= cut],
    }
    made = {
        name: Split(
            name,
            train.rows.select(rows, keep_in_memory=True),
            train.labels,
            content_hash([train.key, fraction, name]),
            train.dropped if name == "train" else 0,
        )
        for name, rows in parts.items()
    }
    return {**splits, **made}
