"""The pass: equal to a model whose norms see the kept features alone, on all architectures; ties, ranking."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn

from kroncc.api import Axes, PassError, SiteStats
from kroncc.graph.capture import capture
from kroncc.graph.verify import structure_of
from kroncc.recipe.schema import PassCall, Scope
from kroncc.rewrite.pipeline import compress_graph
from kroncc.rewrite.sites import sites_of
from kroncc.testing import assert_reloads
from kroncc_passes.prune_hidden import PruneHidden

ONE = {"num_hidden_layers": 1}
FAMILIES = {
    "bert": ("AutoModelForSequenceClassification", ONE),
    "distilbert": ("AutoModelForMaskedLM", {"n_layers": 1}),
    "roberta": ("AutoModelForSequenceClassification", ONE),
    "albert": ("AutoModelForMaskedLM", {}),
    "electra": ("AutoModelForSequenceClassification", ONE),
    "mpnet": ("AutoModelForSequenceClassification", ONE),
    "gpt2": ("AutoModelForCausalLM", {"n_layer": 1}),
    "llama": ("AutoModelForCausalLM", ONE),
    "vit": ("AutoModelForImageClassification", ONE),
    "t5": ("AutoModelForSeq2SeqLM", {"num_layers": 1}),
}
ENTERS = ("embedding_hidden_mapping_in", "embeddings_project")  # what enters a stack without a norm
WIDTH = 32


def resolve(pass_, graph, targets=(), stats=None, seed=0):
    sites = sites_of(graph, Scope(targets=list(targets)), 0) if targets else []
    return pass_.resolve_tree(graph, sites, stats, seed)


def chosen(pass_, graph, targets=(), stats=None, seed=0):
    """Return which features stay, by the first map that reads them."""
    axes = Axes(graph)
    units, _ = pass_.find(axes, sites_of(graph, Scope(targets=list(targets)), 0) if targets else [])
    groups = pass_.chosen(axes, units, stats or {}, seed)
    return {one.outs[0]: list(group.units) for one, group in zip(units, groups, strict=True)}


def call(targets=(), **options):
    return PassCall(name="prune-hidden", scope=Scope(targets=list(targets)), options=options)


def narrow_norms(model, kept):
    """Let every norm of the stream see, and give, the kept features alone; others are 0 behind it."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if name.endswith(ENTERS):
            module.register_forward_hook(lambda _, __, out: only(out, kept))
        if weight is not None and weight.shape == (WIDTH,):
            module.register_forward_hook(lambda m, args, _: normalised(m, args[0], kept))


def only(value, kept):
    mask = torch.zeros(value.shape[-1])
    mask[kept] = 1
    return value * mask


def normalised(module, value, kept):
    part, weight = value[..., kept], module.weight[kept]
    out = torch.zeros_like(value)
    if isinstance(module, nn.LayerNorm):
        out[..., kept] = F.layer_norm(part, (len(kept),), weight, module.bias[kept], module.eps)
    else:
        out[..., kept] = F.rms_norm(part, (len(kept),), weight, module.variance_epsilon)
    return out


def outputs(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.fixture(scope="module")
def bert(tiny):
    return capture(tiny("bert", "AutoModelForMaskedLM"))


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_norms_over_the_kept_features(family, tiny, inputs_for):
    auto, changes = FAMILIES[family]
    model = tiny(family, auto, **changes)
    graph = capture(model)
    dense, inputs = copy.deepcopy(model), inputs_for(graph.inputs)
    resolved = resolve(PruneHidden(keep=20, by="random"), graph)
    (cut,) = resolved.choice
    resolved.options.rewrite(model, resolved.sites, resolved.choice)
    assert (cut.size, len(cut.units)) == (WIDTH, 20)
    narrow_norms(dense, list(cut.units))
    torch.testing.assert_close(outputs(model, inputs), outputs(dense, inputs), rtol=1e-5, atol=1e-5)


def test_the_embedding_of_albert_is_a_width_of_its_own(tiny, inputs_for):
    model = tiny("albert", "AutoModelForMaskedLM", num_hidden_layers=1)
    graph = capture(model)
    compress_graph(graph, [call(["@embedding.word"], keep=10)])
    assert model.albert.embeddings.word_embeddings.weight.shape == (100, 10)
    assert model.albert.encoder.embedding_hidden_mapping_in.weight.shape == (32, 10)
    assert model.predictions.decoder.weight is model.albert.embeddings.word_embeddings.weight
    assert outputs(model, inputs_for(graph.inputs)).shape == (4, 9, 100)


def test_all_features_kept_is_the_same_model(tiny):
    ids = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(0))
    model = tiny("gpt2", "AutoModelForCausalLM", n_layer=1)
    before = outputs(model, {"input_ids": ids})
    graph = capture(model)
    done = compress_graph(graph, [call(ratio=1.0)])
    assert done.structure.passes
    assert torch.equal(outputs(model, {"input_ids": ids}), before)


def test_reloads_with_its_tied_head(tiny):
    model = tiny("bert", "AutoModelForMaskedLM", num_hidden_layers=1)
    loaded = assert_reloads("prune-hidden", {"keep": 24}, ["@ffn.down"], model)
    assert loaded.cls.predictions.decoder.weight is loaded.bert.embeddings.word_embeddings.weight
    assert loaded.bert.embeddings.LayerNorm.normalized_shape == (24,)


def test_plans_on_meta_what_weights_give(bert):
    with torch.device("meta"):
        planned = bert.bind(type(bert.model)(bert.model.config))
    real = bert.copy()
    done, plan = (compress_graph(one, [call(keep=24, by="random")]) for one in (real, planned))
    assert done.structure == plan.structure
    assert structure_of(real).tensors == structure_of(planned).tensors


def test_a_hidden_state_that_is_an_output_gets_narrower(tiny, inputs_for):
    graph = capture(tiny("distilbert", n_layers=1))
    compress_graph(graph, [call(keep=8)])
    assert outputs(graph.model, inputs_for(graph.inputs)).shape == (4, 9, 8)
    assert graph.outputs["last_hidden_state"].meta["val"].shape[-1] == 8


def test_norm_ranks_by_all_weights_of_a_feature(tiny):
    graph = capture(tiny("gpt2", n_layer=1))
    (kept,) = chosen(PruneHidden(keep=5), graph).values()
    first = [graph.model.wte.weight, graph.model.wpe.weight]  # one row a feature when turned
    for name, weight in graph.model.h[0].named_parameters():
        reads = name.endswith(("c_attn.weight", "c_fc.weight"))
        first += [weight.T] if reads else []
        first += [weight] if name.endswith(("attn.c_proj.weight", "mlp.c_proj.weight")) else []
        first += [weight[None]] if "ln_" in name or name.endswith("c_proj.bias") else []
    first += [graph.model.ln_f.weight[None], graph.model.ln_f.bias[None]]
    squares = sum(weight.square().sum(0) for weight in first)
    assert kept == sorted(squares.topk(5).indices.tolist())


def test_activation_ranks_by_the_part_in_what_maps_give(tiny):
    graph = capture(tiny("gpt2", n_layer=1))
    pass_ = PruneHidden(keep=5, by="activation")
    asked = pass_.requests(graph, [])
    assert list(asked) == ["h.0.attn.c_attn", "h.0.mlp.c_fc"]
    inputs = {fqn: torch.randn(400, 32) * torch.rand(32) for fqn in asked}
    stats = {fqn: SiteStats(moment=x.T @ x / 400) for fqn, x in inputs.items()}
    (kept,) = chosen(pass_, graph, stats=stats).values()
    total = torch.zeros(32)
    for fqn, x in inputs.items():
        parts = (x[:, :, None] * graph.get(fqn).weight).square().sum((0, 2))
        total += parts / parts.sum()
    assert kept == sorted(total.topk(5).indices.tolist())


def test_skips_what_is_laid_out_in_heads(bert):
    resolved = resolve(PruneHidden(keep=24), bert, ["@attention.q"])
    assert {skip.reason for skip in resolved.skipped.values()} == {
        "gives features that are laid out in groups"
    }


def test_refuses_a_stream_that_another_pass_has_taken(bert):
    factored = PassCall(name="low-rank", scope=Scope(targets=["@ffn.down"]), options={"rank": 4})
    with pytest.raises(PassError, match="LowRankLinear") as caught:
        compress_graph(bert.copy(), [factored, call(keep=24)])
    assert caught.value.problems[0].code == "K488"


def test_refuses_what_cannot_be(bert):
    with pytest.raises(PassError, match="the residual stream: 33 are to stay of 32") as caught:
        resolve(PruneHidden(keep=33), bert)
    assert caught.value.problems[0].code == "K486"
    with pytest.raises(PassError, match="needs what was measured at"):
        resolve(PruneHidden(keep=3, by="activation"), bert, stats={})
    for options in ({}, {"keep": 3, "ratio": 0.5}, {"keep": 2, "scope": "global"}):
        with pytest.raises(ValidationError):
            PruneHidden(**options)
