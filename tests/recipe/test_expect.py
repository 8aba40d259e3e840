import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kroncc.errors import RecipeError
from kroncc.recipe.expect import parse_expectation

VALUES = {"teacher.accuracy": 0.9, "task.accuracy": 0.85, "factored.params": 14_655_754.0, "task-a.f1": 0.5}


def judge(key: str, text: str) -> bool | None:
    return parse_expectation(key, text).evaluate(VALUES)


@pytest.mark.parametrize(
    ("key", "text", "met"),
    [
        ("factored.params", "== 14_655_754", True),
        ("factored.params", "!= 14655754", False),
        ("factored.params", "<= 15e6", True),
        ("factored.params", "<15_000_000", True),
        ("factored.params", "> 1.5e7", False),
        ("task.accuracy", ">= 0.99 * teacher.accuracy", False),
        ("task.accuracy", ">= teacher.accuracy - .1", True),
        ("task.accuracy", ">= teacher.accuracy-0.01", False),
        ("task.accuracy", ">= teacher.accuracy-task-a.f1", True),
        ("task-a.f1", "== 1 / (1 + 1)", True),
        ("task-a.f1", ">= -(-0.5)", True),
        ("task-a.f1", "> - - 0.4", True),
        ("task-a.f1", "< 1 / 0", False),
        ("task-a.f1", "< 0 / 0", False),
    ],
)
def test_evaluates(key: str, text: str, met: bool):
    assert judge(key, text) is met


def test_unknown_values_are_not_judged():
    assert judge("later.accuracy", ">= 0.5") is None
    assert judge("task.accuracy", ">= later.accuracy") is None


def test_names():
    found = parse_expectation("task.accuracy", ">= 2 * a-b.f1 + small.fidelity.cosine")
    assert found.names() == {"task.accuracy", "a-b.f1", "small.fidelity.cosine"}


def test_describe_gives_the_numbers():
    text = parse_expectation("task.accuracy", ">= 0.99 * teacher.accuracy").describe(VALUES)
    assert text == "task.accuracy = 0.85, wanted >= 0.99 * teacher.accuracy = 0.891 (teacher.accuracy = 0.9)"


def test_describe_says_what_is_missing():
    text = parse_expectation("x.accuracy", ">= 0.99 * y.accuracy").describe({})
    assert "x.accuracy is not known yet" in text
    assert "y.accuracy is not known yet" in text


def test_describe_large_numbers_with_separators():
    assert "14_655_754" in parse_expectation("factored.params", "<= 1").describe(VALUES)


@pytest.mark.parametrize(
    ("text", "column"),
    [
        ("0.5", 1),
        ("", 1),
        ("> ", 3),
        (">= 0.5 *", 9),
        (">= (0.5", 8),
        (">= 0.5)", 7),
        (">= 1 2", 6),
        (">= teacher", 4),
        (">= 1__0", 4),
        (">= 1_", 4),
        (">= 2 ** 3", 7),
        (">= __import__('os')", 4),
        (">= 15M", 6),
        (">= 99%", 6),
        ("= 3", 1),
        (">= 0.5 and 1", 8),
    ],
)
def test_errors_point_at_the_fault(text: str, column: int):
    with pytest.raises(RecipeError) as caught:
        parse_expectation("task.accuracy", text)
    problem = caught.value.problems[0]
    assert problem.code == "K170"
    caret = problem.expected.splitlines()[-1]
    assert caret == " " * 4 + " " * (column - 1) + "^", problem.expected


@pytest.mark.parametrize("key", ["factored", "a b.c", ".a", "a.", "a.b-c", ""])
def test_bad_key(key: str):
    with pytest.raises(RecipeError) as caught:
        parse_expectation(key, "<= 1")
    assert caught.value.problems[0].code == "K171"


@pytest.mark.parametrize("text", ["<= " + "(" * 200 + "1", "<= " + "-" * 200 + "1", "<= " + "1+" * 400 + "1"])
def test_size_is_bounded(text: str):
    with pytest.raises(RecipeError):
        parse_expectation("a.b", text)


numbers = st.floats(0.001, 1e6).map(lambda value: f"{value:.6g}") | st.integers(0, 10**6).map(
    lambda n: f"{n:_}"
)
arithmetic = st.recursive(
    numbers,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda p: f"{p[0]} {p[1]} {p[2]}"),
        inner.map(lambda text: f"({text})"),
        inner.map(lambda text: f"-{text}"),
    ),
    max_leaves=12,
)


@given(arithmetic)
def test_arithmetic_agrees_with_python(text: str):
    if len(text) > 400:
        return
    try:
        wanted = eval(text)
    except ZeroDivisionError:
        return
    found = parse_expectation("a.b", f">= {text}").term.evaluate({})
    assert math.isclose(found, wanted, rel_tol=1e-9, abs_tol=1e-12) or not math.isfinite(wanted)


@given(st.text("<>=!0123456789._+-*/()ab \n", max_size=30))
def test_any_text_parses_or_is_refused(text: str):
    try:
        found = parse_expectation("a.b", text)
    except RecipeError:
        return
    found.evaluate(dict.fromkeys(found.names(), 1.0))
    found.describe({})
