"""What loss terms may compare, by shapes alone."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kroncc.errors import PlanError
from kroncc.plan.terms import (
    check_term,
    needed_taps,
    projected_widths,
    resolve_layers,
    term_names,
    weight_at,
)
from kroncc.recipe.schema import LossSpec

HIDDEN = (2, 7, 32)
SCORES = (2, 4, 7, 7)


def spec_of(kind: str = "mse", at: str = "hidden", **options: Any) -> LossSpec:
    return LossSpec.model_validate({"kind": kind, "at": at, **options})


def code_of(spec: LossSpec, student: Any, teacher: Any) -> str:
    with pytest.raises(PlanError) as caught:
        check_term(spec, {spec.at: student}, {spec.at: teacher})
    return caught.value.problems[0].code


@pytest.mark.parametrize(
    ("layers", "student", "teacher", "pairs"),
    [
        (None, 3, 3, [(0, 0), (1, 1), (2, 2)]),
        (None, 4, 12, [(0, 2), (1, 5), (2, 8), (3, 11)]),
        ("uniform", 6, 12, [(0, 1), (1, 3), (2, 5), (3, 7), (4, 9), (5, 11)]),
        ("uniform", 3, 3, [(0, 0), (1, 1), (2, 2)]),
        ("last", 3, 12, [(2, 11)]),
        ("last", 12, 3, [(11, 2)]),
        ([(0, 5), (-1, -1)], 2, 6, [(0, 5), (1, 5)]),
    ],
)
def test_layer_maps(layers: Any, student: int, teacher: int, pairs: list[tuple[int, int]]) -> None:
    assert resolve_layers(spec_of(layers=layers), student, teacher) == pairs


@given(st.integers(1, 40), st.integers(0, 60))
def test_uniform_map_rises_and_ends_at_the_last_layer(student: int, more: int) -> None:
    teacher = student + more
    pairs = resolve_layers(spec_of(), student, teacher)
    assert [at for at, _ in pairs] == list(range(student))
    targets = [to for _, to in pairs]
    assert targets == sorted(set(targets))
    assert targets[-1] == teacher - 1
    assert targets[0] >= 0
    if teacher % student == 0:
        assert targets == [(at + 1) * (teacher // student) - 1 for at in range(student)]


@pytest.mark.parametrize(
    ("layers", "student", "teacher"),
    [(None, 4, 3), ("uniform", 4, 3), ([(4, 0)], 4, 6), ([(0, 6)], 4, 6), ([(-5, 0)], 4, 6), ("last", 0, 3)],
)
def test_impossible_layer_maps(layers: Any, student: int, teacher: int) -> None:
    with pytest.raises(PlanError, match="K740"):
        resolve_layers(spec_of(layers=layers), student, teacher)


@pytest.mark.parametrize(
    ("weight", "progress", "expected"),
    [
        (2.0, 0.3, 2.0),
        ([(0.0, 1.0), (1.0, 0.0)], 0.25, 0.75),
        ([(0.2, 1.0), (0.4, 3.0), (0.8, 0.0)], 0.1, 1.0),
        ([(0.2, 1.0), (0.4, 3.0), (0.8, 0.0)], 0.3, 2.0),
        ([(0.2, 1.0), (0.4, 3.0), (0.8, 0.0)], 0.6, 1.5),
        ([(0.2, 1.0), (0.4, 3.0), (0.8, 0.0)], 0.9, 0.0),
        ([(0.5, 4.0)], 0.0, 4.0),
    ],
)
def test_weights(weight: Any, progress: float, expected: float) -> None:
    assert weight_at(spec_of(weight=weight), progress) == pytest.approx(expected)


def test_needed_taps_leave_out_logits_and_repeats() -> None:
    specs = [
        spec_of(),
        spec_of("kl", "logits"),
        spec_of("task", "logits"),
        spec_of("cosine"),
        spec_of(at="embeddings"),
    ]
    assert needed_taps(specs) == (("hidden", "embeddings"), ("hidden", "embeddings"))


def test_names_are_distinct() -> None:
    specs = [spec_of("task", "logits"), spec_of(), spec_of(layers="last"), spec_of("kl", "logits"), spec_of()]
    assert term_names(specs) == ["task", "mse(hidden)", "mse(hidden)#2", "kl(logits)", "mse(hidden)#3"]


def test_what_compares() -> None:
    assert check_term(spec_of(), {"hidden": [HIDDEN] * 2}, {"hidden": [(2, 7, 64)] * 4}) == [(0, 1), (1, 3)]
    assert check_term(spec_of("task", "logits"), {}, None) == []


@pytest.mark.parametrize(
    ("spec", "student", "teacher", "code"),
    [
        (spec_of(), [HIDDEN] * 3, [HIDDEN] * 2, "K740"),
        (spec_of(at="attention.scores"), [SCORES], [(2, 8, 7, 7)], "K741"),
        (spec_of("kl", "logits"), [(2, 3)], [(2, 2)], "K747"),
        (spec_of("kl", "logits"), [(2, 1)], [(2, 1)], "K745"),
        (spec_of(), [HIDDEN], [(2, 32)], "K748"),
        (spec_of(temperature=2.0), [HIDDEN], [HIDDEN], "K743"),
        (spec_of("kl", "attention.probs", temperature=2.0), [SCORES], [SCORES], "K743"),
        (spec_of("task", "hidden"), [HIDDEN], [HIDDEN], "K749"),
        (spec_of(weight=[(0.5, 1.0), (0.5, 2.0)]), [HIDDEN], [HIDDEN], "K744"),
        (spec_of(weight=[]), [HIDDEN], [HIDDEN], "K744"),
    ],
)
def test_what_does_not_compare(spec: LossSpec, student: Any, teacher: Any, code: str) -> None:
    assert code_of(spec, student, teacher) == code


def test_missing_tap_names_the_nearest() -> None:
    with pytest.raises(PlanError, match=r"K742.*student") as caught:
        check_term(spec_of(at="hiden"), {"hidden": [HIDDEN]}, {"hidden": [HIDDEN]})
    assert "'hidden'" in caught.value.problems[0].remedy


def test_missing_teacher() -> None:
    with pytest.raises(PlanError, match="K746"):
        check_term(spec_of(), {"hidden": [HIDDEN]}, None)


def test_only_widths_of_features_are_projected() -> None:
    assert projected_widths(spec_of(), HIDDEN, (2, 7, 64)) == (32, 64)
    assert projected_widths(spec_of(), HIDDEN, HIDDEN) is None
    assert projected_widths(spec_of(at="attention.scores"), SCORES, (2, 4, 9, 9)) is None


def test_imports_no_torch() -> None:
    code = "import sys, kroncc.plan.terms; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
