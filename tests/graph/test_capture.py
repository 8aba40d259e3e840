"""The captured graph computes what the eager model computes, to the bit."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertPreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from kroncc.errors import CaptureError
from kroncc.graph.capture import capture, default_inputs
from kroncc.graph.modules import Attention
from kroncc.graph.propagate import ShapeRun

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
    ("bart", "AutoModelForSequenceClassification"),
    ("gpt_neo", "AutoModelForCausalLM"),
]
IDS = [f"{family}-{auto.removeprefix('AutoModel') or 'Base'}" for family, auto in CASES]
Captured = tuple[Any, Any]


@pytest.fixture(scope="module", params=CASES, ids=IDS)
def captured(request: Any, tiny: Callable[..., Any]) -> Captured:
    family, auto = request.param
    model = tiny(family, auto)
    return model, capture(model)


def _eager(model: Any) -> Any:
    """Return the model without a cache, which lays keys out anew and so changes the order of sums."""
    return partial(model, use_cache=False) if getattr(model.config, "use_cache", False) else model


def _loss(outputs: Any) -> torch.Tensor:
    return sum(value.float().square().mean() for value in outputs.values())


@pytest.mark.parametrize(("batch", "length"), [(4, 9), (1, 13), (5, 2)])
def test_eval_is_bit_exact(captured: Captured, inputs_for: Any, batch: int, length: int) -> None:
    model, mg = captured
    inputs = inputs_for(mg.inputs, batch, length + 2)
    mg.eval()
    with torch.no_grad():
        expected, got = _eager(model)(**inputs), mg.module(**inputs)
    assert got
    for name, value in got.items():
        assert torch.equal(value, expected[name]), name


def test_gradients_are_equal(captured: Captured, inputs_for: Any) -> None:
    model, mg = captured
    inputs = inputs_for(mg.inputs)
    mg.eval()
    grads = []
    for view in (_eager(model), mg.module):
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
    mg.train()
    results = []
    for view, seed in ((_eager(model), 0), (mg.module, 0), (mg.module, 1)):
        torch.manual_seed(seed)
        outputs = view(**inputs)
        results.append({name: outputs[name] for name in mg.outputs})
    mg.eval()
    same = all(torch.equal(results[0][name], results[1][name]) for name in mg.outputs)
    assert same
    dropouts = [getattr(m, "p", 0) or getattr(m, "dropout_p", 0) for m in mg.module.modules()]
    differs = not all(torch.equal(results[1][name], results[2][name]) for name in mg.outputs)
    assert differs == any(dropouts)


def test_graph_is_whole(captured: Captured) -> None:
    model, mg = captured
    mg.graph.lint()
    trained = {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for parameter in mg.module.parameters()} <= trained
    tensors = [*mg.module.parameters(), *mg.module.buffers()]
    assert not any(tensor.is_meta for tensor in tensors)
    for node in mg.graph.nodes:
        if node.op == "output":
            continue
        assert "val" in node.meta or node.target is getattr
        stack = node.meta["stack"]
        assert node.meta["fqn"] == (stack[-1] if stack else "")
        for fqn in stack:
            model.get_submodule(fqn)


def test_plain_layers_are_calls(captured: Captured) -> None:
    model, mg = captured
    kinds = ("Linear", "Conv1D", "Embedding", "LayerNorm")
    flat = [
        node.name for node in mg.graph.nodes if node.op == "call_function" and _owner(model, node) in kinds
    ]
    assert flat == []
    called = [fqn for fqn in mg.fqns() if type(mg.get(fqn)).__name__ in kinds]
    assert len(called) > 5
    assert all(mg.module.get_submodule(fqn) is model.get_submodule(fqn) for fqn in called)


def _owner(model: Any, node: Any) -> str:
    return type(model.get_submodule(node.meta.get("fqn", ""))).__name__


def test_runs_on_another_device(captured: Captured) -> None:
    _, mg = captured
    sizes = dict.fromkeys(("batch", "length", "target_length"), 6)
    known = {name: size for name, size in sizes.items() if name in _sizes(mg)}
    assert ShapeRun(mg.module, known).run_on_meta() == []


def _sizes(mg: Any) -> set[str]:
    from kroncc.graph.symbolic import symbols

    return set(symbols(mg.graph))


@pytest.mark.parametrize(
    ("family", "auto", "expected"),
    [
        ("bert", "AutoModel", {"input_ids", "token_type_ids", "attention_mask"}),
        ("distilbert", "AutoModel", {"input_ids", "attention_mask"}),
        ("gpt2", "AutoModelForCausalLM", {"input_ids", "attention_mask"}),
        ("llama", "AutoModelForCausalLM", {"input_ids", "attention_mask"}),
        ("deberta-v2", "AutoModel", {"input_ids", "token_type_ids", "attention_mask"}),
        ("vit", "AutoModel", {"pixel_values"}),
        ("t5", "AutoModelForSeq2SeqLM", {"input_ids", "attention_mask", "decoder_input_ids"}),
        ("bart", "AutoModelForSequenceClassification", {"input_ids", "attention_mask"}),
    ],
)
def test_default_inputs(tiny: Any, family: str, auto: str, expected: set[str]) -> None:
    assert set(default_inputs(tiny(family, auto))) == expected


def test_base_model_has_its_pooler(tiny: Any) -> None:
    mg = capture(tiny("bert"))
    assert list(mg.outputs) == ["last_hidden_state", "pooler_output"]


def test_attention_keeps_its_settings(tiny: Any) -> None:
    mg = capture(tiny("bert", attention_probs_dropout_prob=0.25))
    attention = mg.get("encoder.layer.0.attention.self.sdpa")
    assert isinstance(attention, Attention)
    assert (attention.dropout_p, attention.is_causal, attention.enable_gqa) == (0.25, False, False)
    assert attention.scale == pytest.approx(8**-0.5)
    assert mg.calls("encoder.layer.0.attention.self.sdpa")[0].meta["fqn"] == "encoder.layer.0.attention.self"
    assert "encoder.layer.0.attention.self.sdpa" not in mg.fqns()
    with pytest.raises(AttributeError):
        mg.model.get_submodule("encoder.layer.0.attention.self.sdpa")


@pytest.mark.parametrize("gqa", [False, True])
def test_attention_is_the_function(gqa: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(2, 4, 5, 8),
        torch.randn(2, 2 if gqa else 4, 7, 8),
        torch.randn(2, 2 if gqa else 4, 7, 8),
    )
    mask = torch.rand(2, 1, 5, 7) > 0.3
    module = Attention(dropout_p=0.5, scale=0.3, enable_gqa=gqa).eval()
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=gqa)
    assert torch.equal(module(q, k, v, mask), expected)
    module.train()
    assert not torch.equal(module(q, k, v, mask), module(q, k, v, mask))


def test_repeated_layers_call_the_same_modules(tiny: Any) -> None:
    mg = capture(tiny("albert"))
    query = next(fqn for fqn in mg.fqns() if fqn.endswith("query"))
    assert len(mg.calls(query)) == 2
    assert sum(isinstance(extra, Attention) for extra in mg.extras.values()) == 1


def test_tied_head_is_a_call_of_its_own(tiny: Any) -> None:
    mg = capture(tiny("gpt2", "AutoModelForCausalLM"))
    assert mg.tied("lm_head") == ("transformer.wte",)
    assert mg.calls("lm_head")
    assert not mg.graph.find_nodes(op="get_attr", target="transformer.wte.weight")


def test_modes_and_sharing(tiny: Any) -> None:
    mg = capture(tiny("bert"))
    assert not mg.get("encoder.layer.0.attention.self.sdpa").training
    mg.module.train()
    assert mg.get("encoder.layer.0.attention.self.sdpa").training
    assert mg.model.encoder.layer[0].output.dropout.training
    mg.eval()
    assert not any(module.training for module in [*mg.module.modules(), *mg.model.modules()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["bert", "t5", "llama"])
def test_half_precision(tiny: Any, inputs_for: Any, family: str, dtype: torch.dtype) -> None:
    model = tiny(family).to(dtype)
    mg = capture(model)
    inputs = inputs_for(mg.inputs)
    with torch.no_grad():
        expected, got = model(**inputs), mg.module(**inputs)
    assert all(torch.equal(expected[name], value) and value.dtype == dtype for name, value in got.items())


def test_autocast_gives_what_eager_gives(tiny: Any, inputs_for: Any) -> None:
    model = tiny("bert", "AutoModelForSequenceClassification")
    mg = capture(model)
    inputs = inputs_for(mg.inputs)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mg.module(**inputs)["logits"], model(**inputs).logits)


def test_meta_model_needs_no_weights(tiny: Any, inputs_for: Any) -> None:
    real = tiny("bert")
    with torch.device("meta"):
        empty = type(real)._from_config(real.config)
    mg = capture(empty)
    assert all(parameter.is_meta for parameter in mg.module.parameters())
    bound = mg.bind(real)
    inputs = inputs_for(bound.inputs)
    with torch.no_grad():
        assert torch.equal(bound.module(**inputs)["last_hidden_state"], real(**inputs).last_hidden_state)


def test_config_and_model_are_left_alone(tiny: Any) -> None:
    model = tiny("gpt2", "AutoModelForCausalLM", use_cache=True)
    before = model.config.to_dict()
    capture(model)
    assert model.config.to_dict() == before
    assert not model.training


def test_nothing_is_printed(tiny: Any, capfd: Any) -> None:
    logging.getLogger("transformers").setLevel(logging.INFO)
    try:
        capture(tiny("llama", "AutoModelForCausalLM"))
    finally:
        logging.getLogger("transformers").setLevel(logging.ERROR)
    assert capfd.readouterr() == ("", "")
    assert logging.root.manager.disable == logging.NOTSET


def test_example_tensors_for_other_inputs(tiny: Any) -> None:
    model = tiny("bert")
    mg = capture(model, {"inputs_embeds": torch.empty(3, 7, 32), "attention_mask": torch.ones(3, 7).long()})
    inputs = {"inputs_embeds": torch.randn(2, 7, 32), "attention_mask": torch.ones(2, 7).long()}
    inputs["attention_mask"][0, 4:] = 0
    with torch.no_grad():
        assert torch.equal(mg.module(**inputs)["pooler_output"], model(**inputs).pooler_output)


def test_limits_name_the_longest_input(tiny: Any) -> None:
    assert capture(tiny("bert")).limits == {"length": 40}


class _Branching(BertPreTrainedModel):
    """A model whose second block looks at values."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embed = torch.nn.Embedding(config.vocab_size, 8)
        self.gate = _Gate()
        self.post_init()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        return BaseModelOutput(last_hidden_state=self.gate(self.embed(input_ids)))


class _Gate(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x


class _Noisy(_Branching):
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        x = self.embed(input_ids)
        return BaseModelOutput(last_hidden_state=x + torch.rand_like(x) if self.training else x)


class _Fixed(_Branching):
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        return BaseModelOutput(last_hidden_state=self.embed(input_ids) + torch.ones(1, 10, 1, device="meta"))


class _Constants(_Branching):
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        x = self.embed(input_ids)
        x = x * torch.tensor([1.0, 2.0] * 4, device=x.device) + x.new_tensor([0.5])
        position = torch.tensor(3.0, device=x.device, dtype=x.dtype) + torch.arange(8, device=x.device)
        return BaseModelOutput(last_hidden_state=x + position)


def test_constants_keep_their_values() -> None:
    model = _Constants(BertConfig(vocab_size=50)).eval()
    mg = capture(model)
    ids = torch.arange(6).reshape(2, 3)
    inputs = {name: ids if name == "input_ids" else torch.ones_like(ids) for name in mg.inputs}
    assert torch.equal(mg.module(**inputs)["last_hidden_state"], model(ids).last_hidden_state)


def test_a_model_that_was_compressed_is_captured_as_its_architecture(tiny: Any, inputs_for: Any) -> None:
    model = tiny("bert")
    model.pooler.dense = torch.nn.Sequential(torch.nn.Linear(32, 4), torch.nn.Linear(4, 32))
    model.config.quantization_config = {"quant_method": "kroncc", "version": 1, "passes": []}
    mg = capture(model)
    inputs = inputs_for(mg.inputs)
    assert torch.equal(mg.module(**inputs)["pooler_output"], model(**inputs).pooler_output)
    assert mg.get("pooler.dense") is model.pooler.dense


def _refused(model: Any, inputs: Any = None) -> Any:
    with pytest.raises(CaptureError) as caught:
        capture(model, inputs)
    return caught.value.problems[0]


def test_branch_on_values_names_the_module(capfd: Any) -> None:
    problem = _refused(_Branching(BertConfig(vocab_size=50)))
    assert problem.code == "K301"
    assert "'gate' (_Gate)" in problem.message
    assert "data-dependent" in problem.message
    assert "torch.where" in problem.remedy
    assert capfd.readouterr() == ("", "")


def test_chance_outside_dropout_is_refused() -> None:
    problem = _refused(_Noisy(BertConfig(vocab_size=50)))
    assert problem.code == "K308"
    assert "rand_like" in problem.message


def test_fixed_length_is_refused() -> None:
    assert _refused(_Fixed(BertConfig(vocab_size=50))).code == "K302"


def test_wrong_inputs_are_named(tiny: Any) -> None:
    problem = _refused(tiny("bert"), ["input_idz"])
    assert problem.code == "K310"
    assert "input_ids" in problem.remedy
    assert _refused(tiny("bert"), ["inputs_embeds"]).code == "K311"
    assert _refused(tiny("bert"), ["attention_mask"]).code == "K303"


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_compiles(tiny: Any, inputs_for: Any) -> None:
    mg = capture(tiny("bert", "AutoModelForSequenceClassification"))
    compiled = torch.compile(mg.module, fullgraph=True, dynamic=True)
    for length in (7, 11):
        inputs = inputs_for(mg.inputs, 3, length)
        with torch.no_grad():
            torch.testing.assert_close(compiled(**inputs)["logits"], mg.module(**inputs)["logits"])
