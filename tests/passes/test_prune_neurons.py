"""The pass: equal to silenced neurons on every architecture, ranking by direct formulas, skips, reload."""

from __future__ import annotations

import copy

import pytest
import torch
from pydantic import ValidationError

from kroncc.api import Axes, Calibration, PassError, SiteStats
from kroncc.graph.capture import capture
from kroncc.graph.cost import model_cost
from kroncc.graph.printer import format_graph
from kroncc.graph.roles import find_roles
from kroncc.model.save import save_model
from kroncc.recipe.schema import PassCall, Scope
from kroncc.rewrite.pipeline import compress_graph
from kroncc.rewrite.sites import sites_of
from kroncc.testing import assert_reloads
from kroncc_passes.prune_neurons import PruneNeurons

DEPTH = {"albert": {}, "distilbert": {"n_layers": 1}, "gpt2": {"n_layer": 1}, "t5": {"num_layers": 1}}
IDS = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(0))
FAMILIES = {
    "bert": "AutoModelForSequenceClassification",
    "distilbert": "AutoModelForMaskedLM",
    "roberta": "AutoModel",
    "albert": "AutoModelForMaskedLM",
    "electra": "AutoModel",
    "mpnet": "AutoModel",
    "gpt2": "AutoModelForCausalLM",
    "llama": "AutoModelForCausalLM",
    "vit": "AutoModelForImageClassification",
    "t5": "AutoModelForSeq2SeqLM",
    "modernbert": "AutoModel",
}


def downs(graph):
    return [fqn for fqn, role in find_roles(graph).items() if role.name == "ffn.down"]


def resolve(pass_, graph, targets=("@ffn.up",), stats=None, seed=0):
    return pass_.resolve_tree(graph, sites_of(graph, Scope(targets=list(targets)), 0), stats, seed)


def chosen(pass_, graph, targets=("@ffn.up",), stats=None, seed=0):
    """Return which units stay, by the map that reads them."""
    axes = Axes(graph)
    units, _ = pass_.find(axes, sites_of(graph, Scope(targets=list(targets)), 0) if targets else [])
    groups = pass_.chosen(axes, units, stats or {}, seed)
    return {one.outs[0]: list(group.units) for one, group in zip(units, groups, strict=True)}


def kept_by(resolved, fqn):
    """Return which neurons stay of those that the map `fqn` reads."""
    (units,) = (
        cut.units for cut in resolved.choice if any(f"{fqn}.weight" in span.names for span in cut.spans)
    )
    return list(units)


def call(targets=("@ffn.up",), **options):
    return PassCall(name="prune-neurons", scope=Scope(targets=list(targets)), options=options)


def wide(model, fqn):
    """Return how many features a map reads."""
    weight = model.get_submodule(fqn).weight
    return weight.shape[1] if isinstance(model.get_submodule(fqn), torch.nn.Linear) else weight.shape[0]


def silence(model, fqn, kept):
    def zero(_, args):
        mask = torch.zeros(args[0].shape[-1])
        mask[kept] = 1
        return (args[0] * mask,)

    model.get_submodule(fqn).register_forward_pre_hook(zero)


def outputs(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.fixture(scope="module")
def bert(tiny):
    return capture(tiny("bert", "AutoModelForMaskedLM"))


@pytest.mark.parametrize("family", FAMILIES)
def test_cut_neurons_are_silent_neurons(family, tiny, inputs_for):
    model = tiny(family, FAMILIES[family], **DEPTH.get(family, {"num_hidden_layers": 1}))
    graph = capture(model)
    dense, inputs, maps = copy.deepcopy(model), inputs_for(graph.inputs), downs(graph)
    resolved = resolve(PruneNeurons(ratio=0.4, by="random"), graph)
    resolved.options.rewrite(model, resolved.sites, resolved.choice)
    assert maps
    for fqn in maps:
        kept = kept_by(resolved, fqn)
        assert len(kept) == round(0.4 * wide(dense, fqn))
        silence(dense, fqn, kept)
    torch.testing.assert_close(outputs(model, inputs), outputs(dense, inputs), rtol=1e-5, atol=1e-5)


def test_golden_rewrite(tiny):
    graph = capture(tiny("llama", num_hidden_layers=1))
    before = format_graph(graph)
    done = compress_graph(graph, [call(keep=24)])
    changed = [line.strip() for line in format_graph(graph).splitlines() if line not in before.splitlines()]
    assert changed == [
        "gate_proj = Linear(32->24, no bias)(layers.0.post_attention_layernorm) -> f32[B, L, 24]",
        "act_fn = SiLUActivation()(gate_proj) -> f32[B, L, 24]",
        "up_proj = Linear(32->24, no bias)(layers.0.post_attention_layernorm) -> f32[B, L, 24]",
        "mul = mul.Tensor(act_fn, up_proj) -> f32[B, L, 24]",
        "down_proj = Linear(24->32, no bias)(mul) -> f32[B, L, 32]",
    ]
    (applied,) = done.structure.passes
    assert "layers" not in str(applied.options)  # names are for `sites` alone: they may get a prefix
    assert graph.model.layers[0].mlp.intermediate_size == 24


def test_all_neurons_kept_is_the_same_model(tiny):
    model = tiny("gpt2", "AutoModelForCausalLM")
    before = outputs(model, {"input_ids": IDS})
    loaded = assert_reloads("prune-neurons", {"ratio": 1.0}, ["@ffn.up"], model)
    assert torch.equal(outputs(loaded, {"input_ids": IDS}), before)


def test_reloads_under_another_head_and_has_the_planned_size(bert, tiny, tmp_path):
    with torch.device("meta"):
        skeleton = type(bert.model)(bert.model.config)
    graph, planned = bert.copy(), bert.bind(skeleton)
    done, plan = (compress_graph(one, [call(keep=24, by="random")]) for one in (graph, planned))
    assert plan.structure == done.structure
    assert model_cost(graph).params == model_cost(planned).params
    assert model_cost(graph).params == model_cost(bert).params - 2 * 40 * (32 + 32 + 1)
    save_model(graph.model, tmp_path / "model", done.structure)
    base = type(tiny("bert")).from_pretrained(tmp_path / "model").eval()
    want = graph.model.bert(IDS)[0]
    assert torch.equal(base(IDS)[0], want)


def test_norm_ranks_by_all_weights_of_a_neuron(bert):
    resolved = resolve(PruneNeurons(keep=10), bert, ["@ffn.up[1]"])  # of the names that are changed too
    layer = bert.model.bert.encoder.layer[1]
    up, down = layer.intermediate.dense, layer.output.dense
    rows = torch.cat([up.weight, up.bias[:, None], down.weight.T], 1).norm(dim=1)
    assert kept_by(resolved, "bert.encoder.layer.1.output.dense") == sorted(rows.topk(10).indices.tolist())
    assert resolved.sites == tuple(
        f"bert.encoder.layer.1.{name}.dense" for name in ("intermediate", "output")
    )


def test_activation_ranks_by_the_energy_of_what_a_neuron_adds(bert):
    fqn = "bert.encoder.layer.0.output.dense"
    x = torch.randn(500, 64) * torch.rand(64)
    stats = {fqn: SiteStats(moment=x.T @ x / 500)}
    kept = chosen(PruneNeurons(keep=10, by="activation"), bert, [fqn], stats)
    weight = bert.get(fqn).weight
    added = torch.stack([torch.outer(x[:, at], weight[:, at]).square().sum() for at in range(64)])
    assert kept == {fqn: sorted(added.topk(10).indices.tolist())}


def test_taylor_ranks_by_measured_gradients(bert, inputs_for):
    fqn = "bert.encoder.layer.0.output.dense"
    pass_ = PruneNeurons(keep=10, by="taylor")
    asked = pass_.requests(bert, sites_of(bert, Scope(targets=[fqn]), 0))
    assert asked == {fqn: Calibration(saliency=frozenset({1}))}
    scores = torch.rand(64)
    kept = chosen(pass_, bert, [fqn], {fqn: SiteStats(saliency={1: scores})})
    assert kept == {fqn: sorted(scores.topk(10).indices.tolist())}


def test_global_scope_moves_neurons_between_layers(bert):
    fqns = downs(bert)
    flat, steep = torch.ones(64), torch.cat([torch.full((3,), 100.0), torch.full((61,), 1e-3)])
    stats = {fqn: SiteStats(saliency={1: scores}) for fqn, scores in zip(fqns, (flat, steep), strict=True)}
    pass_ = PruneNeurons(ratio=0.5, by="taylor", scope="global")
    assert [len(one) for one in chosen(pass_, bert, stats=stats).values()] == [61, 3]
    assert not pass_.settled()
    assert PruneNeurons(ratio=0.5).settled()


def test_a_layer_keeps_one_neuron_whatever_its_score(bert):
    fqns = downs(bert)
    stats = {
        fqn: SiteStats(saliency={1: torch.full((64,), at)}) for at, fqn in zip((0.0, 1.0), fqns, strict=True)
    }
    kept = chosen(PruneNeurons(keep=2, by="taylor", scope="global"), bert, stats=stats)
    assert [len(one) for one in kept.values()] == [1, 3]


def test_random_depends_on_the_seed_alone(bert):
    one, two, other = (chosen(PruneNeurons(keep=9, by="random"), bert, seed=seed) for seed in (1, 1, 2))
    assert one == two != other
    assert len({tuple(kept) for kept in one.values()}) == 2


def test_resolving_leaves_the_model_as_it_is(bert):
    before = {name: value.clone() for name, value in bert.model.state_dict().items()}
    resolve(PruneNeurons(keep=3), bert)
    assert all(torch.equal(before[name], value) for name, value in bert.model.state_dict().items())


def test_shared_layers_are_one_site(tiny):
    graph = capture(tiny("albert"))
    resolved = resolve(PruneNeurons(keep=3), graph, ["@ffn.*"])
    assert len(resolved.sites) == 2


def test_skips_what_is_no_feed_forward_pair(bert):
    resolved = resolve(PruneNeurons(keep=3), bert, ["@attention.q"])
    assert {skip.reason for skip in resolved.skipped.values()} == {"is not part of a feed-forward pair"}
    assert not resolved.sites


def test_refuses_the_wrong_order(bert):
    factored = PassCall(name="low-rank", scope=Scope(targets=["@ffn.down"]), options={"rank": 4})
    with pytest.raises(PassError, match="LowRankLinear") as caught:
        compress_graph(bert.copy(), [factored, call(keep=24, targets=["@ffn.*"])])
    assert caught.value.problems[0].code == "K408"


def test_refuses_what_cannot_be(bert):
    with pytest.raises(PassError, match="65 are to stay of 64") as caught:
        resolve(PruneNeurons(keep=65), bert)
    assert caught.value.problems[0].code == "K486"
    with pytest.raises(PassError, match="needs what was measured at") as caught:
        resolve(PruneNeurons(keep=3, by="taylor"), bert, stats={})
    assert caught.value.problems[0].code == "K487"
    for options in ({}, {"keep": 3, "ratio": 0.5}, {"keep": 0}, {"ratio": 1.5}, {"keep": 3, "by": "luck"}):
        with pytest.raises(ValidationError):
            PruneNeurons(**options)
