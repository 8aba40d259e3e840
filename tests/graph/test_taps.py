"""Taps against what transformers itself returns with eager attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import transformers

from kroncc.errors import PlanError
from kroncc.graph.attention import ExplicitAttention
from kroncc.graph.capture import capture
from kroncc.graph.model_graph import ModelGraph
from kroncc.graph.modules import Attention
from kroncc.graph.roles import Role, find_roles
from kroncc.graph.taps import Tapped, tap_names, tap_shapes, with_taps

CLASSIFIER = "AutoModelForSequenceClassification"
NAMED = ["embeddings", "hidden", "ffn.output", "attention.scores", "attention.probs", "logits", "sentence"]
OPERANDS = ["attention.queries", "attention.keys", "attention.values"]
CASES = [
    ("bert", CLASSIFIER),
    ("distilbert", CLASSIFIER),
    ("gpt2", "AutoModelForCausalLM"),
    ("llama", "AutoModelForCausalLM"),
    ("vit", "AutoModelForImageClassification"),
    ("mpnet", CLASSIFIER),
    ("deberta-v2", CLASSIFIER),
    ("albert", CLASSIFIER),
]


class Case(NamedTuple):
    """A captured model, its inputs, what it gives with all named taps, and what transformers gives."""

    family: str
    mg: ModelGraph
    inputs: dict[str, torch.Tensor]
    tapped: Tapped
    eager: Any


def _eager(model: Any, inputs: dict[str, torch.Tensor]) -> Any:
    twin = type(model)._from_config(model.config, attn_implementation="eager")
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        return twin.eval()(**inputs, output_hidden_states=True, output_attentions=True)


@pytest.fixture(scope="module", params=CASES, ids=[family for family, _ in CASES])
def case(request: Any, tiny: Callable[..., Any], inputs_for: Callable[..., Any]) -> Case:
    family, auto = request.param
    model = tiny(family, auto)
    mg = capture(model)
    inputs = inputs_for(mg.inputs)
    return Case(family, mg, inputs, with_taps(mg, NAMED).eval(), _eager(model, inputs))


def _close(ours: list[torch.Tensor], theirs: list[torch.Tensor], tolerance: float = 1e-5) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


def test_states_and_probabilities_are_those_of_transformers(case: Case) -> None:
    with torch.no_grad():
        taps = case.tapped(**case.inputs).taps
    states = list(case.eager.hidden_states)
    if case.family == "vit":  # transformers gives the last state before the final norm; we give the one after
        states[-1] = case.mg.model.vit.layernorm(states[-1])
    _close(taps["embeddings"], states[:1])
    _close(taps["hidden"], states[1:])
    _close(taps["attention.probs"], list(case.eager.attentions))
    _close(taps["logits"], [case.eager.logits])


def test_outputs_stay_and_shapes_are_as_said(case: Case) -> None:
    with torch.no_grad():
        given = case.tapped(**case.inputs, labels=torch.zeros(4))
        plain = case.mg.eval().module(**case.inputs)
    assert given.outputs.keys() == plain.keys()
    _close(list(given.outputs.values()), list(plain.values()))
    operands = OPERANDS if case.family != "deberta-v2" else []  # it folds its heads into the batch
    assert tap_names(case.mg) == [*NAMED[:5], *operands, *NAMED[5:]]
    sizes = {"batch": 4, "length": 9}
    for tap in NAMED:
        said = [tuple(sizes.get(size, size) for size in shape) for shape in tap_shapes(case.mg, tap)]
        assert said == [tuple(value.shape) for value in given.taps[tap]], tap


def test_scores_are_scaled_products_before_biases_and_masks(
    tiny: Callable[..., Any], inputs_for: Any
) -> None:
    model = tiny("bert", CLASSIFIER)
    mg = capture(model)
    inputs = inputs_for(mg.inputs)
    query, key = (f"bert.encoder.layer.1.attention.self.{name}" for name in ("query", "key"))
    with torch.no_grad():
        taps = with_taps(mg, ["attention.scores", query, key]).eval()(**inputs).taps
    heads = [taps[name][0].view(4, 9, 4, 8).transpose(1, 2) for name in (query, key)]
    expected = torch.einsum("bhqd,bhkd->bhqk", *heads) / math.sqrt(8)
    torch.testing.assert_close(taps["attention.scores"][1], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "auto", "scale"),
    [
        ("bert", CLASSIFIER, 8**-0.5),
        ("gpt2", "AutoModelForCausalLM", 8**-0.5),
        ("llama", "AutoModelForCausalLM", 8**-0.5),
        ("mpnet", CLASSIFIER, 8**-0.5),
        ("vit", "AutoModelForImageClassification", 8**-0.5),
        ("t5", "AutoModelForSeq2SeqLM", 1.0),
    ],
)
def test_queries_and_keys_make_the_scores(
    tiny: Callable[..., Any], inputs_for: Any, family: str, auto: str, scale: float
) -> None:
    mg = capture(tiny(family, auto))
    asked = ["attention.scores", *OPERANDS]
    with torch.no_grad():
        taps = with_taps(mg, asked).eval()(**inputs_for(mg.inputs)).taps
    shapes = [tap_shapes(mg, tap) for tap in asked]
    for place, (scores, queries, keys, values) in enumerate(zip(*(taps[tap] for tap in asked), strict=True)):
        groups = queries.shape[1] // keys.shape[1]
        expected = scale * queries @ keys.repeat_interleave(groups, 1).mT
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
        assert values.shape == keys.shape
        assert [len(one[place]) for one in shapes] == [4, 4, 4, 4]


def test_values_are_what_the_value_map_gives(tiny: Callable[..., Any], inputs_for: Any) -> None:
    mg = capture(tiny("bert", CLASSIFIER))
    fqn = "bert.encoder.layer.1.attention.self.value"
    with torch.no_grad():
        taps = with_taps(mg, ["attention.values", fqn]).eval()(**inputs_for(mg.inputs)).taps
    torch.testing.assert_close(taps["attention.values"][1], taps[fqn][0].view(4, 9, 4, 8).transpose(1, 2))


def test_folded_heads_are_refused(tiny: Callable[..., Any]) -> None:
    with pytest.raises(PlanError, match="folds its heads"):
        with_taps(capture(tiny("deberta-v2", CLASSIFIER)), ["attention.values"])


def test_scores_of_an_eager_model_are_read_before_the_bias_is_added_in_place(
    tiny: Callable[..., Any], inputs_for: Any
) -> None:
    model = tiny("mpnet", CLASSIFIER)
    mg = capture(model)
    inputs = inputs_for(mg.inputs)
    query, key = (f"mpnet.encoder.layer.0.attention.attn.{name}" for name in "qk")
    with torch.no_grad():
        taps = with_taps(mg, ["attention.scores", query, key]).eval()(**inputs).taps
    heads = [taps[name][0].view(4, 9, 4, 8).transpose(1, 2) for name in (query, key)]
    expected = heads[0] @ heads[1].mT / math.sqrt(8)
    torch.testing.assert_close(taps["attention.scores"][0], expected, rtol=1e-5, atol=1e-5)


def test_sentence_is_the_mean_over_the_mask(case: Case) -> None:
    with torch.no_grad():
        taps = case.tapped(**case.inputs).taps
    last = taps["hidden"][-1]
    mask = case.inputs.get("attention_mask", torch.ones(last.shape[:2]))
    rows = [state[keep.bool()].mean(0) for state, keep in zip(last, mask, strict=True)]
    _close(taps["sentence"], [torch.stack(rows)])


def test_ffn_output_is_what_the_map_down_gives(tiny: Callable[..., Any], inputs_for: Any) -> None:
    model = tiny("bert", CLASSIFIER)
    mg = capture(model)
    seen: list[torch.Tensor] = []
    for layer in model.bert.encoder.layer:
        layer.output.dense.register_forward_hook(lambda _m, _a, out: seen.append(out))
    inputs = inputs_for(mg.inputs)
    with torch.no_grad():
        model(**inputs)
        expected = list(seen)
        _close(with_taps(mg, ["ffn.output"]).eval()(**inputs).taps["ffn.output"], expected)


def test_modules_are_shared_and_mode_reaches_them(tiny: Callable[..., Any], inputs_for: Any) -> None:
    model = tiny("bert", CLASSIFIER)
    mg = capture(model)
    tapped = with_taps(mg, ["attention.probs", "hidden"])
    assert {id(p) for p in tapped.parameters()} == {id(p) for p in model.parameters()}
    inputs = inputs_for(mg.inputs)
    tapped.train()
    once, twice = (tapped(**inputs).taps["hidden"][-1] for _ in range(2))
    assert not torch.equal(once, twice)
    tapped.eval()
    once, twice = (tapped(**inputs).taps["hidden"][-1] for _ in range(2))
    assert torch.equal(once, twice)


def test_gradients_of_every_tap_reach_the_parameters(case: Case) -> None:
    taps = case.tapped(**case.inputs).taps
    for tap in NAMED:
        parameters = [p for p in case.mg.model.parameters() if p.requires_grad]
        total = sum(value.square().sum() for value in taps[tap])
        gradients = torch.autograd.grad(total, parameters, allow_unused=True, retain_graph=True)
        reached = [g for g in gradients if g is not None]
        assert reached, tap
        assert all(g.isfinite().all() for g in reached), tap


def test_gradients_equal_those_of_the_model(tiny: Callable[..., Any], inputs_for: Any) -> None:
    model = tiny("llama", "AutoModelForCausalLM")
    mg = capture(model)
    inputs = inputs_for(mg.inputs)
    model(**inputs).logits.square().mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with_taps(mg, ["attention.scores"]).eval()(**inputs).outputs["logits"].square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_without_outputs_nothing_after_the_last_tap_is_there(
    tiny: Callable[..., Any], inputs_for: Any
) -> None:
    model = tiny("mpnet", CLASSIFIER)
    mg = capture(model)
    tapped = with_taps(mg, ["attention.scores"], outputs=False).eval()
    names = {name.removeprefix("module.") for name, _ in tapped.named_parameters()}
    assert not [name for name in names if name.startswith("classifier") or ".1.output" in name]
    assert not [name for name in names if ".1.attention.attn.v" in name]
    assert [name for name in names if ".0.output" in name]
    given = tapped(**inputs_for(mg.inputs))
    assert given.outputs == {}
    full = with_taps(mg, ["attention.scores"]).eval()(**inputs_for(mg.inputs))
    _close(given.taps["attention.scores"], full.taps["attention.scores"], 0.0)


def test_fused_attention_stays_where_no_tap_reads_it(tiny: Callable[..., Any]) -> None:
    mg = capture(tiny("bert", CLASSIFIER))
    kinds = [type(m) for m in with_taps(mg, ["hidden", "logits"]).modules()]
    assert Attention in kinds
    assert ExplicitAttention not in kinds
    kinds = [type(m) for m in with_taps(mg, ["attention.probs"]).modules()]
    assert Attention not in kinds
    assert ExplicitAttention in kinds
    assert not [m for m in mg.module.modules() if isinstance(m, ExplicitAttention)]


def test_fqn_of_a_shared_module_and_of_a_container(tiny: Callable[..., Any], inputs_for: Any) -> None:
    mg = capture(tiny("albert", CLASSIFIER))
    layer = "albert.encoder.albert_layer_groups.0.albert_layers.0"
    with torch.no_grad():
        taps = with_taps(mg, [layer, f"{layer}.ffn", "hidden"]).eval()(**inputs_for(mg.inputs)).taps
    assert [tuple(value.shape) for value in taps[f"{layer}.ffn"]] == [(4, 9, 64)] * 2
    _close(taps[layer], taps["hidden"], 0.0)


def test_keys_written_into_an_empty_buffer(inputs_for: Any) -> None:
    """Multi-head latent attention fills its keys slice by slice, in place."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    ranks = {
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
    }
    config = transformers.DeepseekV3Config(
        vocab_size=100,
        intermediate_size=64,
        first_k_dense_replace=2,
        max_position_embeddings=40,
        **sizes,
        **ranks,
    )
    torch.manual_seed(0)
    model = transformers.DeepseekV3ForCausalLM._from_config(config).eval()
    mg = capture(model)
    inputs = inputs_for(mg.inputs)
    eager = _eager(model, inputs)
    with torch.no_grad():
        taps = with_taps(mg, ["attention.probs", "hidden"], outputs=False).eval()(**inputs).taps
    _close(taps["hidden"], list(eager.hidden_states[1:]))
    _close(taps["attention.probs"], list(eager.attentions))
    roles = find_roles(mg)
    attention = "model.layers.1.self_attn"
    assert roles[f"{attention}.q_b_proj"] == Role("attention.q", 1)
    assert roles[f"{attention}.kv_b_proj"] == Role("attention.qkv", 1)  # keys and values
    assert roles[f"{attention}.kv_a_proj_with_mqa"] == Role("attention.k", 1)  # the rotary part of keys


def test_encoder_and_decoder(tiny: Callable[..., Any], inputs_for: Any) -> None:
    model = tiny("t5", "AutoModelForSeq2SeqLM")
    mg = capture(model)
    inputs = inputs_for(mg.inputs)
    eager = _eager(model, inputs)
    with torch.no_grad():
        taps = with_taps(mg, NAMED).eval()(**inputs).taps
    _close(taps["hidden"], [*eager.encoder_hidden_states[1:], *eager.decoder_hidden_states[1:]])
    _close(taps["embeddings"], [eager.encoder_hidden_states[0], eager.decoder_hidden_states[0]])
    crossed = zip(eager.decoder_attentions, eager.cross_attentions, strict=True)
    _close(
        taps["attention.probs"], [*eager.encoder_attentions, *(probs for pair in crossed for probs in pair)]
    )
    assert tuple(taps["sentence"][0].shape) == (4, 32)
    assert tap_shapes(mg, "logits") == [("batch", "target_length", 100)]


def test_unknown_and_missing_taps_say_what_there_is(tiny: Callable[..., Any]) -> None:
    mg = capture(tiny("bert"))
    with pytest.raises(PlanError, match=r"did you mean 'attention.scores'") as wrong:
        with_taps(mg, ["attention.score"])
    assert wrong.value.problems[0].code == "K710"
    with pytest.raises(
        PlanError, match=r"BertModel has no 'logits'.*\n.*sentence.*\n.*'sentence'"
    ) as missing:
        tap_shapes(mg, "logits")
    assert missing.value.problems[0].code == "K711"
    with pytest.raises(PlanError, match=r"encoder.layer.0.output.dense") as near:
        with_taps(mg, ["encoder.layer.0.output.dens"])
    assert near.value.problems[0].code == "K710"
    assert "logits" not in tap_names(mg)


MASKS = {
    "none": None,
    "bool": torch.tensor([[True, True, False, True, False], [False] * 5]).view(2, 1, 1, 5),
    "float": torch.linspace(-3, 1, 50).view(2, 1, 5, 5),
    "infinite": torch.zeros(2, 1, 1, 5).masked_fill(
        torch.tensor([[False] * 5, [True] * 5]).view(2, 1, 1, 5), -math.inf
    ),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize(
    "settings", [{}, {"scale": 0.3}, {"enable_gqa": True}], ids=["plain", "scale", "gqa"]
)
def test_explicit_attention_is_the_fused_one(mask: torch.Tensor | None, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    heads = 2 if settings.get("enable_gqa") else 4
    q, k, v = (torch.randn(2, h, 5, 8, requires_grad=True) for h in (4, heads, heads))
    fused = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **settings)
    explicit, _, probs = ExplicitAttention.like(Attention(**settings))(q, k, v, mask)
    torch.testing.assert_close(explicit, fused, rtol=1e-5, atol=1e-5)
    ours, theirs = (torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (explicit, fused))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    sums = probs.sum(-1)
    assert ((sums - 1).abs() < 1e-5).logical_or(sums == 0).all()


def test_explicit_attention_causal_and_dropout() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 5, 8) for _ in range(3))
    explicit = ExplicitAttention.like(Attention(dropout_p=0.5, is_causal=True).eval())
    out, scores, probs = explicit(q, k, v)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, is_causal=True))
    assert scores.isfinite().all()
    assert probs.triu(1).abs().max() == 0
    noisy, _, same = explicit.train()(q, k, v)
    assert not torch.allclose(noisy, out)
    torch.testing.assert_close(same, probs)  # probabilities are read before dropout


def test_taps_of_a_module_that_gives_no_tensor(tiny: Callable[..., Any]) -> None:
    mg = capture(tiny("llama", "AutoModelForCausalLM"))
    with pytest.raises(PlanError, match="gives no tensor, or several") as error:
        with_taps(mg, ["model.rotary_emb"])
    assert error.value.problems[0].code == "K711"
