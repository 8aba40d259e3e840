"""What a label column is taken for."""

from __future__ import annotations

from typing import Any

import pytest

from kroncc.data.labels import check_head, infer_labels
from kroncc.errors import DataError


def test_text_becomes_classes_in_sorted_order() -> None:
    labels = infer_labels({"pos", "neg", " neutral "}, "d", "label")
    assert (labels.kind, labels.count, labels.names) == ("classes", 3, ("neg", "neutral", "pos"))
    assert [labels.number(value) for value in ("neg", "neutral", "pos")] == [0, 1, 2]


@pytest.mark.parametrize("values", [{0, 2}, {"0", "2"}, {"2", " 0"}])
def test_whole_numbers_are_kept(values: set[Any]) -> None:
    labels = infer_labels(values, "d", "label")
    assert (labels.kind, labels.count) == ("classes", 3)
    assert sorted(labels.number(value) for value in values) == [0, 2]


def test_booleans_are_two_classes() -> None:
    labels = infer_labels({True, False}, "d", "label")
    assert labels.count == 2
    assert (labels.number(False), labels.number(True)) == (0, 1)


@pytest.mark.parametrize("values", [{0.0, 2.5}, {"5.000", "1e-3", "3"}])
def test_other_numbers_are_a_regression(values: set[Any]) -> None:
    labels = infer_labels(values, "d", "label")
    assert (labels.kind, labels.count) == ("regression", 1)
    assert all(labels.number(value) == float(value) for value in values)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({None, 1}, "without a value"),
        ({"", "a"}, "without a value"),
        ({-1, 0}, "class id -1"),
        ({"nan", "1.5"}, "nan"),
    ],
)
def test_useless_labels(values: set[Any], match: str) -> None:
    with pytest.raises(DataError, match=match) as caught:
        infer_labels(values, "reviews", "stars")
    assert caught.value.problems[0].code == "K606"
    assert "stars" in str(caught.value)


def test_names_of_the_source_count_classes_that_no_row_has() -> None:
    assert infer_labels({0, 1}, "d", "label", ("a", "b", "c")).count == 3


def test_head_too_small_names_label_head_and_remedy() -> None:
    with pytest.raises(DataError) as caught:
        infer_labels({0, 1, 2}, "d", "label").check_head(2, "reviews")
    (problem,) = caught.value.problems
    assert problem.code == "K611"
    assert "largest label is 2" in problem.message
    assert "2 outputs" in problem.message
    assert "`labels: 3`" in problem.remedy


def test_fractions_need_one_output() -> None:
    labels = infer_labels({0.5}, "d", "label")
    labels.check_head(1, "d")
    with pytest.raises(DataError, match="labels: 1"):
        labels.check_head(2, "d")


def test_a_head_that_fits_passes() -> None:
    check_head(False, 1, 2)
    check_head(False, 1, 5)
