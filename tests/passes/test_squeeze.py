"""squeeze: maps of frozen weights that start as a selection and are merged into a narrower model."""

import pytest
import torch
from torch import nn

from kroncc.errors import PassError
from kroncc.graph.capture import capture
from kroncc.model.load import load
from kroncc.model.save import save_model
from kroncc.recipe.schema import PassCall, Scope
from kroncc.rewrite.during import install
from kroncc.rewrite.pipeline import compress_graph
from kroncc.run.live import finalise, settle
from kroncc_passes._squeeze_layers import Squeezed

CASES = [
    ("bert", "AutoModelForSequenceClassification"),
    ("gpt2", "AutoModelForCausalLM"),
]


def call(**options):
    return PassCall(name="squeeze", scope=Scope(), options=options)


def ids():
    return torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(1))


def run(graph, x):
    fills = {"attention_mask": torch.ones_like(x), "token_type_ids": torch.zeros_like(x)}
    given = {name: fills[name] for name in graph.inputs if name in fills}
    return graph.module(input_ids=x, **given)["logits"]


@pytest.mark.parametrize(("family", "auto"), CASES)
def test_it_starts_as_the_selection_and_ends_as_a_plain_narrower_model(tiny, tmp_path, family, auto):
    options = {"hidden": 16, "neurons": 24}
    selected = tiny(family, auto).eval()
    planned = compress_graph(capture(selected), [call(**options)])
    model = tiny(family, auto).eval()
    graph = capture(model)
    made = install(graph, [call(**options)])
    assert made.structure == planned.structure
    x = ids()
    with torch.no_grad():
        want = selected(input_ids=x).logits
        torch.testing.assert_close(run(graph.eval(), x), want, rtol=1e-5, atol=1e-5)
    finalise(model)
    settle(model, made)
    assert not [m for m in model.modules() if isinstance(m, Squeezed)]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=x).logits, want, rtol=1e-5, atol=1e-5)
    save_model(model, tmp_path / "m", made.structure)
    again = load(tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(again(input_ids=x).logits, model(input_ids=x).logits)
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in selected.parameters())


def test_the_maps_train_and_the_large_weights_stay(tiny):
    model = tiny("bert", "AutoModelForSequenceClassification")
    graph = capture(model)
    install(graph, [call(hidden=16)])
    squeezed = [m for m in graph.module.modules() if isinstance(m, Squeezed)]
    run(graph.train(), ids()).square().sum().backward()
    for module in squeezed:
        assert module.large.grad is None
        assert all(side is None or side.grad is not None for side in (module.left, module.right))
    one = next(module for module in squeezed if module.bias is not None and module.right is not None)
    with torch.no_grad():
        one.right += 0.1 * torch.randn_like(one.right)
        weight = one.large if one.left is None else one.left @ one.large
        x = torch.randn(2, 3, one.right.shape[1])
        want = x @ (weight @ one.right).T + one.bias
    torch.testing.assert_close(one.finalise()(x), want, rtol=1e-5, atol=1e-5)


def test_a_tied_head_stays_tied(tiny):
    model = tiny("bert", "AutoModelForMaskedLM")
    graph = capture(model)
    made = install(graph, [call(hidden=16)])
    finalise(model)
    settle(model, made)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert isinstance(model.cls.predictions.decoder, nn.Linear)
    assert model.cls.predictions.decoder.weight.shape[1] == 16


@pytest.mark.parametrize(
    ("options", "code"), [({}, "K402"), ({"hidden": 64}, "K486"), ({"neurons": 0}, "K402")]
)
def test_bad_options(tiny, options, code):
    with pytest.raises(PassError) as caught:
        compress_graph(capture(tiny("bert")), [call(**options)])
    assert caught.value.problems[0].code == code


def test_factored_maps_cannot_be_squeezed(tiny):
    graph = capture(tiny("bert"))
    low_rank = PassCall(name="low-rank", scope=Scope(targets=["@ffn.up"]), options={"rank": 4})
    with pytest.raises(PassError) as caught:
        compress_graph(graph, [low_rank, call(hidden=16)])
    assert caught.value.problems[0].code in ("K408", "K488")
