"""Swaps show in both views, at every call, or not at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from kroncc.errors import PassError
from kroncc.graph.capture import capture
from kroncc.graph.rewriter import Rewriter
from kroncc.graph.verify import structure_of, verify

QUERY = "bert.encoder.layer.0.attention.self.query"


def _low_rank(rank: int = 4, out: int = 32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, rank, bias=False), nn.Linear(rank, out))


@pytest.fixture
def mg(tiny: Any) -> Any:
    return capture(tiny("bert", "AutoModelForSequenceClassification"))


def test_swap_shows_in_both_views(mg: Any, inputs_for: Any) -> None:
    inputs = inputs_for(mg.inputs)
    before = mg.module(**inputs)["logits"]
    new = _low_rank()
    Rewriter(mg).swap(QUERY, new)
    assert mg.model.get_submodule(QUERY) is new
    assert mg.module.get_submodule(QUERY) is new
    assert mg.get(QUERY) is new
    assert not new.training
    with torch.no_grad():
        after = mg.module(**inputs)["logits"]
        assert torch.equal(after, mg.model(**inputs).logits)
    assert not torch.equal(before, after)
    verify(mg)


def test_swapped_module_trains(mg: Any, inputs_for: Any) -> None:
    new = _low_rank()
    Rewriter(mg).swap(QUERY, new)
    mg.train()
    assert new.training
    mg.module(**inputs_for(mg.inputs))["logits"].sum().backward()
    assert all(parameter.grad is not None for parameter in new.parameters())


def test_every_call_changes(tiny: Any, inputs_for: Any) -> None:
    mg = capture(tiny("albert"))
    query = next(fqn for fqn in mg.fqns() if fqn.endswith("query"))
    Rewriter(mg).swap(query, _low_rank())
    inputs = inputs_for(mg.inputs)
    assert torch.equal(
        mg.module(**inputs)["last_hidden_state"], mg.model(**inputs, use_cache=False).last_hidden_state
    )


def test_swap_on_meta_and_bind_to_weights(tiny: Any, inputs_for: Any) -> None:
    real = tiny("bert", "AutoModelForSequenceClassification")
    with torch.device("meta"):
        empty = type(real)._from_config(real.config)
    promised = capture(empty)
    Rewriter(promised).swap(QUERY, _low_rank().to("meta"))
    real.bert.encoder.layer[0].attention.self.query = _low_rank()
    bound = promised.bind(real)
    assert structure_of(bound) == structure_of(promised)
    inputs = inputs_for(bound.inputs)
    assert torch.equal(bound.module(**inputs)["logits"], real(**inputs).logits)


@pytest.mark.parametrize(
    ("module", "code", "words"),
    [
        (nn.Linear(32, 16), "K433", "shape [2, 5, 16] where [2, 5, 32] is due"),
        (nn.Linear(32, 32, dtype=torch.float16), "K435", "holds torch.float16"),
        (nn.Linear(16, 32), "K432", "fails at"),
        (nn.Flatten(1), "K433", "shape [2, 160]"),
        (nn.LSTM(32, 32), "K433", "returns tuple instead of one tensor"),
    ],
)
def test_what_does_not_fit_is_refused(mg: Any, module: nn.Module, code: str, words: str) -> None:
    old = mg.get(QUERY)
    with pytest.raises(PassError) as caught:
        Rewriter(mg, by="kronecker").swap(QUERY, module)
    problem = caught.value.problems[0]
    assert problem.code == code
    assert words in problem.message
    assert QUERY in problem.message
    assert "'kronecker'" in problem.message
    assert mg.get(QUERY) is old


def test_a_module_for_one_length_only_is_refused(mg: Any) -> None:
    class Five(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(-1, 5, 32)

    with pytest.raises(PassError, match=r"K43[23]"):
        Rewriter(mg).swap(QUERY, Five())


def test_unknown_module_is_named_with_the_nearest(mg: Any) -> None:
    with pytest.raises(PassError) as caught:
        Rewriter(mg).swap(QUERY + "y", nn.Linear(32, 32))
    assert caught.value.problems[0].code == "K430"
    assert QUERY in caught.value.problems[0].remedy


def test_parameters_read_from_outside_are_refused(tiny: Any) -> None:
    mg = capture(tiny("opt", "AutoModelForCausalLM"))
    positions = "model.decoder.embed_positions"
    assert mg.graph.find_nodes(op="get_attr")
    with pytest.raises(PassError) as caught:
        Rewriter(mg).swap(positions, nn.Embedding(42, 32))
    assert caught.value.problems[0].code == "K431"


def test_tied_partners_change_together(tiny: Any, inputs_for: Any) -> None:
    mg = capture(tiny("gpt2", "AutoModelForCausalLM"))
    before = structure_of(mg)
    embedding, head = nn.Embedding(100, 32), nn.Linear(32, 100, bias=False)
    head.weight = embedding.weight
    Rewriter(mg).swap("transformer.wte", embedding, {"lm_head": head})
    verify(mg, before)
    assert mg.tied("lm_head") == ("transformer.wte",)
    inputs = inputs_for(mg.inputs)
    assert torch.equal(mg.module(**inputs)["logits"], mg.model(**inputs, use_cache=False).logits)


def test_a_tie_that_breaks_is_found(tiny: Any) -> None:
    mg = capture(tiny("gpt2", "AutoModelForCausalLM"))
    before = structure_of(mg)
    Rewriter(mg).swap("lm_head", nn.Linear(32, 100, bias=False))
    with pytest.raises(PassError) as caught:
        verify(mg, before)
    assert caught.value.problems[0].code == "K444"
    assert "lm_head = transformer.wte" in caught.value.problems[0].message
    verify(mg, before, ties=[])


def test_insert_and_erase(mg: Any, inputs_for: Any) -> None:
    inputs = inputs_for(mg.inputs)
    before = mg.module(**inputs)["logits"]
    rewriter = Rewriter(mg)
    classifier = mg.calls("classifier")[0]
    doubled = rewriter.insert_call(classifier, "scale", nn.Linear(2, 2), (classifier,))
    assert doubled.meta["val"].shape == classifier.meta["val"].shape
    rewriter.replace_uses(classifier, doubled)
    rewriter.add_output("hidden", mg.calls("bert.pooler.activation")[0])
    outputs = mg.module(**inputs)
    assert torch.equal(outputs["logits"], mg.get("scale")(before))
    assert outputs["hidden"].shape == (4, 32)
    rewriter.replace_uses(doubled, classifier)
    rewriter.erase(doubled)
    assert torch.equal(mg.module(**inputs)["logits"], before)
    with pytest.raises(PassError, match="K434"):
        rewriter.insert_call(classifier, "bert.pooler", nn.Identity(), (classifier,))
