"""Each promise of a model graph, broken once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from kroncc.errors import PassError
from kroncc.graph.capture import capture
from kroncc.graph.rewriter import Rewriter
from kroncc.graph.verify import same_structure, structure_of, uncalled, verify


@pytest.fixture
def mg(tiny: Any) -> Any:
    return capture(tiny("bert", "AutoModelForSequenceClassification"))


def _code(mg: Any, *args: Any) -> tuple[str, str]:
    with pytest.raises(PassError) as caught:
        verify(mg, *args)
    return caught.value.problems[0].code, caught.value.problems[0].message


@pytest.mark.parametrize(
    ("family", "auto"),
    [
        ("bert", "AutoModelForMaskedLM"),
        ("albert", "AutoModel"),
        ("llama", "AutoModelForCausalLM"),
        ("t5", "AutoModelForSeq2SeqLM"),
        ("vit", "AutoModelForImageClassification"),
        ("modernbert", "AutoModelForMaskedLM"),
        ("bart", "AutoModelForSequenceClassification"),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_a_fresh_graph_holds(tiny: Any, family: str, auto: str, training: bool) -> None:
    mg = capture(tiny(family, auto)).train(training)
    verify(mg, structure_of(mg))


def test_structure_is_the_models(mg: Any) -> None:
    structure = structure_of(mg)
    assert structure.tensors == {n: (tuple(t.shape), str(t.dtype)) for n, t in mg.model.state_dict().items()}
    assert structure.inputs[0] == ("input_ids", "torch.int64[B, L]")
    assert structure.outputs == (("logits", "torch.float32[B, 2]"),)
    assert structure.ties == frozenset()


def test_ties_of_an_encoder_decoder(tiny: Any) -> None:
    mg = capture(tiny("t5", "AutoModelForSeq2SeqLM"))
    assert structure_of(mg).ties == {
        frozenset({"shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"})
    }


def test_an_unused_pooler_is_reported_and_allowed(tiny: Any) -> None:
    model = tiny("bert")
    model.add_module("spare", nn.Linear(2, 2))
    mg = capture(model)
    assert uncalled(mg) == ["spare.weight", "spare.bias"]
    verify(mg, structure_of(mg))


def test_broken_graph(mg: Any) -> None:
    node = mg.calls("classifier")[0]
    node.append(mg.calls("bert.pooler.dense")[0])
    assert _code(mg)[0] == "K440"


def test_views_that_differ(mg: Any) -> None:
    mg.model.classifier = nn.Linear(32, 2)
    code, message = _code(mg)
    assert code == "K441"
    assert "'classifier'" in message


def test_wrong_shape(mg: Any) -> None:
    new = nn.Linear(32, 3)
    mg.model.classifier = new
    mg.module.classifier = new
    code, message = _code(mg)
    assert code == "K442"
    assert "classifier" in message
    assert "[2, 3] where [2, 2] is due" in message


def test_wrong_dtype(mg: Any) -> None:
    new = nn.Sequential(nn.Linear(32, 2), _Half())
    mg.model.classifier = new
    mg.module.classifier = new
    assert "torch.float16 where torch.float32 is due" in _code(mg)[1]


class _Half(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.half()


def test_changed_signature(mg: Any) -> None:
    before = structure_of(mg)
    Rewriter(mg).add_output("pooled", mg.calls("bert.pooler.activation")[0])
    verify(mg)
    assert _code(mg, before)[0] == "K443"


def test_orphan(mg: Any) -> None:
    before = structure_of(mg)
    mg.model.bert.pooler.register_parameter("lost", nn.Parameter(torch.zeros(2)))
    code, message = _code(mg, before)
    assert code == "K445"
    assert "bert.pooler.lost" in message


def test_same_structure_names_what_differs(mg: Any) -> None:
    promised = structure_of(mg)
    same_structure(promised, structure_of(mg.copy()))
    other = replace(promised, tensors=promised.tensors | {"classifier.bias": ((3,), "torch.float32")})
    with pytest.raises(PassError) as caught:
        same_structure(promised, other)
    assert caught.value.problems[0].code == "K446"
    assert "classifier.bias: promised ((2,)" in caught.value.problems[0].message
    tied = replace(promised, ties=frozenset({frozenset({"a", "b"})}))
    with pytest.raises(PassError, match="K446"):
        same_structure(promised, tied)
