"""Training with rounding: gradients, ranges, the share before it begins, and what it becomes in the end."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from kroncc.api import PassError, Site
from kroncc.graph.capture import capture
from kroncc.model.load import load_directory
from kroncc.model.save import save_model
from kroncc.recipe.schema import PassCall, Scope
from kroncc.rewrite.during import install
from kroncc.rewrite.pipeline import compress_graph
from kroncc.run import live
from kroncc_passes._kronecker_layers import KroneckerEmbedding, KroneckerLinear
from kroncc_passes._low_rank_layers import LowRankLinear
from kroncc_passes._quantize_live import DECAY
from kroncc_passes.quantize import Quantize

OPTIONS = [
    {"bits": 8},
    {"bits": 3, "group": 7},
    {"bits": 2, "granularity": "tensor"},
    {"bits": 4, "symmetric": False},
    {"bits": 8, "activations": "dynamic-int8"},
    {"bits": 8, "activations": "static-int8", "granularity": "tensor"},
]
MODULES = {
    "linear": lambda: nn.Linear(24, 36),
    "conv1d": lambda: Conv1D(36, 24),
    "embedding": lambda: nn.Embedding(36, 24, padding_idx=2),
    "kronecker": lambda: KroneckerLinear(normal(2, 6, 3), normal(2, 6, 8, seed=1), normal(36)),
    "kronecker embedding": lambda: KroneckerEmbedding(normal(1, 36, 6), normal(1, 1, 4, seed=1)),
    "low-rank": lambda: LowRankLinear(normal(36, 5), normal(5, 24, seed=1)),
}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def site(module):
    return Site("m", module)


def inputs(module, seed=5):
    if hasattr(module, "num_embeddings"):
        return torch.tensor([[0, 2, 35], [4, 4, 1]])
    return normal(2, 3, 24, seed=seed)


def treated(module):
    """Every pair of a module and options that goes together."""
    return [(kind, options) for kind in module for options in OPTIONS]


@pytest.mark.parametrize(("kind", "options"), treated(MODULES), ids=str)
def test_the_packed_module_computes_what_training_saw(kind, options):
    torch.manual_seed(0)
    module = MODULES[kind]()
    pass_ = Quantize(**options, weights=[name for name, p in module.named_parameters() if p.dim() > 1])
    new = pass_.live(site(module))
    if not isinstance(new, nn.Module):
        assert "treats Linear and Conv1D" in new.reason
        return
    root = nn.Sequential(new.train())
    live.set_progress(root, 1.0)
    x = inputs(module)
    root(x).square().sum().backward()
    assert all(p.grad is not None for p in root.parameters())
    for parameter in root.parameters():
        parameter.data -= 0.01 * parameter.grad
    seen = root.eval()(x)
    live.finalise(root)
    torch.testing.assert_close(root(x), seen, rtol=1e-5, atol=1e-5)
    planned = pass_.replace(site(copy.deepcopy(module).to("meta")))
    layout = {name: (t.shape, t.dtype) for name, t in root[0].state_dict().items()}
    assert layout == {name: (t.shape, t.dtype) for name, t in planned.state_dict().items()}
    assert type(root[0]) is type(planned)


@pytest.mark.parametrize("kind", ["linear", "embedding", "kronecker"])
def test_finalised_at_once_it_is_what_replace_gives(kind):
    module, pass_ = MODULES[kind](), Quantize(bits=4, group=5)
    final, want = pass_.live(site(module)).finalise(), pass_.replace(site(module))
    state = want.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in final.state_dict().items())


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding"])
def test_gradients_are_those_of_the_rounded_weight(kind):
    torch.manual_seed(0)
    module = MODULES[kind]()
    new = Quantize(bits=3).live(site(module))
    want = copy.deepcopy(module)
    want.weight.data = new.weight.detach().contiguous()
    x = inputs(module)
    want(x).square().sum().backward()
    new(x).square().sum().backward()
    torch.testing.assert_close(module.weight.grad, want.weight.grad)
    assert new.stores["weight"].weight is module.weight


def test_rows_are_rounded_as_the_table_is():
    module = nn.Embedding(36, 24)
    for options in ({"bits": 3}, {"bits": 3, "group": 7}, {"bits": 3, "granularity": "tensor"}):
        store = Quantize(**options).live(site(module)).stores["weight"]
        index = torch.tensor([[0, 35], [7, 7]])
        assert torch.equal(store.rows(index), store()[index])


def test_it_begins_when_a_share_is_done():
    module = nn.Linear(24, 36)
    new = Quantize(bits=2, start=0.5).live(site(module)).train()
    assert torch.equal(new.weight, module.weight)
    live.set_progress(new, 0.49)
    assert torch.equal(new.weight, module.weight)
    live.set_progress(new, 0.5)
    assert not torch.equal(new.weight, module.weight)
    table = Quantize(bits=2, start=0.5).live(site(nn.Embedding(8, 6)))
    assert torch.equal(table(torch.tensor([3])), table.stores["weight"].weight[[3]])


def test_inputs_are_rounded_in_a_range_that_follows_them():
    module = nn.Linear(24, 36)
    new = Quantize(bits=8, activations="static-int8", start=0.5).live(site(module)).train()
    batches = [normal(4, 24, seed=seed) * (1 + seed) for seed in range(3)]
    for x in batches:
        assert torch.equal(new(x), module(x))
    average = batches[0].abs().max()
    for x in batches[1:]:
        average = DECAY * average + (1 - DECAY) * x.abs().max()
    torch.testing.assert_close(new.reach, average)
    live.set_progress(new, 0.6)
    new.eval()
    x = 10 * batches[0]
    assert not torch.allclose(new(x), module(x), rtol=0.1)
    torch.testing.assert_close(new.reach, average)
    torch.testing.assert_close(new.finalise()(x), new(x), rtol=1e-5, atol=1e-5)
    assert "reach" in new.state_dict()


def test_training_recovers_what_rounding_takes():
    torch.manual_seed(0)
    x = normal(256, 6) @ normal(6, 24, seed=1)
    module = nn.Linear(24, 36)
    target = module(x).detach()
    rounded = Quantize(bits=3).replace(site(module))
    root = nn.Sequential(Quantize(bits=3).live(site(copy.deepcopy(module)))).train()
    optimiser = torch.optim.Adam(root.parameters(), lr=1e-3)
    for _ in range(200):
        optimiser.zero_grad()
        (root(x) - target).square().mean().backward()
        optimiser.step()
    live.finalise(root)
    with torch.no_grad():
        losses = [(new(x) - target).square().mean() for new in (root, rounded)]
    assert losses[0] < 0.75 * losses[1]


@pytest.mark.parametrize("options", [{"bits": 3, "outliers": -4.0}, {"bits": 3, "rounding": "gptq"}])
def test_what_does_not_train(options):
    with pytest.raises(PassError, match="K475: m: "):
        Quantize(**options).live(site(nn.Linear(24, 36)))


def call(targets, name="quantize", **options):
    return PassCall(name=name, scope=Scope(targets=targets), options=options)


class TestModels:
    def test_a_tied_table(self, tiny, tmp_path):
        model = tiny("gpt2", "AutoModelForCausalLM")
        installed = install(capture(model), [call(["@embedding.word", "@ffn.*"], bits=3, group=8)])
        ids = torch.randint(100, (2, 5))
        model.train()(ids).logits.sum().backward()
        model.eval()
        with torch.no_grad():
            seen = model(ids).logits
            live.finalise(model)
            structure = live.settle(model, installed)
            torch.testing.assert_close(model(ids).logits, seen, rtol=1e-5, atol=1e-5)
            assert model.lm_head.stores.weight is model.transformer.wte.stores.weight
            save_model(model, tmp_path / "model", structure)
            loaded = load_directory(tmp_path / "model")
            assert torch.equal(loaded(ids).logits, model(ids).logits)
        assert loaded.lm_head.stores.weight.codes is loaded.transformer.wte.stores.weight.codes

    def test_on_factors(self, tiny):
        model = tiny("bert")
        compress_graph(capture(model), [call(["@ffn.*"], "kronecker", ratio=2.0)])
        graph = capture(model)
        installed = install(graph, [call(["@ffn.*"], bits=4, group=8)])
        model.eval()
        ids = torch.randint(100, (2, 5))
        with torch.no_grad():
            seen = model(ids)[0]
            live.finalise(model)
            live.settle(model, installed)
            torch.testing.assert_close(model(ids)[0], seen, rtol=1e-5, atol=1e-5)

    def test_what_another_pass_still_changes_is_left_to_a_later_step(self, tiny):
        model = tiny("bert")
        passes = [call(["@ffn.up"], "prune-weights", sparsity=0.5), call(["@ffn.up"], bits=4)]
        graph = capture(model)
        installed = install(graph, passes)
        assert [entry.name for entry in installed.structure.passes] == ["prune-weights"]
