"""The pass: which layers stay, equality with a model built of them, caches, LayerDrop, what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from kroncc.api import PassError, SiteStats
from kroncc.compiler import compile_recipe
from kroncc.graph.capture import capture
from kroncc.graph.cost import model_cost
from kroncc.graph.printer import format_graph
from kroncc.graph.verify import same_structure, structure_of
from kroncc.model.load import load
from kroncc.model.save import save_model
from kroncc.recipe.loader import load_recipe
from kroncc.recipe.schema import PassCall, Scope
from kroncc.rewrite.during import install
from kroncc.rewrite.pipeline import build_pass, compress_graph
from kroncc.run.live import settle
from kroncc.testing import assert_reloads
from kroncc_passes._layer_gate import LayerGate
from kroncc_passes._stacks import _order
from kroncc_passes.drop_layers import DropLayers

RECIPE = Path(__file__).parents[2] / "recipes" / "drop-layers-minilm.yaml"
DEPTH = {
    "bert": ["num_hidden_layers"],
    "distilbert": ["n_layers"],
    "electra": ["num_hidden_layers"],
    "mpnet": ["num_hidden_layers"],
    "gpt2": ["n_layer"],
    "llama": ["num_hidden_layers"],
    "deberta-v2": ["num_hidden_layers"],
    "vit": ["num_hidden_layers"],
    "t5": ["num_layers", "num_decoder_layers"],
    "bart": ["encoder_layers", "decoder_layers"],
}


def call(*targets, **options):
    return PassCall(name="drop-layers", scope=Scope(targets=list(targets)), options=options)


@pytest.fixture(scope="module")
def deep(tiny):
    """`deep(family, auto="AutoModel", layers=3, seed=0, **config)`: a small random model."""

    def make(family, auto="AutoModel", layers=3, seed=0, **changes):
        return tiny(family, auto, seed, **dict.fromkeys(DEPTH[family], layers), **changes)

    return make


@pytest.fixture(scope="module")
def captured(deep):
    """`captured(...)`: the graph of a fresh `deep(...)`; each architecture is traced once."""
    graphs = {}

    def make(family, auto="AutoModel", **changes):
        key = family, auto, str(changes)
        model = deep(family, auto, **changes)
        graphs[key] = graphs.get(key) or capture(model)
        return graphs[key].bind(model)

    return make


def resolve(graph, sites=(), stats=None, seed=0, **options):
    return build_pass("drop-layers", options).resolve_tree(graph, sites, stats, seed)


def rewritten(graph, **options):
    resolved = resolve(graph, **options)
    resolved.options.rewrite(graph.model, resolved.sites)
    return resolved


def renamed(state, sites, lists):
    """The weights of a model that has only the listed layers, by the names they have there."""
    places = {
        f"{fqn}.{old}.": f"{fqn}.{new}."
        for fqn, kept in zip(sites, lists, strict=True)
        for new, old in enumerate(kept)
    }
    for name, tensor in state.items():
        inside = any(name.startswith(f"{fqn}.") for fqn in sites)
        head = next((old for old in places if name.startswith(old)), None)
        if not inside or head:
            yield (places[head] + name.removeprefix(head) if head else name), tensor


@pytest.mark.parametrize("family", DEPTH)
def test_equals_a_model_built_of_the_layers_that_stay(deep, captured, inputs_for, family):
    graph = captured(family)
    model = graph.model
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    done = rewritten(graph, keep=[0, 2])
    built = deep(family, layers=2, seed=1)
    built.load_state_dict(dict(renamed(weights, done.sites, done.options.keep)))
    given = inputs_for(graph.inputs)
    with torch.no_grad():
        assert torch.equal(model(**given)[0], built(**given)[0])


def test_equals_running_those_layers_by_hand(tiny, inputs_for):
    """Layers whose place matters (ModernBERT: sliding and full attention) go with their own kind."""
    model = tiny("modernbert", num_hidden_layers=4, local_attention=4)
    assert model.config.layer_types[2:] == ["full_attention", "sliding_attention"]
    twin = copy.deepcopy(model)
    given = inputs_for(["input_ids", "attention_mask"], length=13)
    compress_graph(capture(model), [call(keep=[1, 2])])
    twin.layers[0], twin.layers[3] = Through(twin.layers[0]), Through(twin.layers[3])
    with torch.no_grad():
        assert torch.equal(model(**given)[0], twin(**given)[0])


class Through(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.attention_type = layer.attention_type

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states


def test_golden(deep, captured):
    graph = captured("bert")
    dense = format_graph(graph)
    done = compress_graph(graph, [call(keep=[0, 1])])
    assert [(one.name, one.options, one.sites) for one in done.structure.passes] == [
        ("drop-layers", {"keep": [[0, 1]]}, ("encoder.layer",))
    ]
    page = format_graph(graph)
    built = capture(deep("bert", layers=2))
    assert page == format_graph(built)
    assert "encoder.layer.2" in dense
    assert model_cost(graph).params == model_cost(built).params


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_reloads(captured, tmp_path, inputs_for, family):
    graph = captured(family)
    model = graph.model
    done = compress_graph(graph, [call(keep=2, drop="bottom")])
    assert [one.options["keep"] for one in done.structure.passes] == [
        [[0, 2], [0, 2]] if family == "t5" else [[1, 2]]
    ]
    save_model(model, tmp_path / "m", done.structure)
    again = AutoModel.from_pretrained(tmp_path / "m").eval()
    given = inputs_for(graph.inputs)
    with torch.no_grad():
        want = model(**given)[0]
        assert torch.equal(again(**given)[0], want)
        assert torch.equal(graph.module(**given)["last_hidden_state"], want)
    save_model(again, tmp_path / "twice", done.structure)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "twice")(**given)[0], want)


def test_the_base_of_a_model_with_a_head(deep):
    assert_reloads("drop-layers", {"drop": [0]}, [], deep("bert", "AutoModelForMaskedLM"))


@pytest.mark.parametrize("family", ["gpt2", "llama", "bart"])
def test_generates_with_a_cache(deep, tmp_path, inputs_for, family):
    auto = "AutoModelForSeq2SeqLM" if family == "bart" else "AutoModelForCausalLM"
    model = deep(family, auto)
    done = compress_graph(capture(model), [call(drop=[0])])
    save_model(model, tmp_path / "m", done.structure)
    again = load(tmp_path / "m")
    ids = inputs_for(["input_ids"], 2, 6)["input_ids"]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    for one in (model, again):
        plain = one.generate(input_ids=ids, use_cache=False, **options)
        assert torch.equal(one.generate(input_ids=ids, **options), plain)
        assert torch.equal(one.generate(input_ids=ids, cache_implementation="static", **options), plain)
        beams = one.generate(input_ids=ids, use_cache=False, num_beams=2, **options)
        assert torch.equal(one.generate(input_ids=ids, num_beams=2, **options), beams)


def test_layers_are_numbered_anew(captured):
    graph = captured("llama")
    rewritten(graph, keep=[1, 2])
    assert [layer.self_attn.layer_idx for layer in graph.model.layers] == [0, 1]
    assert graph.model.config.num_hidden_layers == 3


def test_keeping_all_changes_nothing(captured):
    graph = captured("bert")
    before = format_graph(graph)
    done = compress_graph(graph, [call(keep=3)])
    assert done.structure.passes == ()
    assert [one.reason for one in done.skipped] == ["keeps all of its 3 layers"]
    assert format_graph(graph) == before


@pytest.mark.parametrize(
    ("way", "kept"),
    [
        ("top", {1: [0], 3: [0, 1, 2], 6: [0, 1, 2, 3, 4, 5]}),
        ("bottom", {1: [11], 3: [9, 10, 11], 6: [6, 7, 8, 9, 10, 11]}),
        ("alternate", {1: [0], 3: [0, 4, 8], 6: [0, 2, 4, 6, 8, 10], 9: [0, 1, 2, 4, 5, 6, 8, 9, 10]}),
    ],
)
def test_ways(way, kept):
    for count, layers in kept.items():
        assert sorted(_order(12, count, way, ())[:count]) == layers
        assert sorted(_order(12, count, way, ())) == list(range(12))


def test_importance_keeps_what_turns_the_hidden_state(captured):
    graph = captured("bert")
    options = {"keep": 2, "drop": "importance"}
    asked = build_pass("drop-layers", options).requests(graph, [])
    assert list(asked) == [f"encoder.layer.{layer}" for layer in range(3)]
    assert all(one.influence for one in asked.values())
    stats = {name: SiteStats(influence=value) for name, value in zip(asked, (0.3, 0.1, 0.2), strict=True)}
    assert resolve(graph, stats=stats, **options).options.keep == ((0, 2),)
    with pytest.raises(PassError, match="was not measured") as caught:
        resolve(graph, stats={}, **options)
    assert caught.value.problems[0].code == "K498"


def test_planning_by_importance_promises_what_comes(deep, captured):
    real = captured("bert")
    meta = real.bind(copy.deepcopy(real.model).to("meta"))
    options = {"keep": 1, "drop": "importance"}
    rewritten(meta, **options)
    stats = {f"encoder.layer.{layer}": SiteStats(influence=layer / 10) for layer in range(3)}
    rewritten(real, stats=stats, **options)
    small = capture(deep("bert", layers=1))
    same_structure(*(structure_of(small.bind(graph.model)) for graph in (meta, real)))


def test_importance_and_t5s_first_block(captured):
    graph = captured("t5")
    asked = build_pass("drop-layers", {"keep": 1, "drop": "importance"}).requests(graph, [])
    stats = {name: SiteStats(influence=float(name[-1])) for name in asked}
    assert resolve(graph, stats=stats, keep=1, drop="importance").options.keep == ((0,), (0,))


def test_targets_choose_a_stack(captured):
    graph = captured("bart")
    done = compress_graph(graph, [call("decoder.**", keep=1, drop="top")])
    assert [one.sites for one in done.structure.passes] == [("decoder.layers",)]
    assert (len(graph.model.encoder.layers), len(graph.model.decoder.layers)) == (3, 1)


def test_a_list_for_each_stack(captured):
    graph = captured("bart")
    rewritten(graph, keep=[[0, 2], [1]])
    assert (len(graph.model.encoder.layers), len(graph.model.decoder.layers)) == (2, 1)


REFUSED = {
    "too many": ("bert", {"keep": 4}, "K495", "has 3 layers; 4 cannot stay"),
    "all": ("bert", {"drop": [0, 1, 2]}, "K495", "0 cannot stay"),
    "no such layer": ("bert", {"keep": [0, 3]}, "K492", "no layer 3"),
    "lists": ("bert", {"keep": [[0], [1]]}, "K491", "2 lists of layers for 1 stacks"),
    "albert": ("albert", {"keep": 1}, "K490", "holds its layers in no list"),
    "lends": ("t5", {"keep": [1, 2]}, "K493", "encoder.block.0 computes values that other layers read"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(captured, tiny, case):
    family, options, code, match = REFUSED[case]
    graph = capture(tiny("albert")) if family == "albert" else captured(family)
    with pytest.raises(PassError, match=match) as caught:
        resolve(graph, **options)
    assert caught.value.problems[0].code == code


def test_refuses_targets_outside_of_the_layers(captured):
    graph = captured("bert")
    with pytest.raises(PassError, match="lie in no stack"):
        compress_graph(graph, [call("@embedding.word", keep=1)])


def test_kinds_of_layers_must_line_up(tiny):
    """Qwen3 reads the kind of a layer by its place, and its cache holds a window for some of them."""
    kinds = ["sliding_attention", "full_attention"] * 2
    model = tiny("qwen3", num_hidden_layers=4, layer_types=kinds, use_sliding_window=True, sliding_window=4)
    graph = capture(model)
    with pytest.raises(PassError, match="would stand at place 1") as caught:
        resolve(graph, keep=[0, 2])
    assert caught.value.problems[0].code == "K494"
    assert resolve(graph, keep=[0, 3]).options.keep == ((0, 3),)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "give `keep`, `drop`, or `rate`"),
        ({"drop": "top"}, "needs `keep`"),
        ({"keep": [0, 1], "drop": "top"}, "needs `keep`, the number"),
        ({"keep": 2, "drop": [0]}, "leave `keep` out"),
        ({"keep": [1, 0]}, "in order, each once"),
        ({"drop": [1, 1]}, "in order, each once"),
        ({"keep": 0}, "greater than 0"),
        ({"keep": []}, "at least 1"),
        ({"keep": [-1]}, "greater than or equal to 0"),
        ({"keep": 1, "drop": "middle"}, "'top', 'bottom', 'alternate' or 'importance'"),
        ({"rate": 1.0}, "less than 1"),
        ({"keep": 1, "seed": 3}, "`seed` is that of `rate`"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(PassError, match=match):
        build_pass("drop-layers", options)


class TestLayerDrop:
    def installed(self, captured, family="bert", **options):
        graph = captured(family, **QUIET[family])
        return graph, install(graph, [call(**options)], seed=7)

    @pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
    def test_a_closed_gate_passes_the_input_on(self, captured, inputs_for, family):
        graph, _ = self.installed(captured, family, rate=0.5)
        gates = {name: module for name, module in graph.extras.items() if isinstance(module, LayerGate)}
        assert len(gates) == (6 if family == "t5" else 3)
        stacks = (
            ["encoder.block", "decoder.block"]
            if family == "t5"
            else [next(iter(gates))[: -len(".0.layer_gate")]]
        )
        given = inputs_for(graph.inputs)
        full = copy.deepcopy(graph.model)
        graph.train()
        for closed in ([], [1], [2], [1, 2]):
            for name, gate in gates.items():
                gate.dropped.fill_(int(name.split(".")[-2]) in closed)
            twin = copy.deepcopy(full)
            pass_ = DropLayers(keep=([layer for layer in range(3) if layer not in closed],) * len(stacks))
            pass_.rewrite(twin, stacks)
            with torch.no_grad():
                want = twin.eval()(**given)[0]
                assert torch.allclose(graph.module(**given)["last_hidden_state"], want, atol=1e-6)
        with torch.no_grad():
            got = graph.eval().module(**given)["last_hidden_state"]
            assert torch.equal(got, full.eval()(**given)[0])

    def test_a_layer_left_out_gets_no_gradient(self, captured, inputs_for):
        graph, _ = self.installed(captured, rate=0.5)
        graph.extras["encoder.layer.1.layer_gate"].dropped.fill_(True)
        graph.train().module(**inputs_for(graph.inputs))["last_hidden_state"].square().sum().backward()
        layers = graph.model.encoder.layer
        assert all(not p.grad.any() for p in layers[1].parameters())
        assert all(p.grad.any() for n, p in layers[0].named_parameters() if "key.bias" not in n)

    def test_draws_follow_seed_and_progress_alone(self):
        def drawn(seed, steps=4000):
            gate, found = LayerGate(0.2, seed), []
            for step in range(steps):
                gate.set_progress(step / steps)
                found.append(bool(gate.dropped))
            return found

        state = torch.get_rng_state()
        first = drawn("3/encoder.layer.0")
        assert torch.equal(torch.get_rng_state(), state)
        assert first == drawn("3/encoder.layer.0")
        assert first != drawn("3/encoder.layer.1")
        assert abs(sum(first) / len(first) - 0.2) < 0.02

    def test_the_end_cuts_the_stack(self, captured):
        graph, made = self.installed(captured, rate=0.2, keep=2)
        assert made.tree.options == DropLayers(rate=0.2, keep=((0, 1),), seed=7)
        settle(graph.model, made)
        assert len(graph.model.encoder.layer) == 2

    def test_without_keep_all_layers_stay(self, captured):
        graph, made = self.installed(captured, rate=0.2)
        settle(graph.model, made)
        assert len(graph.model.encoder.layer) == 3

    def test_needs_a_rate(self, captured):
        with pytest.raises(PassError, match="has no `rate`") as caught:
            self.installed(captured, keep=2)
        assert caught.value.problems[0].code == "K496"


QUIET = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "t5": {"dropout_rate": 0.0},
}


def test_stacks_with_factors(captured, inputs_for, tmp_path):
    """Before and after a factorisation."""
    for first in (True, False):
        graph = captured("bert")
        calls = [
            call(drop=[0]),
            PassCall(name="low-rank", scope=Scope(targets=["@ffn.up"]), options={"rank": 4}),
        ]
        done = compress_graph(graph, calls if first else calls[::-1])
        save_model(graph.model, tmp_path / str(first), done.structure)
        given = inputs_for(graph.inputs)
        with torch.no_grad():
            assert torch.equal(load(tmp_path / str(first))(**given)[0], graph.model(**given)[0])


def test_recipe_plans():
    plan = compile_recipe(load_recipe(RECIPE), offline=True)
    assert plan.models["shallow"].params == 17_389_824
