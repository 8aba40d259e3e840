"""Passes over a whole graph: what is rewritten, what is skipped and why, what is refused."""

import os
from pathlib import Path

import pytest
import torch

from kroncc.errors import KronccError
from kroncc.graph.capture import capture
from kroncc.graph.printer import format_graph
from kroncc.graph.verify import same_structure, structure_of
from kroncc.model.replay import replay
from kroncc.recipe.schema import PassCall, Scope
from kroncc.rewrite.pipeline import compress_graph, site_seed

GOLDEN = Path(__file__).parents[1] / "golden"
CLASSIFIER = "AutoModelForSequenceClassification"


def kronecker(*targets, exclude=(), count=None, **options):
    return PassCall(
        name="kronecker",
        scope=Scope(targets=list(targets), exclude=list(exclude), count=count),
        options=options,
    )


K_8 = (
    kronecker("@attention.*", a=[16, 16], b=[2, 2], count=8),
    kronecker("@ffn.up", a=[4, 2], b=[16, 16]),
    kronecker("@ffn.down", a=[2, 4], b=[16, 16]),
    kronecker("@embedding.word", b=[1, 8]),
)


def test_golden(tiny):
    """K_8's shapes on a small BERT, printed."""
    graph = capture(tiny("bert", CLASSIFIER))
    compress_graph(graph, K_8)
    page = format_graph(graph)
    path = GOLDEN / "graph_bert_kronecker.txt"
    if os.environ.get("KRONCC_UPDATE_GOLDENS") == "1":
        path.write_text(page)
    assert page == path.read_text()


def test_sites_of_equal_options_are_one_entry(tiny):
    done = compress_graph(capture(tiny("bert", CLASSIFIER)), K_8)
    assert [(applied.name, len(applied.sites)) for applied in done.structure.passes] == [
        ("kronecker", 8),
        ("kronecker", 2),
        ("kronecker", 2),
        ("kronecker", 1),
    ]
    assert done.structure.passes[3].options["a"] == [100, 4]
    assert done.skipped == ()


def test_replaying_the_structure_gives_the_same_weights(tiny):
    model, twin = tiny("bert", CLASSIFIER), tiny("bert", CLASSIFIER)
    done = compress_graph(capture(model), K_8)
    replay(twin, done.structure)
    ours, theirs = model.state_dict(), twin.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_meta_promises_what_real_weights_give(tiny):
    real = capture(tiny("gpt2", "AutoModelForCausalLM"))
    unweighted = tiny("gpt2", "AutoModelForCausalLM").to("meta")
    unweighted.tie_weights()  # moving to meta unties
    meta = capture(unweighted)
    calls = [kronecker("@ffn.*", ratio=2), kronecker("@embedding.word", b=[1, 4])]
    promised, given = compress_graph(meta, calls), compress_graph(real, calls)
    assert promised == given
    same_structure(structure_of(meta), structure_of(real))


def test_a_tied_head_follows_its_embedding(tiny):
    model = tiny("gpt2", "AutoModelForCausalLM")
    done = compress_graph(capture(model), [kronecker("@embedding.word", b=[1, 4])])
    assert done.structure.passes[0].sites == ("transformer.wte",)
    assert model.lm_head.a is model.transformer.wte.a


def test_a_target_on_the_head_alone_treats_the_pair_once(tiny):
    model = tiny("gpt2", "AutoModelForCausalLM")
    done = compress_graph(capture(model), [kronecker("lm_head", "transformer.wte", b=[1, 4])])
    assert [applied.sites for applied in done.structure.passes] == [("transformer.wte",)]
    assert model.lm_head.a is model.transformer.wte.a


def test_a_table_that_only_others_call_follows_too(tiny):
    """T5 ties two embeddings and the head to a third embedding that nothing calls."""
    model = tiny("t5", "AutoModelForSeq2SeqLM", tie_word_embeddings=True)
    done = compress_graph(capture(model), [kronecker("@embedding.word", b=[1, 4])])
    assert done.structure.passes[0].sites == ("encoder.embed_tokens",)
    assert model.shared.a is model.encoder.embed_tokens.a is model.decoder.embed_tokens.a is model.lm_head.a


def test_a_head_that_shares_a_bias_only_is_left_out(tiny):
    model = tiny("bert", "AutoModelForMaskedLM")
    compress_graph(capture(model), [kronecker("@embedding.word", b=[1, 4])])
    assert model.cls.predictions.decoder.a is model.bert.embeddings.word_embeddings.a
    assert model.cls.predictions.decoder.bias is model.cls.predictions.bias


def test_what_a_pass_cannot_treat_is_skipped_with_its_reason(tiny):
    graph = capture(tiny("bert", CLASSIFIER))
    done = compress_graph(graph, [kronecker("@norm", "@ffn.up", ratio=2)])
    assert {one.reason for one in done.skipped} == {
        "is a LayerNorm; kronecker treats Linear, Embedding, Conv1D"
    }
    assert len(done.skipped) == 5
    assert len(done.structure.passes[0].sites) == 2


def test_passes_stack_only_where_they_fit(tiny):
    graph = capture(tiny("bert", CLASSIFIER))
    done = compress_graph(graph, [kronecker("@ffn.up", ratio=2), kronecker("@ffn.up", ratio=4)])
    assert len(done.structure.passes) == 1
    assert all("KroneckerLinear" in one.reason for one in done.skipped)


@pytest.mark.parametrize(
    ("call", "code", "text"),
    [
        (kronecker("@ffn.up", a=[7, 2]), "K420", "does not divide"),
        (kronecker("@ffn.up", a=[4, 2], rank=99), "K422", "rank 99 is too large"),
        (kronecker("@ffn.gate", ratio=2), "K204", "matches no"),
        (kronecker("@ffn.up", ratio=2, count=3), "K206", "3"),
        (kronecker("@ffn.up", ratoi=2), "K402", "did you mean 'ratio'"),
        (kronecker("@ffn.up", ratio="four"), "K402", "ratio"),
        (kronecker("@ffn.up", ratio=4, params=9), "K402", "pass 'kronecker': give exactly one of: `a`"),
    ],
)
def test_mistakes_name_the_pass_and_its_place(tiny, call, code, text):
    with pytest.raises(KronccError, match=text) as caught:
        compress_graph(capture(tiny("bert", CLASSIFIER)), [kronecker("@attention.q", ratio=2), call])
    problem = caught.value.problems[0]
    assert problem.code == code
    assert problem.path.startswith("passes[1].kronecker")


def test_the_seed_of_a_site_depends_on_stage_and_name_only():
    assert site_seed(0, "a") == site_seed(0, "a")
    assert len({site_seed(0, "a"), site_seed(1, "a"), site_seed(0, "b")}) == 3
