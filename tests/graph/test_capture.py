"""The captured graph computes what the eager model computes, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from kroncc.graph.capture import capture

CASES = [
    ("bert", "AutoModelForSequenceClassification"),
    ("bert", "AutoModelForTokenClassification"),
    ("bert", "AutoModelForMaskedLM"),
    ("bert", "AutoModel"),
    ("distilbert", "AutoModelForSequenceClassification"),
    ("roberta", "AutoModelForSequenceClassification"),
    ("albert", "AutoModelForSequenceClassification"),
    ("electra", "AutoModelForSequenceClassification"),
    ("mpnet", "AutoModelForSequenceClassification"),
    ("gpt2", "AutoModelForCausalLM"),
    ("gpt2", "AutoModelForSequenceClassification"),
    ("llama", "AutoModelForCausalLM"),
    ("vit", "AutoModelForImageClassification"),
    ("t5", "AutoModelForSeq2SeqLM"),
    ("qwen3", "AutoModelForCausalLM"),
    ("modernbert", "AutoModelForSequenceClassification"),
    ("deberta-v2", "AutoModelForSequenceClassification"),
    ("opt", "AutoModelForCausalLM"),
]
IDS = [f"{family}-{auto.removeprefix('AutoModel') or 'Base'}" for family, auto in CASES]
Captured = tuple[Any, Any]


@pytest.fixture(scope="module", params=CASES, ids=IDS)
def captured(request: Any, tiny: Callable[..., Any]) -> Captured:
    family, auto = request.param
    model = tiny(family, auto)
    return model, capture(model)


def _loss(outputs: Any) -> torch.Tensor:
    return sum(value.float().square().mean() for value in outputs.values())


@pytest.mark.parametrize(("batch", "length"), [(4, 9), (1, 13), (5, 2)])
def test_eval_is_bit_exact(captured: Captured, inputs_for: Any, batch: int, length: int) -> None:
    model, mg = captured
    inputs = inputs_for(mg.inputs, batch, length + 2)
    mg.eval()
    with torch.no_grad():
        expected, got = model(**inputs), mg.module(**inputs)
    assert got
    for name, value in got.items():
        assert torch.equal(value, expected[name]), name


def test_gradients_are_equal(captured: Captured, inputs_for: Any) -> None:
    model, mg = captured
    inputs = inputs_for(mg.inputs)
    mg.eval()
    grads = []
    for view in (model, mg.module):
        model.zero_grad()
        outputs = view(**inputs)
        _loss({name: outputs[name] for name in mg.outputs}).backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name


def test_training_draws_the_same_dropout(captured: Captured, inputs_for: Any) -> None:
    model, mg = captured
    inputs = inputs_for(mg.inputs)
    # A cache lays keys out anew, which changes the order of sums; the graph has none.
    without = {"use_cache": False} if getattr(model.config, "use_cache", False) else {}
    mg.train()
    results = []
    for view, seed in ((partial(model, **without), 0), (mg.module, 0), (mg.module, 1)):
        torch.manual_seed(seed)
        outputs = view(**inputs)
        results.append({name: outputs[name] for name in mg.outputs})
    mg.eval()
    same = all(torch.equal(results[0][name], results[1][name]) for name in mg.outputs)
    assert same
    has_dropout = any(
        getattr(module, "p", 0) or getattr(module, "dropout_p", 0) for module in mg.module.modules()
    )
    differs = not all(torch.equal(results[1][name], results[2][name]) for name in mg.outputs)
    assert differs == has_dropout
