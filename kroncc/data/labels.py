"""What the label column of a data set holds: classes or numbers, and whether they fit a model's head."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kroncc.errors import DataError


@dataclass(frozen=True)
class Labels:
    """The labels of a data set: `count` classes (ids below it), or one number a row."""

    kind: Literal["classes", "regression"]
    count: int
    names: tuple[str, ...] | None = None
    ids: Mapping[str, int] | None = None  # text of the column -> class id

    def number(self, value: Any) -> int | float:
        """Return what the model is trained on for one value of the column."""
        if self.kind == "regression":
            return float(value)
        return self.ids[_text(value)] if self.ids is not None else int(value)

    def check_head(self, head: int, data: str) -> None:
        """Raise `DataError` unless a head with `head` outputs can learn these labels."""
        check_head(self.kind == "regression", self.count - 1, head, data)


def name_classes(labels: Labels | None, config: Any) -> None:
    """Write the names of the classes into a model's config, as `id2label` and `label2id`."""
    if labels is None or labels.names is None or len(labels.names) > config.num_labels:
        return
    spare = (f"LABEL_{number}" for number in range(len(labels.names), config.num_labels))
    config.id2label = dict(enumerate((*labels.names, *spare)))
    config.label2id = {name: number for number, name in config.id2label.items()}


def check_names(labels: Labels | None, config: Any, data: str) -> None:
    """Raise `DataError` K625 where named classes have other numbers than those the model was trained with."""
    known = getattr(config, "label2id", None) or {}
    if labels is None or labels.names is None or all(str(name).startswith("LABEL_") for name in known):
        return
    for number, name in enumerate(labels.names):
        if known.get(name) != number:
            raise DataError(
                f"data {data!r}: the class {name!r} is number {number} here "
                f"and {known.get(name)} in the model",
                code="K625",
                expected=f"the classes of the model: {', '.join(map(str, known))}",
                remedy="have every class in the data, or write class numbers instead of names",
            )


def check_head(regression: bool, largest: int, head: int, data: str = "") -> None:
    """Raise `DataError` where a head with `head` outputs cannot learn the labels (classes to `largest`)."""
    where = f"data {data!r}: " if data else ""
    if regression and head != 1:
        raise DataError(
            f"{where}the labels are numbers with a fraction, and the head has {head} outputs",
            code="K618",
            expected="a head with one output for regression, or whole numbers for classes",
            remedy="set `labels: 1` on the step that trains the head",
        )
    if not regression and largest >= head:
        raise DataError(
            f"{where}the largest label is {largest}, and the head has {head} outputs",
            code="K611",
            expected=f"labels from 0 to {head - 1}",
            remedy=f"set `labels: {largest + 1}` on the step that trains the head",
        )


def infer_labels(
    values: Iterable[Any], data: str, column: str, names: tuple[str, ...] | None = None
) -> Labels:
    """Return what the distinct `values` of a label column are.

    Whole numbers, also as text, are class ids as they stand; other numbers make a regression; other text
    makes classes numbered in sorted order. `names` are those that the source itself gives to its ids.
    Raises `DataError` for missing, negative or infinite labels.
    """
    distinct = list(values)
    texts = [_text(value) for value in distinct]
    if any(value is None or text == "" for value, text in zip(distinct, texts, strict=True)):
        raise _bad(data, column, "has rows without a value", "fill them, or leave those rows out")
    if all(_is_whole(text) for text in texts):
        ids = [int(text) for text in texts]
        if min(ids) < 0:
            raise _bad(data, column, f"holds the class id {min(ids)}", "number the classes from 0")
        count = max(max(ids) + 1, len(names or ()))
        return Labels("classes", count, names, dict(zip(texts, ids, strict=True)))
    if all(_is_number(text) for text in texts):
        if not all(math.isfinite(float(text)) for text in texts):
            raise _bad(data, column, "holds nan or infinity", "leave those rows out")
        return Labels("regression", 1)
    classes = tuple(sorted(set(texts)))
    return Labels("classes", len(classes), classes, {text: number for number, text in enumerate(classes)})


def _text(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value).strip()


def _is_whole(text: str) -> bool:
    return text.lstrip("+-").isdecimal()


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _bad(data: str, column: str, what: str, remedy: str) -> DataError:
    return DataError(
        f"data {data!r}: the label column {column!r} {what}", code="K606", path="label", remedy=remedy
    )
