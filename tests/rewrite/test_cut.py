"""Cutting units out of tensors, the attributes that follow, and programs that differ in sizes alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from kroncc.api import PassError
from kroncc.graph.atoms import size_of, tensors_of
from kroncc.graph.axes import Axes, Span
from kroncc.graph.capture import capture
from kroncc.graph.compare import difference
from kroncc.graph.units import heads, neurons
from kroncc.rewrite.cut import Cut, Narrowed, apply_cuts, keep_units, narrowed
from kroncc.rewrite.narrow import Group, narrow


@given(
    outer=st.integers(1, 3),
    size=st.integers(1, 5),
    inner=st.integers(1, 3),
    before=st.integers(0, 2),
    data=st.data(),
)
def test_kept_units_are_those_of_the_layout(outer, size, inner, before, data):
    kept = sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1)))
    shape = [2] * before + [outer * size * inner] + [3]
    value = torch.randn(shape)
    got = keep_units(value, Span(("w",), before, outer, size, inner), kept)
    places = [(o * size + u) * inner + i for o in range(outer) for u in kept for i in range(inner)]
    assert np.array_equal(got.numpy(), np.take(value.numpy(), places, axis=before))


def tied():
    model = nn.Module()
    model.table, model.head, model.up = nn.Embedding(7, 6), nn.Linear(6, 7), Conv1D(5, 6)
    model.head.weight = model.table.weight
    return model


CUT = Cut(
    (
        Span(("table.weight", "head.weight"), 1, 1, 6, 1),
        Span(("up.weight",), 0, 1, 6, 1),
    ),
    6,
    2,
    (1, 4),
)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_ties_and_sizes_follow(device):
    model = tied().to(device)
    model.head.weight = model.table.weight
    before = model.table.weight
    changes = narrowed(model, [CUT])
    assert {fqn: one.tensors for fqn, one in changes.items()} == {
        "table": {"weight": (None, 2)},
        "head": {"weight": (None, 2)},
        "up": {"weight": (2, None)},
    }
    apply_cuts(model, list(changes), list(changes.values()), [CUT])
    assert model.head.weight is model.table.weight
    assert (model.table.embedding_dim, model.head.in_features, model.up.nx) == (2, 2, 2)
    assert device == "meta" or torch.equal(model.table.weight, before[:, [1, 4]])
    assert before.shape == (7, 6)


def test_modules_of_another_head_are_passed_over():
    model = tied()
    apply_cuts(model, ["gone", "up"], [Narrowed(tensors={"weight": (2, None)})] * 2)
    assert model.up.weight.shape == (2, 5)
    assert model.up.nf == 5


def test_other_extents_stay_as_they_are_found():
    model = tied()
    model.head = nn.Linear(6, 3)
    apply_cuts(model, ["head"], [Narrowed(tensors={"weight": (None, 2)})])
    assert model.head.weight.shape == (3, 2)
    assert model.head.out_features == 3


def test_what_is_cut_survives_json():
    change = Narrowed(tensors={"weight": (None, 3)}, attributes={"num_heads": 3})
    assert Narrowed.model_validate_json(change.model_dump_json(exclude_none=True)) == change


def test_a_forward_that_fixes_a_size_is_refused(tiny, monkeypatch):
    model = tiny("bert", num_hidden_layers=1)
    graph = capture(model)
    axes = Axes(graph)
    (units,) = neurons(axes)
    module = type(model.encoder.layer[0].output)
    source = module.forward
    monkeypatch.setattr(module, "forward", lambda self, x, y: source(self, x.view(*x.shape[:2], 64), y))
    with pytest.raises(PassError, match="BertModel does not run narrower") as caught:
        narrow(graph, axes, [Group(units.atom, 20)])
    assert caught.value.problems[0].code == "K485"


def test_the_smallest_set_of_attributes(tiny):
    graph = capture(tiny("gpt2", n_layer=1))
    axes = Axes(graph)
    (units,) = heads(axes)
    modules, cuts = narrow(graph, axes, [Group(units.atom, 3, (0, 1, 3))])
    assert modules["h.0.attn"].attributes == {"num_heads": 3, "split_size": 24}
    assert [cut.keep for cut in cuts] == [3]
    assert graph.model.h[0].attn.split_size == 32


def test_other_programs_are_told_apart(tiny):
    before = capture(tiny("bert", num_hidden_layers=1))

    def unchanged(node):
        return [[size_of(size) for size in value.shape] for value in tensors_of(node)]

    assert difference(before, before.copy(), unchanged) == ""
    assert difference(before, capture(tiny("bert")), unchanged)
    scaled = before.copy()
    scaled.extras["encoder.layer.0.attention.self.sdpa"].scale = 1.0
    assert "sdpa" in difference(before, scaled, unchanged)
    longer = before.copy()
    arange = next(
        node for node in longer.graph.nodes if str(node.target) == "aten.add.Tensor" and 0 in node.args
    )
    arange.args = (arange.args[0], 1)
    assert "of other values" in difference(before, longer, unchanged)
    assert "gives [" in difference(
        before, before.copy(), lambda node: [[7] * len(one) for one in unchanged(node)]
    )


def test_one_head_left_runs_the_same_program(tiny):
    graph = capture(tiny("bert", num_hidden_layers=1))
    axes = Axes(graph)
    (units,) = heads(axes)
    modules, _ = narrow(graph, axes, [Group(units.atom, 1, (2,))])
    assert modules["encoder.layer.0.attention.self.query"].tensors["weight"] == (8, None)
