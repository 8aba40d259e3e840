"""Dimensions as products: reshapes split and join them, equal ones share factors, misfits are pinned."""

from __future__ import annotations

import math

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st

from kroncc.graph.atoms import Atom, extent_size, fresh, leaves, pin, quotient, refine, regroup, unify

B, L = sympy.symbols("B L", integer=True, positive=True)


def sizes(extent):
    return [atom.size for atom in leaves(extent)]


def test_a_reshape_splits_what_it_must():
    hidden = fresh(768)
    heads, size = regroup([hidden], [12, 64], "test")
    assert (sizes(heads), sizes(size), sizes(hidden)) == ([12], [64], [12, 64])
    (back,) = regroup([heads, size], [768], "test")
    assert leaves(back) == leaves(hidden)


def test_a_reshape_moves_symbols_too():
    batch, length = fresh(B), fresh(L)
    (flat,) = regroup([batch, length], [B * L], "test")
    assert regroup([flat], [B, L], "test") == [batch, length]
    merged = fresh(4 * B)
    first, second = regroup([merged], [B, 4], "test")
    assert (sizes(first), sizes(second)) == ([B], [4])


def test_equal_dimensions_share_factors_that_are_found_later():
    queries, keys = fresh(8), fresh(2)
    group = fresh(4)
    unify(queries, [*keys, *group], "test")
    assert leaves(queries) == leaves([*keys, *group])
    one, other = fresh(24), fresh(24)
    unify(one, other, "test")
    regroup([one], [4, 6], "test")
    assert sizes(other) == [4, 6]


def test_what_does_not_line_up_is_pinned():
    one = fresh(24)
    regroup([one], [4, 6], "test")
    made = regroup([one], [3, 8], "regrouped")
    assert all("regrouped" in atom.pins for atom in leaves(one))
    assert all("regrouped" in atom.pins for extent in made for atom in extent)


def test_a_pin_stays_on_parts_and_on_what_is_one_with_them():
    one, other = fresh(12), fresh(12)
    pin([one], "stuck")
    unify(one, other, "test")
    outer, inner = refine(leaves(other)[0], 3)
    assert "stuck" in outer.pins
    assert "stuck" in inner.pins


def test_size_one_has_no_factors():
    assert fresh(1) == []
    assert extent_size([]) == 1
    assert regroup([[], fresh(6), []], [1, 6], "test")[0] == []


@pytest.mark.parametrize(
    ("size", "divisor", "expected"),
    [
        (12, 3, 4),
        (12, 5, None),
        (4, 12, None),
        (4 * B, B, 4),
        (4 * B, 4, B),
        (B * L, L, B),
        (B, L, None),
        (4, B, None),
        (B, 2, None),
    ],
)
def test_quotients(size, divisor, expected):
    assert quotient(size, divisor) == expected


@given(st.lists(st.sampled_from([2, 3, 5]), min_size=1, max_size=6), st.data())
def test_any_grouping_of_factors_comes_back(factors, data):
    """Split a dimension by two groupings of the same factors: places agree with those of a real reshape."""
    total = math.prod(factors)
    cut = data.draw(st.integers(0, len(factors)))
    extent = fresh(total)
    grouped = regroup([extent], [math.prod(factors[:cut]), math.prod(factors[cut:])], "test")
    fine = regroup(grouped, factors, "test")
    assert [extent_size(one) for one in fine] == factors
    assert not any(atom.pins for one in fine for atom in leaves(one))
    atom = fine[0][0]
    at = leaves(extent).index(atom)
    inner = extent_size(leaves(extent)[at + 1 :])
    places = torch.arange(total).reshape(factors).movedim(0, 0).flatten(1)[-1] if len(factors) > 1 else None
    if places is not None:
        assert set((places // inner % atom.size).tolist()) == {atom.size - 1}


def test_roots_are_shared():
    one, other = Atom(3), Atom(3)
    unify([one], [other], "test")
    assert one.root() is other.root()
