"""The pass: equality with silenced neurons on every architecture, ranking by direct formulas, skips, reload."""

from __future__ import annotations

import copy

import pytest
import torch
from pydantic import ValidationError

from kroncc.api import PassError, SiteStats
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


def kept_by(resolved, fqn):
    """Return which neurons stay of those that the map `fqn` reads."""
    (units,) = (
        cut.units for cut in resolved.choice if any(f"{fqn}.weight" in span.names for span in cut.spans)
    )
    return list(units)


def silence(model, fqn, kept):
    def zero(_, args):
        mask = torch.zeros(args[0].shape[-1])
        mask[kept] = 1
        return (args[0] * mask,)

    model.get_submodule(fqn).register_forward_pre_hook(zero)


def outputs(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_cut_neurons_are_silent_neurons(family, tiny, inputs_for):
    model = tiny(family, FAMILIES[family])
    graph = capture(model)
    dense, inputs, maps = copy.deepcopy(model), inputs_for(graph.inputs), downs(graph)
    assert maps
    resolved = resolve(PruneNeurons(ratio=0.4, by="random"), graph)
    resolved.options.rewrite(model, resolved.sites, resolved.choice)
    for fqn in maps:
        kept = kept_by(resolved, fqn)
        width = next(iter(dense.get_submodule(fqn).weight.shape[at] for at in (0, 1) if _in(dense, fqn) == at))
        assert len(kept) == round(0.4 * width)
        silence(dense, fqn, kept)
    torch.testing.assert_close(outputs(model, inputs), outputs(dense, inputs), rtol=1e-5, atol=1e-5)


def _in(model, fqn):
    """Return the dimension of a map's weight that its input has."""
    return 1 if isinstance(model.get_submodule(fqn), torch.nn.Linear) else 0


def test_golden_rewrite(tiny):
    graph = capture(tiny("llama", num_hidden_layers=1))
    before = format_graph(graph)
    compress_graph(graph, [PassCall(name="prune-neurons", scope=Scope(targets=["@ffn.up"]), options={"keep": 24})])
    changed = [line for line in format_graph(graph).splitlines() if line not in before.splitlines()]
    assert [line.strip().partition(" = ")[2] for line in changed] == [
        "Linear(32->24, no bias)(post_attention_layernorm) -> f32[B, L, 24]",
        "SiLUActivation()(gate_proj) -> f32[B, L, 24]",
        "Linear(32->24, no bias)(post_attention_layernorm) -> f32[B, L, 24]",
        "mul.Tensor(act_fn, up_proj) -> f32[B, L, 24]",
        "Linear(24->32, no bias)(mul) -> f32[B, L, 32]",
    ]
