"""The pass: one set of weights for several layers; copied weights as reference, files, caches, refusals."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from kroncc.api import PassError
from kroncc.compiler import compile_recipe
from kroncc.graph.capture import capture
from kroncc.graph.cost import model_cost
from kroncc.graph.printer import format_graph
from kroncc.graph.roles import find_roles
from kroncc.graph.verify import same_structure, structure_of
from kroncc.model.load import load
from kroncc.model.save import save_model
from kroncc.recipe.loader import load_recipe
from kroncc.recipe.schema import PassCall, Scope
from kroncc.rewrite.pipeline import build_pass, compress_graph

RECIPE = Path(__file__).parents[2] / "recipes" / "share-layers-minilm.yaml"
DEPTH = {
    "bert": {"num_hidden_layers": 3},
    "distilbert": {"n_layers": 3},
    "gpt2": {"n_layer": 3},
    "llama": {"num_hidden_layers": 3},
    "vit": {"num_hidden_layers": 3},
    "t5": {"num_layers": 3, "num_decoder_layers": 3},
}


@pytest.fixture(scope="module")
def captured(tiny):
    """`captured(...)`: the graph of a fresh small model of three layers; each architecture is traced once."""
    graphs = {}

    def make(family, auto="AutoModel", **changes):
        key = family, auto, str(changes)
        model = tiny(family, auto, **(DEPTH[family] | changes))
        graphs[key] = graphs.get(key) or capture(model)
        return graphs[key].bind(model)

    return make


def call(*targets, **options):
    return PassCall(name="share-layers", scope=Scope(targets=list(targets)), options=options)


def rewritten(graph, **options):
    resolved = build_pass("share-layers", options).resolve_tree(graph, (), None, 0)
    resolved.options.rewrite(graph.model, resolved.sites)
    return resolved


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", DEPTH)
def test_equals_a_dense_model_with_copied_weights(captured, inputs_for, family):
    graph = captured(family)
    dense = copy.deepcopy(graph.model)
    resolved = rewritten(graph, groups=[[0, 2]])
    state = dense.state_dict()
    for stack in resolved.sites:
        for name in [name for name in state if name.startswith(f"{stack}.0.")]:
            twin = name.replace(f"{stack}.0.", f"{stack}.2.")
            if twin in state:  # T5's position bias is the first block's own
                state[twin] = state[name]
    dense.load_state_dict(state)
    given = inputs_for(graph.inputs)
    with torch.no_grad():
        assert torch.equal(graph.model(**given)[0], dense(**given)[0])
    stacks = [graph.model.get_submodule(stack) for stack in resolved.sites]
    assert count(dense) - count(graph.model) == sum(count(stack[2]) for stack in stacks)


def test_golden(captured):
    graph = captured("bert")
    before = format_graph(graph)
    done = compress_graph(graph, [call()])
    assert [(one.name, one.options, one.sites) for one in done.structure.passes] == [
        ("share-layers", {"groups": [[[0, 1, 2]]], "start": "first"}, ("encoder.layer",))
    ]
    assert done.skipped == ()
    assert format_graph(graph) == before
    assert graph.tied("encoder.layer.0.intermediate.dense") == (
        "encoder.layer.1.intermediate.dense",
        "encoder.layer.2.intermediate.dense",
    )
    assert find_roles(graph)["encoder.layer.2.intermediate.dense"].layer == 2


@pytest.mark.parametrize("start", ["first", "mean", 1])
def test_starts(captured, start):
    graph = captured("bert")
    were = [layer.output.dense.weight.detach().clone() for layer in graph.model.encoder.layer]
    rewritten(graph, start=start)
    want = torch.stack(were).double().mean(0).float() if start == "mean" else were[int(start != "first")]
    for layer in graph.model.encoder.layer:
        assert torch.allclose(layer.output.dense.weight, want, atol=1e-7)


@pytest.mark.parametrize(
    ("layers", "groups", "want"),
    [
        (6, 1, [[0, 1, 2, 3, 4, 5]]),
        (6, 3, [[0, 1], [2, 3], [4, 5]]),
        (7, 3, [[0, 1, 2], [3, 4], [5, 6]]),
        (5, 4, [[0, 1]]),
        (6, [[0, 3], [1, 4], [2, 5]], [[0, 3], [1, 4], [2, 5]]),
        (6, [[0, 1], [2]], [[0, 1]]),
    ],
)
def test_groups(tiny, layers, groups, want):
    model = tiny("vit", num_hidden_layers=layers).to("meta")
    resolved = build_pass("share-layers", {"groups": groups}).resolve_tree(capture(model), (), None, 0)
    assert [list(group) for group in resolved.options.groups[0]] == want


def test_gradients_add(captured, inputs_for):
    graph = captured("bert")
    rewritten(graph)
    dense = copy.deepcopy(graph.model)
    for layer in range(3):  # a copy of the weights for each layer again
        dense.encoder.layer[layer] = copy.deepcopy(dense.encoder.layer[layer])
    given = inputs_for(graph.inputs)
    graph.module(**given)["last_hidden_state"].square().sum().backward()
    dense(**given)[0].square().sum().backward()
    want = sum(layer.output.dense.weight.grad for layer in dense.encoder.layer)
    assert len(set(dense.encoder.parameters())) > len(set(graph.model.encoder.parameters()))
    got = graph.model.encoder.layer[1].output.dense.weight.grad
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-5 * want.abs().max())


@pytest.mark.parametrize(("family", "auto"), [("bert", "AutoModelForMaskedLM"), ("t5", "AutoModel")])
def test_saves_once_and_reloads_tied(captured, tmp_path, inputs_for, family, auto):
    graph = captured(family, auto)
    model = graph.model
    done = compress_graph(graph, [call(start="mean")])
    save_model(model, tmp_path / "m", done.structure)
    cost = model_cost(graph)
    assert cost.params == count(model)
    file = (tmp_path / "m" / "model.safetensors").stat().st_size
    assert cost.bytes == 4 * count(model)
    assert cost.bytes < file < cost.bytes + 16_000  # the header
    for again in (load(tmp_path / "m"), type(model).from_pretrained(tmp_path / "m").eval()):
        assert count(again) == count(model)
        given = inputs_for(graph.inputs)
        with torch.no_grad():
            assert torch.equal(again(**given)[0], model(**given)[0])
    save_model(again, tmp_path / "twice", done.structure)
    assert count(load(tmp_path / "twice")) == count(model)


def test_ties_hold_while_training_after_a_reload(captured, tmp_path, inputs_for):
    graph = captured("bert")
    done = compress_graph(graph, [call(groups=[[0, 1]])])
    save_model(graph.model, tmp_path / "m", done.structure)
    again = AutoModel.from_pretrained(tmp_path / "m")
    before = again.encoder.layer[1].output.dense.weight.detach().clone()
    again(**inputs_for(graph.inputs))[0].square().sum().backward()
    torch.optim.SGD(again.parameters(), 1e-3).step()
    layers = [layer.output.dense.weight for layer in again.encoder.layer]
    assert torch.equal(layers[0], layers[1])
    assert not torch.equal(layers[0], layers[2])
    assert not torch.equal(layers[0], before)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_generates_with_a_cache(captured, inputs_for, family):
    graph = captured(family, "AutoModelForCausalLM")
    rewritten(graph, groups=1)
    ids = inputs_for(["input_ids"], 2, 6)["input_ids"]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    plain = graph.model.generate(input_ids=ids, use_cache=False, **options)
    assert torch.equal(graph.model.generate(input_ids=ids, **options), plain)


def test_targets_choose_what_is_shared(captured, tmp_path, inputs_for):
    graph = captured("bert")
    done = compress_graph(graph, [call("@ffn.*", "@attention.q")])
    first, last = graph.model.encoder.layer[0], graph.model.encoder.layer[2]
    assert first.intermediate.dense.weight is last.intermediate.dense.weight
    assert first.attention.self.query.bias is last.attention.self.query.bias
    assert first.attention.self.key.weight is not last.attention.self.key.weight
    assert first.output.LayerNorm.weight is not last.output.LayerNorm.weight
    assert done.structure.passes[0].sites[0] == "encoder.layer"
    assert len(done.structure.passes[0].sites) == 1 + 3 * 3
    save_model(graph.model, tmp_path / "m", done.structure)
    given = inputs_for(graph.inputs)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "m")(**given)[0], graph.model(**given)[0])


def test_what_has_no_equal_remains_its_own(captured):
    done = rewritten(captured("t5"))
    assert done.skipped.keys() == {
        f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias" for stack in ("encoder", "decoder")
    }
    some = compress_graph(captured("bert"), [call("@ffn.up[0:2]")])
    assert some.structure.passes == ()
    assert {one.fqn for one in some.skipped} == {
        f"encoder.layer.{layer}.intermediate.dense" for layer in (0, 1)
    }


def test_groups_of_one_change_nothing(captured):
    done = compress_graph(captured("bert"), [call(groups=3)])
    assert done.structure.passes == ()
    assert [one.reason for one in done.skipped] == ["every group holds one layer"]


def test_planned_on_meta(captured):
    real = captured("bert")
    meta = real.bind(copy.deepcopy(real.model).to("meta"))
    for graph in (meta, real):
        rewritten(graph, groups=2, start="mean")
    same_structure(structure_of(meta), structure_of(real))


@pytest.mark.parametrize("shared_first", [True, False])
def test_stacks_with_factors(captured, tmp_path, inputs_for, shared_first):
    graph = captured("bert")
    factors = PassCall(name="kronecker", scope=Scope(targets=["@ffn.*"]), options={"ratio": 4})
    calls = [call(), factors] if shared_first else [factors, call()]
    done = compress_graph(graph, calls)
    up = [layer.intermediate.dense for layer in graph.model.encoder.layer]
    assert type(up[0]).__name__ == "KroneckerLinear"
    assert up[0].a is up[2].a
    save_model(graph.model, tmp_path / "m", done.structure)
    given = inputs_for(graph.inputs)
    again = load(tmp_path / "m")
    assert count(again) == count(graph.model)
    with torch.no_grad():
        assert torch.equal(again(**given)[0], graph.model(**given)[0])


@pytest.mark.parametrize(
    ("options", "code", "match"),
    [
        ({"groups": 4}, "K499", "too few for 4 groups"),
        ({"groups": [[0, 3]]}, "K492", "no layer 3"),
        ({"groups": [[[0, 1]], [[0, 1]]]}, "K491", "2 lists of layers for 1 stacks"),
        ({"start": 3}, "K499", "has no place 3"),
    ],
)
def test_refuses(captured, options, code, match):
    with pytest.raises(PassError, match=match) as caught:
        rewritten(captured("bert"), **options)
    assert caught.value.problems[0].code == code


def test_refuses_the_mean_of_packed_weights_with_the_order_that_works(captured):
    packed = PassCall(name="quantize", scope=Scope(targets=["@ffn.up"]), options={"bits": 4})
    with pytest.raises(PassError, match="share-layers first, then the pass that packs") as caught:
        compress_graph(captured("bert"), [packed, call(start="mean")])
    assert caught.value.problems[0].code == "K408"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"groups": 0}, "greater than 0"),
        ({"groups": [[0, 1], [1, 2]]}, "in one group only"),
        ({"groups": [[1, 0]]}, "in order"),
        ({"start": "last"}, "'first' or 'mean'"),
        ({"start": -1}, "greater than or equal to 0"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(PassError, match=match):
        build_pass("share-layers", options)


def test_recipe_plans():
    plan = compile_recipe(load_recipe(RECIPE), offline=True)
    assert plan.models["shared"].params == 17_389_824
    assert plan.models["shared"].flops == plan.models["base"].flops
