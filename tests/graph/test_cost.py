"""Costs against known figures, torch's own FLOP counter and what autograd really keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kroncc.graph.capture import capture
from kroncc.graph.cost import ModelCost, model_cost
from kroncc.graph.rewriter import Rewriter

CLASSIFIER = "AutoModelForSequenceClassification"
CASES = [
    ("bert", CLASSIFIER),
    ("gpt2", "AutoModelForCausalLM"),
    ("llama", "AutoModelForCausalLM"),
    ("vit", "AutoModelForImageClassification"),
    ("t5", "AutoModelForSeq2SeqLM"),
    ("mpnet", CLASSIFIER),
]
BERT_LINEAR = 12 * (4 * 2 * 768 * 768 + 2 * 2 * 768 * 3072)  # FLOPs a token of the layers' linear maps


def _full_size(config: Any, model_class: Any) -> ModelCost:
    with torch.device("meta"):
        model = model_class._from_config(config)
    return model_cost(capture(model))


@pytest.fixture(scope="module")
def bert_base() -> ModelCost:
    return _full_size(transformers.BertConfig(), transformers.BertForSequenceClassification)


def test_bert_base(bert_base: ModelCost) -> None:
    assert bert_base.params == 109_483_778
    assert bert_base.bytes == 4 * 109_483_778
    flops = bert_base.flops(1, 128)
    assert flops.linear == 128 * BERT_LINEAR == 21_743_271_936
    products = 12 * 2 * (2 * 128 * 128 * 768)
    assert flops.total == flops.linear + products + 2 * 768 * 768 + 2 * 768 * 2
    assert bert_base.training_flops(4, 64) == 3 * bert_base.flops(4, 64).total


def test_rows_of_bert_base(bert_base: ModelCost) -> None:
    rows = {row.fqn: row for row in bert_base.modules}
    up = rows["bert.encoder.layer.3.intermediate.dense"]
    assert (up.type, up.shape, up.params) == ("Linear", "3072x768", 768 * 3072 + 3072)
    assert up.flops(2, 10) == 2 * 2 * 10 * 768 * 3072
    table = rows["bert.embeddings.word_embeddings"]
    assert (table.shape, table.params, table.flops(1, 128)) == ("30522x768", 30522 * 768, 0)
    assert "bert.embeddings.dropout" not in rows
    assert sum(row.params for row in bert_base.modules) == bert_base.params
    products = 12 * 2 * (2 * 128 * 128 * 768)  # of attention, which has no row
    assert sum(row.flops(1, 128) for row in bert_base.modules) == bert_base.flops(1, 128).total - products


def test_tied_head_of_gpt2_counts_once() -> None:
    cost = _full_size(transformers.GPT2Config(n_layer=12), transformers.GPT2LMHeadModel)
    assert cost.params == 124_439_808
    assert cost.bytes == 4 * 124_439_808
    rows = {row.fqn: row for row in cost.modules}
    assert (rows["lm_head"].params, rows["lm_head"].shape) == (0, "50257x768")
    assert rows["lm_head"].flops(1, 10) == 2 * 10 * 50257 * 768
    assert rows["transformer.h.0.attn.c_attn"].shape == "2304x768"
    assert sum(row.params for row in cost.modules) == cost.params


@pytest.mark.parametrize(("family", "auto"), CASES, ids=[family for family, _ in CASES])
def test_flops_are_those_of_torchs_counter(
    family: str, auto: str, tiny: Callable[..., Any], inputs_for: Callable[..., Any]
) -> None:
    model = tiny(family, auto)
    mg = capture(model)
    cost = model_cost(mg)
    eager = type(model)._from_config(model.config, attn_implementation="eager").eval()
    for batch, length in ((2, 7), (3, 12)):
        inputs = inputs_for(mg.inputs, batch=batch, length=length)
        if "decoder_input_ids" in inputs:  # a target as long as the source
            inputs["decoder_input_ids"] = inputs["input_ids"]
        with FlopCounterMode(display=False) as counter:
            eager(**inputs)
        assert cost.flops(batch, length).total == counter.get_total_flops()


class _Own(nn.Module):
    """A replacement that says itself what it costs and how it looks."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.core = nn.Parameter(torch.zeros(3, 5))
        self.outputs = inner.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(*x.shape[:-1], self.outputs) + self.core.sum()

    def flops(self, shape: tuple[int, ...]) -> int:
        assert all(type(size) is int for size in shape)
        return 1000 * shape[0] * shape[1]

    def shape_text(self) -> str:
        return "3 of 5"


def _sequence(inner: nn.Linear) -> nn.Module:
    return nn.Sequential(nn.Linear(inner.in_features, 4, bias=False), nn.Linear(4, inner.out_features))


def _swapped(
    tiny: Callable[..., Any], fqns: Sequence[str], make: Callable[[Any], nn.Module]
) -> list[ModelCost]:
    mg = capture(tiny("bert", CLASSIFIER))
    before = model_cost(mg)
    for fqn in fqns:
        Rewriter(mg).swap(fqn, make(mg.get(fqn)))
    return [before, model_cost(mg)]


def test_a_replaced_module_counts_by_its_own_flops(tiny: Callable[..., Any]) -> None:
    fqn = "bert.encoder.layer.0.intermediate.dense"
    before, after = _swapped(tiny, [fqn], _Own)
    rows = {row.fqn: row for row in after.modules}
    assert (rows[fqn].type, rows[fqn].shape, rows[fqn].params) == ("_Own", "3 of 5", 15)
    assert rows[fqn].flops(2, 7) == 14_000
    assert after.flops(2, 7).linear == before.flops(2, 7).linear - 2 * 14 * 32 * 64 + 14_000
    assert before.params - after.params == 32 * 64 + 64 - 15


def test_costs_taken_before_a_swap_stay(tiny: Callable[..., Any]) -> None:
    fqn = "bert.encoder.layer.0.intermediate.dense"
    before, _ = _swapped(tiny, [fqn], _Own)
    assert {row.fqn: row for row in before.modules}[fqn].flops(1, 3) == 2 * 3 * 32 * 64


def test_a_module_without_a_formula_is_metered(tiny: Callable[..., Any]) -> None:
    fqn = "bert.encoder.layer.1.output.dense"
    _, after = _swapped(tiny, [fqn], _sequence)
    row = {row.fqn: row for row in after.modules}[fqn]
    assert row.flops(2, 7) == 2 * 14 * (64 * 4 + 4 * 32)
    assert row.shape == "4x64 + 32x4"


def test_bytes_follow_dtype_and_persistent_buffers(tiny: Callable[..., Any]) -> None:
    model = tiny("bert", CLASSIFIER)
    mg = capture(model)
    params = model_cost(mg).params
    assert params == sum(parameter.numel() for parameter in model.parameters())
    model.register_buffer("codes", torch.zeros(10, dtype=torch.int8))
    model.register_buffer("scratch", torch.zeros(10), persistent=False)
    model.classifier.bfloat16()
    halved = sum(parameter.numel() for parameter in model.classifier.parameters())
    cost = model_cost(mg)
    assert cost.bytes == 4 * params - 2 * halved + 10
    assert cost.params == params


def test_parameters_outside_of_modules_have_rows(tiny: Callable[..., Any]) -> None:
    cost = model_cost(capture(tiny("vit", "AutoModelForImageClassification")))
    rows = {row.fqn: row for row in cost.modules}
    assert rows["vit.embeddings.position_embeddings"].shape == "1x17x32"
    assert sum(row.params for row in cost.modules) == cost.params


def _kept_by_autograd(model: nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in weights:
            kept[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = model(**inputs)
    assert result is not None
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(("family", "auto"), CASES, ids=[family for family, _ in CASES])
def test_training_memory_is_near_what_autograd_keeps(
    family: str, auto: str, tiny: Callable[..., Any], inputs_for: Callable[..., Any]
) -> None:
    model = tiny(family, auto).train()
    mg = capture(model)
    inputs = inputs_for(mg.inputs, batch=3, length=12)
    if "decoder_input_ids" in inputs:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    said = model_cost(mg).activation_peak(3, 12, train=True)
    assert said == pytest.approx(_kept_by_autograd(model, inputs), rel=0.15)


def test_inference_peak_of_bert(bert_base: ModelCost) -> None:
    # Alive in the FFN: what enters it (768 wide), what the activation reads and writes (3072 wide each).
    widest = 4 * 128 * (768 + 2 * 3072)
    peak = bert_base.activation_peak(1, 128)
    assert widest <= peak <= 1.1 * widest
    assert bert_base.activation_peak(8, 128) == pytest.approx(8 * peak, rel=0.01)
    assert bert_base.activation_peak(1, 128, train=True) > 20 * peak
