"""Passes that change the tree, and passes that work while a step trains: with two small ones made here."""

import copy
from typing import ClassVar

import pytest
import torch
from pydantic import Field
from torch import nn

from kroncc.api import PassError, Resolved, SitePass, Skip, TreePass
from kroncc.graph.capture import capture
from kroncc.model.load import load
from kroncc.model.replay import structure_of
from kroncc.model.save import save_model
from kroncc.recipe.schema import PassCall, Scope
from kroncc.rewrite import registry
from kroncc.rewrite.during import install
from kroncc.rewrite.pipeline import compress_graph
from kroncc.run.live import finalise, settle


class FirstLayers(TreePass):
    """Keep the first layers of a BERT encoder."""

    kind: ClassVar[str] = "first-layers"
    keep: int = Field(gt=0)

    def resolve_tree(self, graph, sites, stats, seed):
        stack = next(name for name, m in graph.model.named_modules() if isinstance(m, nn.ModuleList))
        count = len(graph.model.get_submodule(stack))
        gone = tuple(f"{stack}.{index}" for index in range(self.keep, count))
        return Resolved(self, gone, choice="the first")

    def rewrite(self, model, sites, choice=None):
        stack = model.get_submodule(sites[0].rpartition(".")[0])
        del stack[self.keep :]

    def attach(self, graph, rewriter, sites):
        node = graph.calls(graph.fqns()[-1])[-1]
        gate = rewriter.insert_call(node, "gate", nn.Identity(), (node,))
        rewriter.replace_uses(node, gate)


class Doubled(nn.Module):
    """A linear map that is told of progress, and whose final form is twice the weight it trained."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.seen: list[float] = []

    def forward(self, x):
        return self.linear(x)

    def set_progress(self, progress):
        self.seen.append(progress)

    def tied_to(self, other):
        return other

    def finalise(self):
        new = copy.deepcopy(self.linear)
        new.weight.data *= 2
        return new


class Doubling(SitePass):
    """Double a weight when training ends."""

    kind: ClassVar[str] = "doubling"

    def resolve(self, site):
        return Skip("is small") if site.module.out_features < 40 else self

    def replace(self, site):
        return copy.deepcopy(site.module)

    def live(self, site):
        return Doubled(site.module)


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    table, broken = registry._table()
    mine = {
        cls.kind: registry.Entry(cls.kind, "tests", f"{cls.__module__}:{cls.__name__}", loaded=cls)
        for cls in (FirstLayers, Doubling)
    }
    monkeypatch.setattr(registry, "_table", lambda: ({**table, **mine}, broken))


def call(name, *targets, **options):
    return PassCall(name=name, scope=Scope(targets=list(targets)), options=options)


def ids():
    return torch.randint(3, 100, (2, 9))


def test_a_tree_pass_changes_both_views_and_the_structure(tiny):
    model = tiny("bert", "AutoModelForSequenceClassification", num_hidden_layers=3).eval()
    dense = copy.deepcopy(model)
    graph = capture(model)
    done = compress_graph(graph, [call("first-layers", keep=1), call("kronecker", "@ffn.up", ratio=2)])
    assert len(model.bert.encoder.layer) == 1
    assert done.choices[0] == "the first"
    assert [applied.sites for applied in done.structure.passes] == [
        ("bert.encoder.layer.1", "bert.encoder.layer.2"),
        ("bert.encoder.layer.0.intermediate.dense",),
    ]
    x = ids()
    with torch.no_grad():
        want = model(x).logits
        assert torch.equal(graph.eval().module(input_ids=x, **rest(graph, x))["logits"], want)
        assert not torch.equal(want, dense(x).logits)


def rest(graph, x):
    """The other inputs of a graph, as the model fills them in."""
    fills = {"attention_mask": torch.ones_like(x), "token_type_ids": torch.zeros_like(x)}
    return {name: fills[name] for name in graph.inputs if name in fills}


def test_a_changed_tree_saves_and_loads(tiny, tmp_path):
    model = tiny("bert", "AutoModelForSequenceClassification", num_hidden_layers=3).eval()
    done = compress_graph(
        capture(model), [call("kronecker", "@ffn.up", ratio=2), call("first-layers", keep=2)]
    )
    save_model(model, tmp_path / "m", done.structure)
    again = load(tmp_path / "m")
    assert structure_of(again) == done.structure
    assert len(again.bert.encoder.layer) == 2
    x = ids()
    with torch.no_grad():
        assert torch.equal(again(x).logits, model(x).logits)


def test_a_base_model_takes_the_tree_of_a_model_with_a_head(tiny, tmp_path):
    from transformers import AutoModel

    model = tiny("bert", "AutoModelForSequenceClassification", num_hidden_layers=3).eval()
    done = compress_graph(capture(model), [call("first-layers", keep=2)])
    save_model(model, tmp_path / "m", done.structure)
    base = AutoModel.from_pretrained(tmp_path / "m").eval()
    x = ids()
    with torch.no_grad():
        assert torch.equal(base(x).last_hidden_state, model.bert(x).last_hidden_state)


def test_what_comes_too_late_is_refused_with_the_order_that_works(tiny):
    class Early(Doubling):
        kind: ClassVar[str] = "doubling"
        order: ClassVar[int] = 5

        def resolve(self, site):
            return Skip(f"is a {type(site.module).__name__}")

        accepts: ClassVar = (nn.Module,)

    table = dict(registry._table()[0])
    table["doubling"] = registry.Entry("doubling", "tests", "x:Early", loaded=Early)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_table", lambda: (table, ()))
        with pytest.raises(PassError, match="doubling first, then kronecker") as caught:
            compress_graph(
                capture(tiny("bert")), [call("kronecker", "@ffn.up", ratio=2), call("doubling", "@ffn.up")]
            )
    assert caught.value.problems[0].code == "K408"
    assert caught.value.problems[0].path == "passes[1].doubling"


def test_live_modules_train_and_are_settled(tiny):
    model = tiny("bert", "AutoModelForSequenceClassification").eval()
    before = model.bert.encoder.layer[0].intermediate.dense.weight.detach().clone()
    graph = capture(model)
    made = install(graph, [call("doubling", "@ffn.up", "@ffn.down"), call("first-layers", keep=1)])
    assert isinstance(model.bert.encoder.layer[1].intermediate.dense, Doubled)
    assert isinstance(graph.module.get_submodule("gate"), nn.Identity)
    finalise(model)
    settle(model, made)
    assert len(model.bert.encoder.layer) == 1
    assert torch.equal(model.bert.encoder.layer[0].intermediate.dense.weight, before * 2)
    planned = compress_graph(
        capture(tiny("bert", "AutoModelForSequenceClassification")),
        [call("doubling", "@ffn.up", "@ffn.down"), call("first-layers", keep=1)],
        key="during",
    )
    assert made.structure == planned.structure
    assert {one.reason for one in planned.skipped} == {"is small"}


@pytest.mark.parametrize(
    ("calls", "code"),
    [
        ([call("kronecker", "@ffn.up", ratio=2)], "K407"),
        ([call("first-layers", keep=1), call("doubling", "@ffn.up")], "K409"),
    ],
)
def test_what_cannot_train_is_refused(tiny, calls, code):
    with pytest.raises(PassError) as caught:
        install(capture(tiny("bert")), calls)
    assert caught.value.problems[0].code == code
    assert caught.value.problems[0].path.startswith("during[")
