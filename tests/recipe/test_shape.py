import math
from typing import Any, Literal

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field

from kroncc.recipe.shape import Fault, describe, faults


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    depth: int = Field(gt=0)


class Options(BaseModel):
    """Every kind of field that options of passes are made of."""

    model_config = ConfigDict(extra="forbid")
    rank: int = Field(ge=1, le=64)
    ratio: float | None = Field(None, gt=1)
    shape: tuple[int, int] | None = None
    init: Literal["nearest", "random"] = "nearest"
    names: list[str] = Field(default_factory=list, max_length=3)
    table: dict[str, list[int]] = Field(default_factory=dict)
    inner: Inner | list[Inner] | None = None
    on: bool = False
    word: str = Field("a", pattern="^[a-z]+$", max_length=5)
    step: int = Field(0, multiple_of=4)
    one: Literal[1, "1", True] | None = None


SCHEMA = Options.model_json_schema()


def _faults(value: Any) -> list[Fault]:
    return list(faults(value, SCHEMA))


@pytest.mark.parametrize(
    ("value", "code", "path", "expected"),
    [
        ({}, "K131", (), "rank: a whole number at least 1, at most 64"),
        ({"rank": "3"}, "K132", ("rank",), "a whole number at least 1, at most 64"),
        ({"rank": True}, "K132", ("rank",), "a whole number at least 1, at most 64"),
        ({"rank": 1.0}, "K132", ("rank",), "a whole number at least 1, at most 64"),
        ({"rank": 65}, "K134", ("rank",), "at least 1, at most 64"),
        ({"rank": 1, "ratio": 1}, "K134", ("ratio",), "above 1"),
        ({"rank": 1, "ratio": "x"}, "K132", ("ratio",), "a number above 1"),
        ({"rank": 1, "ratio": math.inf}, "K134", ("ratio",), "above 1"),
        ({"rank": 1, "shape": [1]}, "K134", ("shape",), "2 entries"),
        ({"rank": 1, "shape": [1, "2"]}, "K132", ("shape", 1), "a whole number"),
        ({"rank": 1, "shape": 3}, "K132", ("shape",), "a list [a whole number, a whole number]"),
        ({"rank": 1, "init": "nearst"}, "K133", ("init",), "'nearest' or 'random'"),
        ({"rank": 1, "names": ["a"] * 4}, "K134", ("names",), "at most 3 entries"),
        ({"rank": 1, "names": [1]}, "K132", ("names", 0), "text"),
        ({"rank": 1, "table": {"a": [1, "b"]}}, "K132", ("table", "a", 1), "a whole number"),
        ({"rank": 1, "inner": {"depth": 0}}, "K134", ("inner", "depth"), "above 0"),
        ({"rank": 1, "inner": 3}, "K132", ("inner",), "a mapping, or a list (a mapping each)"),
        ({"rank": 1, "on": "yes"}, "K132", ("on",), "true or false"),
        ({"rank": 1, "word": "A"}, "K134", ("word",), "matching ^[a-z]+$, at most 5 characters"),
        ({"rank": 1, "step": 3}, "K134", ("step",), "a multiple of 4"),
    ],
)
def test_faults(value: Any, code: str, path: tuple[str | int, ...], expected: str):
    (fault,) = faults(value, SCHEMA)
    assert (fault.code, fault.path, fault.expected) == (code, path, expected)


def test_unknown_key_names_the_nearest():
    (fault,) = faults({"rank": 1, "ration": 2}, SCHEMA)
    assert (fault.code, fault.path, fault.is_key) == ("K130", ("ration",), True)
    assert fault.remedy.startswith("did you mean 'ratio'")
    assert "shape" in fault.expected


def test_all_faults_are_found():
    assert len(_faults({"a": 1, "b": 2, "on": 1, "table": {"x": 1, "y": ["z"]}})) == 6


def test_wrong_kind_says_how_to_write_it():
    assert "true or false" in _faults({"rank": 1, "on": "on"})[0].remedy
    assert "leading zero" in _faults({"rank": "010"})[0].remedy
    assert "quotes" in _faults({"rank": 1, "word": 3})[0].remedy


def test_names_of_a_mapping():
    schema = {
        "type": "object",
        "patternProperties": {"^[a-z]+$": {"type": "integer"}},
        "propertyNames": {"maxLength": 3},
    }
    assert [(f.code, f.path) for f in faults({"a": 1, "b": "x", "B": 1, "abcd": 1}, schema)] == [
        ("K132", ("b",)),
        ("K137", ("B",)),
        ("K137", ("abcd",)),
    ]


def test_describe_follows_references():
    assert describe({"$ref": "#/$defs/Inner"}, SCHEMA) == "a mapping"
    assert describe({"$ref": "#/$defs/Nothing"}, SCHEMA) == "a value"


def test_references_in_a_circle_end():
    assert not list(faults(3, {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}))


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-70, 70)
    | st.sampled_from([0.5, 1.5, -2.5])
    | st.sampled_from(["a", "nearest", "A1", "1"])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["depth", "a"]), inner),
    max_leaves=6,
)
documents = (
    st.fixed_dictionaries({}, optional=dict.fromkeys([*SCHEMA["properties"], "other"], values)) | values
)


@given(documents)
def test_agrees_with_jsonschema(value: Any):
    assert (not _faults(value)) == jsonschema.Draft202012Validator(SCHEMA).is_valid(value)


@given(documents)
def test_what_passes_is_what_pydantic_takes(value: Any):
    if not _faults(value):
        Options.model_validate(value)


WAYS = {
    "type": "object",
    "properties": {"a": {}, "b": {}, "ratio": {}, "params": {}},
    "additionalProperties": False,
    "oneOf": [
        {"anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
        {"required": ["ratio"]},
        {"required": ["params"]},
    ],
}


@pytest.mark.parametrize("value", [{"a": 1}, {"b": 1, "a": 2}, {"ratio": 2}, {"params": 3, "a": None}])
def test_one_way_is_taken(value: Any):
    assert list(faults(value, WAYS)) == []


@pytest.mark.parametrize("value", [{}, {"a": None}, {"a": 1, "ratio": 2}, {"ratio": 2, "params": 3}])
def test_no_way_or_two(value: Any):
    (fault,) = faults(value, WAYS)
    assert fault.code == "K135"
    assert fault.message == "give exactly one of: `a` and/or `b`; `ratio`; `params`"


def test_an_unknown_key_is_not_blamed_twice():
    assert [fault.code for fault in faults({"ratoi": 2}, WAYS)] == ["K130"]
