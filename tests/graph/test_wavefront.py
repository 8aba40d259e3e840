"""A graph that runs node by node over many batches gives the bits of the graph, and keeps little."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kroncc.graph.capture import capture
from kroncc.graph.flow import find_flow
from kroncc.graph.model_graph import ModelGraph
from kroncc.graph.rewriter import Rewriter
from kroncc.graph.spill import Spill, is_spilled
from kroncc.graph.wavefront import Wavefront, call_sites

FAMILIES = {
    "bert": "AutoModelForSequenceClassification",
    "albert": "AutoModel",  # one layer called several times
    "gpt2": "AutoModelForCausalLM",
    "llama": "AutoModelForCausalLM",  # rotary embeddings in a region
    "deberta-v2": "AutoModel",  # explicit attention
    "t5": "AutoModel",  # two stacks
}


@pytest.fixture(scope="module")
def graph(tiny: Any) -> Callable[..., ModelGraph]:
    """`graph(family, auto)`: the graph of a tiny model of its own, captured once."""
    known: dict[tuple[str, str], ModelGraph] = {}

    def graph_of(family: str, auto: str = "AutoModel") -> ModelGraph:
        if (family, auto) not in known:
            known[family, auto] = capture(tiny(family, auto))
        found = known[family, auto]
        return found.bind(copy.deepcopy(found.model))

    return graph_of


def _batches(inputs_for: Any, mg: ModelGraph, lengths: tuple[int, ...] = (9, 12, 6)) -> list[dict[str, Any]]:
    return [inputs_for(mg.inputs, batch=2 + at, length=length, seed=at) for at, length in enumerate(lengths)]


def _expected(mg: ModelGraph, batches: list[dict[str, Any]]) -> list[dict[str, torch.Tensor]]:
    with torch.no_grad():
        return [mg.module(**batch) for batch in batches]


def _assert_equal(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [sorted(one) for one in found] == [sorted(one) for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_graph(graph: Any, inputs_for: Any, tmp_path: Path, family: str) -> None:
    mg = graph(family, FAMILIES[family])
    batches = _batches(inputs_for, mg)
    expected = _expected(mg, batches)
    whole = Wavefront(mg, batches)
    whole.advance(None)
    _assert_equal(whole.outputs(), expected)
    stepwise = Wavefront(mg, batches, limit=0, directory=tmp_path)
    for node in mg.graph.nodes:
        stepwise.advance(node)
    _assert_equal(stepwise.outputs(), expected)


@pytest.mark.parametrize("family", ["albert", "llama"])
def test_values_are_those_that_modules_get(graph: Any, inputs_for: Any, family: str) -> None:
    mg = graph(family)
    batches = _batches(inputs_for, mg)
    target = next(fqn for fqn in reversed(mg.fqns()) if len(mg.calls(fqn)[0].args) == 1)
    seen: list[torch.Tensor] = []
    handle = mg.get(target).register_forward_pre_hook(lambda _m, args: seen.append(args[0].clone()))
    _expected(mg, batches)
    handle.remove()
    calls = mg.calls(target)
    wave = Wavefront(mg, batches)
    for place, node in enumerate(calls):
        wave.advance(node)
        assert call_sites(mg.graph)[target, place] is node
        got = wave.values(node.args[0])
        assert all(torch.equal(one, seen[at * len(calls) + place]) for at, one in enumerate(got))


def test_albert_calls_its_layer_once_a_layer(tiny: Any, inputs_for: Any) -> None:
    mg = capture(tiny("albert", num_hidden_layers=3))
    sites = [site for site in call_sites(mg.graph) if site[0].endswith("albert_layers.0.ffn")]
    assert [call for _, call in sites] == [0, 1, 2]
    batches = _batches(inputs_for, mg)
    wave = Wavefront(mg, batches)
    wave.advance(call_sites(mg.graph)[sites[1]])
    Rewriter(mg).swap(sites[0][0], nn.Linear(32, 64))  # seen by the second and the third call only
    wave.advance(None)
    assert not torch.equal(
        wave.outputs()[0]["last_hidden_state"], _expected(mg, batches)[0]["last_hidden_state"]
    )


def test_swapped_modules_are_seen(graph: Any, inputs_for: Any) -> None:
    mg = graph("bert")
    batches = _batches(inputs_for, mg)
    wave = Wavefront(mg, batches)
    second = find_flow(mg.graph).hidden[0]
    wave.advance(second.next)
    Rewriter(mg).swap("encoder.layer.1.output.dense", nn.Linear(64, 32))
    wave.advance(None)
    _assert_equal(wave.outputs(), _expected(mg, batches))


def test_keeps_only_what_is_still_read(tiny: Any, inputs_for: Any) -> None:
    mg = capture(tiny("bert", num_hidden_layers=4))
    batches = _batches(inputs_for, mg)
    wave = Wavefront(mg, batches)
    sizes = []
    for hidden in find_flow(mg.graph).hidden:
        wave.advance(hidden.next)
        kept = [value for node in wave.live() for value in wave.values(node)]
        floats = [value for value in kept if isinstance(value, torch.Tensor) and value.is_floating_point()]
        assert wave.values(hidden)[0].shape == (2, 9, 32)
        assert sum(value.numel() for value in floats) == sum(b["input_ids"].numel() * 32 for b in batches)
        sizes.append(wave.memory)
    assert len(set(sizes[:-1])) == 1
    gone = find_flow(mg.graph).hidden[0]
    with pytest.raises(ValueError, match="not kept"):
        wave.values(gone)
    with pytest.raises(ValueError, match="past"):
        wave.advance(gone)


def test_held_values_outlive_their_use(graph: Any, inputs_for: Any) -> None:
    mg = graph("bert")
    batches = _batches(inputs_for, mg)
    first = find_flow(mg.graph).hidden[0]
    wave = Wavefront(mg, batches)
    wave.hold(first)
    wave.advance(None)
    held, before = wave.values(first), wave.memory
    plain = Wavefront(mg, batches)
    plain.advance(first.next)
    assert all(torch.equal(one, other) for one, other in zip(held, plain.values(first), strict=True))
    wave.release(first)
    assert wave.memory == before - sum(value.nbytes for value in held)
    with pytest.raises(ValueError, match="not kept"):
        wave.values(first)


def test_replaced_values_are_read(graph: Any, tiny: Any, inputs_for: Any) -> None:
    """Another model's stream put in at a layer gives that model's output, for the layers are the same."""
    mine, other = graph("bert"), tiny("bert", seed=3)
    other.encoder.layer[1], other.pooler = mine.model.encoder.layer[1], mine.model.pooler
    theirs = mine.bind(other)
    batches = _batches(inputs_for, mine)
    waves = [Wavefront(mg, batches) for mg in (mine, theirs)]
    ends = [find_flow(mg.graph).hidden[0] for mg in (mine, theirs)]
    for wave, end in zip(waves, ends, strict=True):
        wave.advance(end.next)
    waves[0].replace(ends[0], waves[1].values(ends[1]))
    with pytest.raises(ValueError, match="for 3 batches"):
        waves[0].replace(ends[0], [])
    waves[0].advance(None)
    _assert_equal(waves[0].outputs(), _expected(theirs, batches))


def test_spills_above_the_bound(graph: Any, inputs_for: Any, tmp_path: Path) -> None:
    mg = graph("gpt2", FAMILIES["gpt2"])
    batches = _batches(inputs_for, mg)
    node = call_sites(mg.graph)["transformer.h.1.mlp.c_fc", 0]
    free = Wavefront(mg, batches)
    free.advance(node)
    bound = free.memory // 2
    wave = Wavefront(mg, batches, limit=bound, directory=tmp_path)
    wave.advance(node)
    assert 0 < wave.memory <= bound
    values = wave.values(node.args[0])
    assert [is_spilled(value) for value in values] == [False, True, True]
    assert not list(tmp_path.iterdir())  # the files have no name any more
    assert all(torch.equal(a, b) for a, b in zip(values, free.values(node.args[0]), strict=True))


def test_spilled_views_keep_strides_and_aliases() -> None:
    base = torch.arange(24, dtype=torch.bfloat16).reshape(4, 6)
    spill = Spill()
    views = [spill(base), spill(base.t()[1:3]), spill(base[0].expand(5, 6)), spill(base[:0])]
    for view, source in zip(views, [base, base.t()[1:3], base[0].expand(5, 6), base[:0]], strict=True):
        assert view.stride() == source.stride()
        assert torch.equal(view, source)
    views[0][0, 1] = -1
    assert views[2][3, 1] == views[1][0, 0] == -1
    assert base[0, 1] == 1
    assert spill(torch.empty(0, 3)).shape == (0, 3)


def test_modes_and_gradients_are_left_alone(graph: Any, inputs_for: Any) -> None:
    mg = graph("bert", FAMILIES["bert"]).train()
    model = mg.model
    mg.get("bert.encoder.layer.0.output.dropout").eval()
    modes = {name: part.training for name, part in mg.module.named_modules()}
    batches = _batches(inputs_for, mg)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wave = Wavefront(mg, batches)
    wave.advance(None)
    assert {name: part.training for name, part in mg.module.named_modules()} == modes
    assert not any(value["logits"].requires_grad for value in wave.outputs())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    _assert_equal(wave.outputs(), _expected(mg.eval(), batches))


def test_batches_may_be_made_when_asked_for(graph: Any, inputs_for: Any) -> None:
    mg = graph("bert")
    kept = _batches(inputs_for, mg)

    class Lazy:
        def __len__(self) -> int:
            return len(kept)

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return {name: tensor.clone() for name, tensor in kept[index].items()} | {"labels": torch.ones(2)}

    wave = Wavefront(mg, Lazy())  # type: ignore[arg-type]
    wave.advance(None)
    _assert_equal(wave.outputs(), _expected(mg, kept))
    with pytest.raises(ValueError, match="takes an input 'token_type_ids'"):
        Wavefront(mg, [{"input_ids": kept[0]["input_ids"]}]).advance(None)
