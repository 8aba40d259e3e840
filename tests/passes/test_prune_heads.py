"""The pass: equal to silenced heads on every architecture, groups and shared biases, attributes, ranking."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from kroncc.api import Axes, Calibration, PassError, SiteStats
from kroncc.graph.capture import capture
from kroncc.graph.roles import find_roles
from kroncc.graph.verify import structure_of
from kroncc.recipe.schema import PassCall, Scope
from kroncc.rewrite.pipeline import compress_graph
from kroncc.rewrite.sites import sites_of
from kroncc.testing import assert_reloads
from kroncc_passes.prune_heads import PruneHeads

ONE = {"num_hidden_layers": 1}
FAMILIES = {
    "bert": ("AutoModelForSequenceClassification", ONE, 4),
    "distilbert": ("AutoModel", {"n_layers": 1}, 4),
    "roberta": ("AutoModel", ONE, 4),
    "albert": ("AutoModel", {}, 4),
    "electra": ("AutoModel", ONE, 4),
    "mpnet": ("AutoModel", {}, 4),
    "gpt2": ("AutoModelForCausalLM", {"n_layer": 1}, 4),
    "llama": ("AutoModelForCausalLM", {"num_attention_heads": 8, "num_key_value_heads": 4} | ONE, 4),
    "vit": ("AutoModelForImageClassification", ONE, 4),
    "t5": ("AutoModelForSeq2SeqLM", {}, 4),
    "modernbert": ("AutoModel", ONE, 4),
    "deberta-v2": ("AutoModel", ONE, 4),
}


def outs(graph):
    return [fqn for fqn, role in find_roles(graph).items() if role.name == "attention.out"]


def resolve(pass_, graph, targets=("@attention.*",), stats=None, seed=0):
    return pass_.resolve_tree(graph, sites_of(graph, Scope(targets=list(targets)), 0), stats, seed)


def chosen(pass_, graph, targets=("@attention.*",), stats=None, seed=0):
    """Return which units stay, by the map that reads them."""
    axes = Axes(graph)
    units, _ = pass_.find(axes, sites_of(graph, Scope(targets=list(targets)), 0) if targets else [])
    groups = pass_.chosen(axes, units, stats or {}, seed)
    return {one.outs[0]: list(group.units) for one, group in zip(units, groups, strict=True)}


def cut_of(resolved, fqn):
    (cut,) = (one for one in resolved.choice if any(f"{fqn}.weight" in span.names for span in one.spans))
    return cut


def call(targets=("@attention.*",), **options):
    return PassCall(name="prune-heads", scope=Scope(targets=list(targets)), options=options)


def silence(model, fqn, kept, units):
    """Zero what reaches the map out from all units but `kept`; units are consecutive."""

    def zero(_, args):
        mask = torch.zeros(units, args[0].shape[-1] // units)
        mask[list(kept)] = 1
        return (args[0] * mask.flatten(),)

    model.get_submodule(fqn).register_forward_pre_hook(zero)


def outputs(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.fixture(scope="module")
def bert(tiny):
    return capture(tiny("bert"))


@pytest.mark.parametrize("family", FAMILIES)
def test_cut_heads_are_silent_heads(family, tiny, inputs_for):
    auto, changes, units = FAMILIES[family]
    model = tiny(family, auto, **changes)
    graph = capture(model)
    dense, inputs, maps = copy.deepcopy(model), inputs_for(graph.inputs), outs(graph)
    resolved = resolve(PruneHeads(keep=3, by="random"), graph)
    resolved.options.rewrite(model, resolved.sites, resolved.choice)
    assert maps
    for fqn in maps:
        cut = cut_of(resolved, fqn)
        assert (cut.size, len(cut.units)) == (units, 3)
        silence(dense, fqn, cut.units, units)
    torch.testing.assert_close(outputs(model, inputs), outputs(dense, inputs), rtol=1e-5, atol=1e-5)


@settings(max_examples=3, deadline=None)
@example(groups=2, queries=2, size=4, keep=1, tied=True, seed=0)
@given(
    groups=st.integers(2, 5),
    queries=st.integers(1, 3),
    size=st.sampled_from([4, 6]),
    keep=st.integers(1, 5),
    tied=st.booleans(),
    seed=st.integers(0, 9),
)
def test_groups_of_any_shape(tiny, inputs_for, groups, queries, size, keep, tied, seed):
    keep = min(keep, groups)
    changes = {"num_key_value_heads": groups, "num_attention_heads": groups * queries, "head_dim": size}
    width = 3 * groups * queries
    model = tiny(
        "llama", "AutoModelForCausalLM", hidden_size=width, tie_word_embeddings=tied, **ONE, **changes
    )
    graph = capture(model)
    dense, inputs, (fqn,) = copy.deepcopy(model), inputs_for(graph.inputs), outs(graph)
    resolved = resolve(PruneHeads(keep=keep, by="random"), graph, seed=seed)
    resolved.options.rewrite(model, resolved.sites, resolved.choice)
    assert model.get_submodule(fqn).weight.shape == (width, keep * queries * size)
    silence(dense, fqn, cut_of(resolved, fqn).units, groups)
    torch.testing.assert_close(outputs(model, inputs), outputs(dense, inputs), rtol=1e-5, atol=1e-5)


def test_one_head_of_keys_leaves_heads_of_queries_to_cut(tiny, inputs_for):
    model = tiny("llama", num_key_value_heads=1, **ONE)
    graph = capture(model)
    dense, (fqn,) = copy.deepcopy(model), outs(graph)
    resolved = resolve(PruneHeads(keep=2, by="random"), graph)
    resolved.options.rewrite(model, resolved.sites, resolved.choice)
    assert model.layers[0].self_attn.k_proj.weight.shape == (8, 32)
    silence(dense, fqn, cut_of(resolved, fqn).units, 4)
    inputs = inputs_for(graph.inputs)
    torch.testing.assert_close(outputs(model, inputs), outputs(dense, inputs), rtol=1e-5, atol=1e-5)


def test_attributes_and_shapes_stay_right(bert):
    graph = bert.copy()
    compress_graph(graph, [call(["@attention.*[0]"], keep=3)])
    layers = graph.model.encoder.layer
    assert [layer.attention.self.num_attention_heads for layer in layers] == [3, 4]
    assert layers[0].attention.self.attention_head_size == 8
    assert layers[0].attention.self.query.out_features == 24
    assert layers[0].attention.output.dense.in_features == 24
    assert layers[0].attention.self.layer_idx == bert.model.encoder.layer[0].attention.self.layer_idx


def test_the_number_of_a_layer_is_not_the_number_of_heads(tiny):
    model = tiny("gpt2", n_layer=3, n_head=2)
    graph = capture(model)
    compress_graph(graph, [call(["@attention.*[2]"], keep=1)])
    assert [block.attn.layer_idx for block in model.h] == [0, 1, 2]
    assert [block.attn.num_heads for block in model.h] == [2, 2, 1]
    assert [block.attn.split_size for block in model.h] == [32, 32, 16]


def test_heads_that_share_biases_are_cut_together(tiny):
    graph = capture(tiny("t5", "AutoModelForSeq2SeqLM"))
    resolved = resolve(PruneHeads(keep=3), graph, ["encoder.block.1.**"])
    assert {site.split(".block.")[0] for site in resolved.sites} == {"encoder"}
    assert "encoder.block.0.layer.0.SelfAttention.relative_attention_bias" in resolved.sites


def test_all_heads_kept_is_the_same_model(tiny):
    ids = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(0))
    model = tiny("gpt2", "AutoModelForCausalLM")
    before = outputs(model, {"input_ids": ids})
    loaded = assert_reloads("prune-heads", {"ratio": 1.0}, ["@attention.*"], model)
    assert torch.equal(outputs(loaded, {"input_ids": ids}), before)


@pytest.mark.parametrize(("family", "options"), [("mpnet", {"keep": 2}), ("gpt2", {"ratio": 0.5})])
def test_reloads(family, options, tiny):
    assert_reloads("prune-heads", options, ["@attention.*"], tiny(family))


def test_plans_on_meta_what_weights_give(bert):
    with torch.device("meta"):
        planned = bert.bind(type(bert.model)(bert.model.config))
    real = bert.copy()
    done, plan = (compress_graph(one, [call(keep=3, by="random")]) for one in (real, planned))
    assert done.structure == plan.structure
    assert structure_of(real).tensors == structure_of(planned).tensors


def test_gradient_ranks_by_what_was_measured(bert):
    pass_ = PruneHeads(keep=2, by="gradient")
    asked = pass_.requests(bert, sites_of(bert, Scope(targets=["@attention.*"]), 0))
    assert asked == dict.fromkeys(outs(bert), Calibration(saliency=frozenset({8})))
    scores = [torch.tensor([3.0, 1.0, 0.5, 2.0]), torch.tensor([1.0, 3.0, 2.0, 0.5]) * 1e-3]
    stats = {fqn: SiteStats(saliency={8: one}) for fqn, one in zip(outs(bert), scores, strict=True)}
    assert list(chosen(pass_, bert, stats=stats).values()) == [[0, 3], [1, 2]]


def test_global_scope_scales_layers_and_keeps_one_head_each(bert):
    pass_ = PruneHeads(ratio=0.5, by="gradient", scope="global")
    scores = [torch.tensor([1.0, 0.9, 0.8, 0.7]), torch.tensor([1e6, 1.0, 2.0, 3.0])]
    stats = {fqn: SiteStats(saliency={8: one}) for fqn, one in zip(outs(bert), scores, strict=True)}
    assert list(chosen(pass_, bert, stats=stats).values()) == [[0, 1, 2], [0]]
    assert not pass_.settled()


def test_norm_ranks_by_all_weights_of_a_head(bert):
    kept = chosen(PruneHeads(keep=2), bert, ["@attention.*[1]"])
    attention = bert.model.encoder.layer[1].attention
    maps = [attention.self.query, attention.self.key, attention.self.value]
    squares = sum(one.weight.square().sum(1) + one.bias.square() for one in maps)
    squares = squares + attention.output.dense.weight.square().sum(0)
    best = squares.view(4, 8).sum(1).topk(2).indices.tolist()
    assert kept == {"encoder.layer.1.attention.output.dense": sorted(best)}


def test_skips_what_is_no_attention_and_a_single_head(bert, tiny):
    resolved = resolve(PruneHeads(keep=2), bert, ["@ffn.up"])
    assert {skip.reason for skip in resolved.skipped.values()} == {"is not part of an attention"}
    single = capture(tiny("bert", num_attention_heads=1, **ONE))
    reasons = {skip.reason for skip in resolve(PruneHeads(ratio=0.5), single).skipped.values()}
    assert reasons == {"has one head, or none that can be told apart"}


def test_refuses_what_cannot_be(bert):
    with pytest.raises(PassError, match="5 are to stay of 4") as caught:
        resolve(PruneHeads(keep=5), bert)
    assert caught.value.problems[0].code == "K486"
    for options in ({}, {"keep": 3, "ratio": 0.5}, {"keep": 2, "by": "taylor"}):
        with pytest.raises(ValidationError):
            PruneHeads(**options)
