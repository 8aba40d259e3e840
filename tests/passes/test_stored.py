"""Modules whose weights are stores: as torch knows modules, with ties, costs, nested stores, threads."""

from __future__ import annotations

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from kroncc.api import PassError
from kroncc.graph.capture import capture
from kroncc.graph.cost import model_cost
from kroncc.graph.rewriter import Rewriter
from kroncc.graph.verify import structure_of, verify
from kroncc.model.ties import tied_modules
from kroncc_passes._kronecker_layers import KroneckerLinear
from kroncc_passes._stored import Store, Stored, is_live, stored


class Halves(Store):
    """A weight in steps of one half, as int8."""

    def __init__(self, weight):
        super().__init__()
        self.shape = tuple(weight.shape)
        self.codes = nn.Parameter((weight.detach() * 2).round().to(torch.int8), requires_grad=False)
        self.scale = nn.Parameter(weight.new_tensor(0.5))

    def forward(self):
        return self.codes.to(self.scale.dtype) * self.scale

    def text(self):
        return "halves"


class Training(Halves):
    def finalise(self):
        return Halves(self().detach())


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seen(weight):
    return (weight.detach() * 2).round() / 2


@pytest.fixture
def module():
    torch.manual_seed(0)
    return nn.Linear(6, 4)


@pytest.fixture
def new(module):
    return stored(module, {"weight": Halves(module.weight)})


@pytest.mark.parametrize(
    ("make", "x"),
    [
        (lambda: nn.Linear(6, 4), normal(2, 6)),
        (lambda: Conv1D(4, 6), normal(2, 6)),
        (lambda: nn.Embedding(9, 4, padding_idx=1), torch.tensor([[0, 1], [8, 3]])),
        (lambda: nn.Conv2d(2, 3, 2), normal(1, 2, 5, 5)),
        (lambda: nn.Bilinear(2, 3, 4), None),
    ],
)
def test_computes_as_the_module_with_the_stored_weight(make, x):
    torch.manual_seed(0)
    module = make()
    args = (normal(5, 2), normal(5, 3)) if x is None else (x,)
    want = copy.deepcopy(module)
    want.weight.data = seen(module.weight)
    new = stored(module, {"weight": Halves(module.weight)})
    assert isinstance(new, type(module))
    assert torch.equal(new(*args), want(*args))
    assert type(module).__name__ == type(new).__name__.removeprefix("Stored")


def test_the_original_stays_as_it_was(module):
    before = copy.deepcopy(module.state_dict())
    new = stored(module, {"weight": Halves(module.weight)})
    assert type(module) is nn.Linear
    assert set(module.state_dict()) == {"weight", "bias"}
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert new.bias is module.bias
    assert set(new.state_dict()) == {"bias", "stores.weight.codes", "stores.weight.scale"}


def test_gradients_reach_the_store_and_the_input(new):
    x = normal(3, 6).requires_grad_()
    new(x).sum().backward()
    torch.testing.assert_close(x.grad, new.weight.detach().sum(0).expand(3, 6))
    assert new.stores["weight"].scale.grad is not None


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies(new, way):
    if way == "deepcopy":
        twin = copy.deepcopy(new)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(new))
    else:
        file = io.BytesIO()
        torch.save(new, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert type(twin) is type(new)
    assert twin.stores["weight"].codes is not new.stores["weight"].codes
    x = normal(2, 6)
    assert torch.equal(twin(x), new(x))


def test_half_precision_moves_the_scale_alone(new):
    new.half()
    assert new.stores["weight"].codes.dtype == torch.int8
    assert new(normal(2, 6).half()).dtype == torch.float16


def test_compiles_and_exports_whole(new):
    x = normal(3, 6)
    want = new(x)
    assert torch.equal(torch.compile(new, fullgraph=True, backend="aot_eager")(x), want)
    program = torch.export.export(new, (x,), strict=False)
    assert torch.equal(program.module()(x), want)


def test_a_functional_call_replaces_what_is_stored(new):
    codes = torch.zeros(4, 6, dtype=torch.int8)
    out = functional_call(new, {"stores.weight.codes": codes}, (normal(2, 6),))
    assert torch.equal(out, new.bias.expand(2, 4))
    assert new.weight.any()


def test_threads_share_a_module(new):
    xs = [normal(3, 6, seed=seed) for seed in range(40)]
    with torch.no_grad():
        want = [new(x) for x in xs]
        with ThreadPoolExecutor(4) as pool:
            got = list(pool.map(new, xs))
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def test_an_embedding_looks_up_rows_alone():
    class Watched(Halves):
        def forward(self):
            raise AssertionError("the whole table was formed")

        def rows(self, index):
            return self.codes[index].float() * self.scale

    module = nn.Embedding(9, 4, padding_idx=1)
    new = stored(module, {"weight": Watched(module.weight)})
    index = torch.tensor([[0, 1], [8, 3]])
    out = new(index)
    assert torch.equal(out, seen(module.weight)[index])
    out[0, 1].sum().backward()
    assert not new.stores["weight"].scale.grad.any()


class TestFactors:
    def test_a_factor_of_another_pass(self):
        module = KroneckerLinear(normal(1, 3, 2), normal(1, 4, 5, seed=1), bias=normal(12))
        new = stored(module, {"a": Halves(module.a)})
        want = KroneckerLinear(seen(module.a), module.b, module.bias)
        x = normal(2, 10)
        assert torch.equal(new(x), want(x))
        assert new.flops((2, 10)) == module.flops((2, 10))
        assert new.shape_text() == "3x2 (x) 4x5, halves"
        assert new.b is module.b

    def test_of_what_is_stored_already(self, new):
        twice = stored(new, {"bias": Halves(new.bias)})
        assert set(twice.stores) == {"weight", "bias"}
        x = normal(2, 6)
        assert torch.equal(twice(x), nn.functional.linear(x, new.weight, seen(new.bias)))

    def test_of_what_a_store_holds(self, new):
        twice = stored(new, {"stores.weight.scale": Halves(new.stores["weight"].scale * 1.4)})
        assert torch.equal(twice.weight, new.stores["weight"].codes * 0.5)
        assert "stores.weight.stores.scale.codes" in twice.state_dict()
        assert "stores.weight.scale" in new.state_dict()
        assert copy.deepcopy(twice).weight.equal(twice.weight)


class TestLive:
    def test_becomes_what_its_stores_become(self, module):
        live = stored(module, {"weight": Training(module.weight)})
        assert is_live(live)
        assert not is_live(module)
        final = live.finalise()
        assert not is_live(final)
        assert type(final.stores["weight"]) is Halves
        assert type(final) is type(stored(module, {"weight": Halves(module.weight)}))
        assert is_live(copy.deepcopy(live))

    def test_also_deep_inside(self, new):
        live = stored(new, {"stores.weight.scale": Training(new.stores["weight"].scale)})
        assert is_live(live)
        final = live.finalise()
        assert not is_live(final)
        assert final.weight.equal(live.weight)


class TestTies:
    def test_the_twin_computes_from_the_same_store(self):
        table, head = nn.Embedding(9, 4), nn.Linear(4, 9)
        head.weight = table.weight
        new = stored(table, {"weight": Halves(table.weight)})
        twin = new.tied_to(head)
        assert twin.stores["weight"] is new.stores["weight"]
        assert twin.bias is head.bias
        x = normal(2, 4)
        assert torch.equal(twin(x), x @ new.weight.T + head.bias)
        again = new.tied_to(twin)
        assert again.stores["weight"] is new.stores["weight"]

    @pytest.mark.parametrize("other", [nn.Linear(5, 9), nn.LayerNorm(4), nn.ReLU()])
    def test_others_cannot_share(self, other):
        table = nn.Embedding(9, 4)
        with pytest.raises(PassError, match="K470") as caught:
            stored(table, {"weight": Halves(table.weight)}).tied_to(other)
        assert "exclude" in caught.value.problems[0].remedy

    def test_a_graph_a_tree_and_the_costs_see_one_weight(self, tiny):
        model = tiny("gpt2", "AutoModelForCausalLM")
        graph = capture(model)
        was, before = structure_of(graph), model_cost(graph)
        table, head = model.transformer.wte, model.lm_head
        new = stored(table, {"weight": Halves(table.weight)})
        Rewriter(graph).swap("transformer.wte", new, {"lm_head": new.tied_to(head)})
        verify(graph, was)
        assert graph.tied("lm_head") == ("transformer.wte",)
        assert tied_modules(model)["transformer.wte"] == ("lm_head",)
        after = model_cost(graph)
        assert after.params == before.params
        assert before.bytes - after.bytes == 100 * 32 * 3 - 4
        assert sum(row.params for row in after.modules) == after.params
        assert after.flops(1, 8) == before.flops(1, 8)

    def test_a_table_that_nothing_calls(self, tiny):
        model = tiny("t5", "AutoModelForSeq2SeqLM")
        graph = capture(model)
        was, before = structure_of(graph), model_cost(graph)
        table = model.encoder.embed_tokens
        new = stored(table, {"weight": Halves(table.weight)})
        others = {name: new.tied_to(graph.get(name)) for name in graph.tied("encoder.embed_tokens")}
        Rewriter(graph).swap("encoder.embed_tokens", new, others)
        verify(graph, was)
        assert model_cost(graph).params == before.params


def test_counts_what_no_call_reaches(tiny):
    model = tiny("bert")
    graph = capture(model)
    before = model_cost(graph)
    linear = nn.Linear(3, 5)
    model.spare = stored(linear, {"weight": Halves(linear.weight)})
    after = model_cost(graph)
    assert after.params == before.params + 3 * 5 + 5
    assert after.modules[-1].params in (15, 5)
    assert sum(row.params for row in after.modules) == after.params


def test_every_store_is_a_module_of_the_tree(new):
    assert isinstance(new, Stored)
    assert new.shape_text() == "4x6, halves"
    assert "Halves(4x6, halves)" in repr(new)
