"""Two views of one model stay together when bound to another tree or copied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from kroncc.errors import CaptureError
from kroncc.graph.capture import capture
from kroncc.graph.printer import format_graph
from kroncc.graph.rewriter import Rewriter


@pytest.mark.parametrize("family", ["bert", "t5", "llama", "deberta-v2", "modernbert", "vit"])
def test_bind_runs_the_other_weights(tiny: Any, inputs_for: Any, family: str) -> None:
    first, second = tiny(family), tiny(family, seed=1)
    mg = capture(first)
    bound = mg.bind(second)
    inputs = inputs_for(mg.inputs)
    with torch.no_grad():
        one, two = mg.module(**inputs), bound.module(**inputs)
        expected = second(**inputs)
    assert torch.equal(two["last_hidden_state"], expected.last_hidden_state)
    assert not torch.equal(one["last_hidden_state"], two["last_hidden_state"])
    assert format_graph(bound) == format_graph(mg)
    bound.train()
    assert not any(module.training for module in mg.module.modules())


def test_bind_takes_compressed_trees(tiny: Any, inputs_for: Any) -> None:
    model = tiny("bert")
    mg = capture(tiny("bert"))
    model.encoder.layer[1].output.dense = nn.Sequential(nn.Linear(64, 4), nn.Linear(4, 32))
    bound = mg.bind(model)
    inputs = inputs_for(mg.inputs)
    assert torch.equal(bound.module(**inputs)["pooler_output"], model(**inputs).pooler_output)


def test_bind_refuses_what_does_not_fit(tiny: Any) -> None:
    mg = capture(tiny("bert"))
    with pytest.raises(CaptureError, match="K307"):
        mg.bind(tiny("gpt2"))
    with pytest.raises(CaptureError, match="K309"):
        mg.bind(tiny("bert").half())


def test_copy_shares_tensors_and_nothing_else(tiny: Any, inputs_for: Any) -> None:
    mg = capture(tiny("gpt2", "AutoModelForCausalLM"))
    twin = mg.copy()
    theirs = dict(twin.model.named_parameters())
    assert all(parameter is theirs[name] for name, parameter in mg.model.named_parameters())
    assert twin.ties() == mg.ties() == (("transformer.wte", "lm_head"),)
    inputs = inputs_for(mg.inputs)
    before = mg.module(**inputs)["logits"]
    Rewriter(twin).swap("transformer.h.0.mlp.act", nn.ReLU())
    assert torch.equal(mg.module(**inputs)["logits"], before)
    assert not torch.equal(twin.module(**inputs)["logits"], before)


def test_state_dicts_agree(tiny: Any) -> None:
    mg = capture(tiny("bert", "AutoModelForSequenceClassification"))
    assert mg.module.state_dict().keys() == mg.model.state_dict().keys()


def test_moving_takes_buffers_along(tiny: Any) -> None:
    mg = capture(tiny("llama")).to("meta")
    tensors = [*mg.module.parameters(), *mg.module.buffers(), *mg.model.parameters(), *mg.model.buffers()]
    assert all(tensor.is_meta for tensor in tensors)


def test_calls_in_order(tiny: Any) -> None:
    mg = capture(tiny("bert"))
    assert mg.fqns()[:2] == ["embeddings.word_embeddings", "embeddings.token_type_embeddings"]
    assert mg.fqns()[-1] == "pooler.activation"
    assert mg.inputs == ("input_ids", "token_type_ids", "attention_mask")
