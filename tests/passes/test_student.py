"""The pass: a BiLSTM or CNN in the place of the layers, by references; padding, capture, files, refusals."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from kroncc.api import PassError
from kroncc.compiler import compile_recipe
from kroncc.graph.capture import capture
from kroncc.graph.cost import model_cost
from kroncc.graph.verify import same_structure, structure_of
from kroncc.model.load import load
from kroncc.model.save import save_model
from kroncc.recipe.loader import load_recipe
from kroncc.recipe.schema import PassCall, Scope
from kroncc.rewrite.pipeline import build_pass, compress_graph
from kroncc_passes._student_layers import BiLstm, Calls, Cnn, Lstm, padding

RECIPE = Path(__file__).parents[2] / "recipes" / "student-minilm.yaml"
PLAIN = Calls("hidden_states", ("attention_mask", 1), None)
BODIES = {"bilstm": {"hidden": 6}, "cnn": {"filters": 5, "widths": [2, 3]}}
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1], [1, 0, 1, 1, 0, 0]]).bool()


@pytest.fixture(scope="module")
def captured(tiny):
    """`captured(...)`: the graph of a fresh small model; each architecture is traced once."""
    graphs = {}

    def make(family, auto="AutoModel", **changes):
        key = family, auto, str(changes)
        model = tiny(family, auto, **changes)
        graphs[key] = graphs.get(key) or capture(model)
        return graphs[key].bind(model)

    return make


def call(*targets, **options):
    return PassCall(name="student", scope=Scope(targets=list(targets)), options=options)


def network(body, seed=0, dropout=0.0):
    torch.manual_seed(seed)
    if body == "bilstm":
        return BiLstm(PLAIN, 8, 6, 2, dropout).eval()
    return Cnn(PLAIN, 8, (2, 3, 4), 5, dropout).eval()


def tokens(seed=0):
    return torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(seed))


class TestNetworks:
    def test_bilstm_is_torchs_on_packed_rows(self):
        """`nn.LSTM(bidirectional=True)` on a packed sequence; rows with holes are what is left of them."""
        ours, theirs = network("bilstm"), nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True)
        for layer in range(2):
            for suffix, ways in (("", ours.ahead), ("_reverse", ours.back)):
                for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                    value = getattr(ways[layer], f"{name}_l0")
                    getattr(theirs, f"{name}_l{layer}{suffix}").data = value.data
        x = tokens()
        with torch.no_grad():
            got = ours(x, MASK)
            for row, mask in enumerate(MASK):
                want = ours.norm(ours.project(theirs(x[row, mask].unsqueeze(0))[0]))[0]
                assert torch.allclose(got[row, mask], want, atol=1e-6)
                assert not got[row, ~mask].any()

    def test_one_direction_is_the_formula(self):
        module, x = Lstm(8, 6), tokens()[:1]
        weights = {name: p.detach().double().numpy() for name, p in module.named_parameters()}
        hidden = cell = np.zeros(6)

        def sigmoid(value):
            return 1 / (1 + np.exp(-value))

        for step, given in enumerate(x[0].double().numpy()):
            gates = weights["weight_ih_l0"] @ given + weights["bias_ih_l0"]
            i, f, g, o = np.split(gates + weights["weight_hh_l0"] @ hidden + weights["bias_hh_l0"], 4)
            cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
            hidden = sigmoid(o) * np.tanh(cell)
            assert np.allclose(module(x)[0, step].detach().numpy(), hidden, atol=1e-6)

    def test_cnn_is_the_formula(self):
        """Filters over windows of the row alone, zeros around it, by loops in numpy."""
        module, x, mask = network("cnn"), tokens(), MASK[1]
        row = x[1, mask].double().numpy()
        found = []
        for size, convolution in zip((2, 3, 4), module.convolutions, strict=True):
            weight, bias = (p.detach().double().numpy() for p in convolution.parameters())
            left = (size - 1) // 2
            padded = np.pad(row, ((left, size - 1 - left), (0, 0)))
            windows = [padded[start : start + size].T for start in range(len(row))]
            found.append([np.maximum((weight * window).sum((1, 2)) + bias, 0) for window in windows])
        near = torch.tensor(np.concatenate(found, 1)).float()
        with torch.no_grad():
            want = module.norm(module.near(near) + module.anywhere(near.amax(0)))
            assert torch.allclose(module(x, MASK)[1, mask], want, atol=1e-5)

    @pytest.mark.parametrize("body", BODIES)
    def test_padding_has_no_influence(self, body):
        module, x = network(body), tokens()
        other = torch.where(MASK.unsqueeze(-1), x, 100 * tokens(1))
        longer = torch.cat([x, tokens(2)], 1)
        wide = torch.cat([MASK, torch.zeros_like(MASK)], 1)
        with torch.no_grad():
            want = module(x, MASK)
            assert torch.equal(module(other, MASK), want)
            assert torch.allclose(module(longer, wide)[:, :6], want, atol=1e-6)
            alone = module(x[:1])
            assert torch.allclose(alone, want[:1], atol=1e-6)

    @pytest.mark.parametrize("body", BODIES)
    def test_order_counts(self, body):
        module, x = network(body), tokens()
        with torch.no_grad():
            assert not torch.allclose(module(x.flip(1)).flip(1), module(x), atol=1e-2)

    @pytest.mark.parametrize("body", BODIES)
    def test_masks_in_all_forms(self, body):
        module, x = network(body), tokens()
        square = MASK[:, None, None, :].expand(-1, 1, 6, -1)
        added = torch.zeros(4, 1, 1, 6).masked_fill(~MASK[:, None, None, :], torch.finfo(torch.float32).min)
        with torch.no_grad():
            want = module(x, MASK)
            for mask in (MASK.long(), MASK[:, None, None, :], square, square.long(), added, added.squeeze(1)):
                assert torch.equal(module(x, mask), want)
                assert torch.equal(module(hidden_states=x, attention_mask=mask), want)
        assert padding(torch.zeros(1, 1, 6, 6)).shape == (1, 6)

    @pytest.mark.parametrize("body", BODIES)
    def test_gradients_reach_all_weights(self, body):
        module = network(body, dropout=0.1).train()
        module(tokens(), MASK).square().sum().backward()
        assert all(p.grad is not None for p in module.parameters())

    def test_answers_like_the_layer(self):
        class Layer(nn.Module):
            def forward(self, states, encoder_attention_mask=None, mask=None, **kwargs):
                return states, None

        calls = Calls.of(Layer(), 2)
        assert calls == Calls("states", ("mask", 2), 2)
        module = Cnn(calls, 8, (3,), 4, 0.0)
        answer = module(tokens(), None, MASK, extra=1)
        assert isinstance(answer, tuple)
        assert answer[1] is None
        assert torch.equal(answer[0], module(states=tokens(), mask=MASK)[0])

    def test_real_export_has_the_recurrence(self):
        """A trace on meta shows shapes alone; one of real weights must compute, at any length."""
        module = network("bilstm")
        sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
        given = (tokens(), MASK.long())
        with torch.no_grad():
            program = torch.export.export(module, given, dynamic_shapes={"args": (sizes, sizes)})
        x, mask = torch.randn(2, 9, 8), torch.ones(2, 9, dtype=torch.long)
        mask[1, 5:] = 0
        assert torch.allclose(program.module()(x, mask), module(x, mask), atol=1e-6)


FAMILIES = ["bert", "mpnet", "modernbert", "deberta-v2", "vit"]


@pytest.mark.parametrize(
    ("family", "body"), [*((family, "cnn") for family in FAMILIES), ("bert", "bilstm"), ("mpnet", "bilstm")]
)
def test_stands_in_the_place_of_the_layers(captured, tmp_path, inputs_for, family, body):
    graph = captured(family)
    model, dense = graph.model, copy.deepcopy(graph.model)
    done = compress_graph(graph, [call(body=body, **BODIES[body])])
    given = inputs_for(graph.inputs)
    save_model(model, tmp_path / "m", done.structure)
    with torch.no_grad():
        want = model(**given)[0]
        assert want.shape == dense(**given)[0].shape
        assert torch.allclose(graph.module(**given)["last_hidden_state"], want, atol=1e-6)
        assert torch.equal(load(tmp_path / "m")(**given)[0], want)
        if "attention_mask" in given:
            mask = given["attention_mask"].bool()
            noise = given | {"input_ids": torch.where(mask, given["input_ids"], 7)}
            assert torch.equal(model(**noise)[0][mask], want[mask])
    outside = {n: p for n, p in dense.named_parameters() if ".0." not in n and ".1." not in n}
    assert all(torch.equal(model.get_parameter(name), p) for name, p in outside.items())


def test_t5_encoder_alone(captured, inputs_for):
    graph = captured("t5")
    done = compress_graph(graph, [call("encoder.**", body="cnn")])
    assert [one.sites for one in done.structure.passes] == [("encoder.block",)]
    given = inputs_for(graph.inputs)
    with torch.no_grad():
        assert torch.allclose(graph.module(**given)["last_hidden_state"], graph.model(**given)[0], atol=1e-5)


def test_costs_by_arithmetic(captured):
    graph = captured("bert")
    before = model_cost(graph).params
    layers = sum(p.numel() for p in graph.model.encoder.parameters())
    done = compress_graph(graph, [call(body="bilstm", hidden=6, layers=2)])
    assert done.structure.passes[0].options == {
        "body": "bilstm",
        "layers": 2,
        "hidden": 6,
        "dropout": 0.1,
        "width": 32,
    }
    cost = model_cost(graph)
    lstm = 8 * 6 * (32 + 6 + 2) + 8 * 6 * (12 + 6 + 2)
    assert cost.params == before - layers + lstm + 12 * 32 + 32 + 64
    token = 2 * (8 * 6 * (32 + 6) + 8 * 6 * (12 + 6) + 12 * 32)
    assert cost.flops(2, 16).total == 2 * 16 * token + 2 * 2 * 32 * 32  # and the pooler


def test_planned_on_meta_and_the_same_from_the_same_seed(captured):
    real, twin, other = captured("bert"), captured("bert"), captured("bert")
    meta = real.bind(copy.deepcopy(real.model).to("meta"))
    calls = [call(body="bilstm", hidden=6)]
    state = torch.get_rng_state()
    done = [
        compress_graph(graph, calls, seed=seed)
        for graph, seed in ((meta, 3), (real, 3), (twin, 3), (other, 4))
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert done[0].structure == done[1].structure
    same_structure(structure_of(meta), structure_of(real))
    weights = [graph.model.encoder.layer[0].project.weight for graph in (real, twin, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_trains_towards_a_teacher(captured, inputs_for):
    graph = captured("bert")
    teacher = copy.deepcopy(graph.model)
    compress_graph(graph, [call(body="cnn", filters=16, dropout=0.0)])
    given = inputs_for(graph.inputs)
    with torch.no_grad():
        target = teacher(**given).pooler_output
    optimiser, losses = torch.optim.Adam(graph.model.parameters(), 1e-2), []
    graph.train()
    for _ in range(30):
        loss = (graph.module(**given)["pooler_output"] - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"layers": 2}, (0, 1)),
        ({"layers": 2, "start": "first"}, (0, 1)),
        ({"layers": 2, "start": "last"}, (1, 2)),
        ({"start": [0, 2]}, (0, 2)),
    ],
)
def test_a_shallower_transformer(captured, options, kept):
    graph = captured("bert", num_hidden_layers=3)
    were = [layer.output.dense.weight for layer in graph.model.encoder.layer]
    resolved = build_pass("student", {"body": "transformer", **options}).resolve_tree(graph, (), None, 0)
    assert resolved.options.start == (kept,)
    resolved.options.rewrite(graph.model, resolved.sites)
    assert [layer.output.dense.weight for layer in graph.model.encoder.layer] == [were[n] for n in kept]


def test_all_layers_of_a_transformer_change_nothing(captured):
    done = compress_graph(captured("bert"), [call(body="transformer", layers=2)])
    assert done.structure.passes == ()
    assert [one.reason for one in done.skipped] == ["keeps all of its 2 layers"]


REFUSED = {
    "decoder": ("llama", {"body": "cnn"}, "K451", "is a decoder, which may not read ahead"),
    "both": ("t5", {"body": "bilstm"}, "K451", "decoder.block is a decoder"),
    "albert": ("albert", {"body": "cnn"}, "K490", "holds its layers in no list"),
    "too many": ("bert", {"body": "transformer", "layers": 3}, "K495", "3 cannot stay"),
    "no such layer": ("bert", {"body": "transformer", "start": [0, 2]}, "K492", "no layer 2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(captured, case):
    family, options, code, match = REFUSED[case]
    with pytest.raises(PassError, match=match) as caught:
        build_pass("student", options).resolve_tree(captured(family), (), None, 0)
    assert caught.value.problems[0].code == code


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "option 'body'"),
        ({"body": "gru"}, "'transformer', 'bilstm' or 'cnn'"),
        ({"body": "cnn", "hidden": 4}, "`hidden` is no option of cnn"),
        ({"body": "bilstm", "start": "first"}, "`start` is no option of bilstm"),
        ({"body": "transformer"}, "takes `layers`, or the layers listed"),
        ({"body": "transformer", "layers": 2, "start": [0, 1]}, "takes `layers`, or the layers listed"),
        ({"body": "cnn", "widths": [0]}, "1 or more"),
        ({"body": "cnn", "dropout": 1.0}, "less than 1"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(PassError, match=match):
        build_pass("student", options)


def test_recipe_plans():
    plan = compile_recipe(load_recipe(RECIPE), offline=True)
    lstm = 8 * 192 * (384 + 192 + 2) + 384 * 384 + 384 + 768
    cnn = 128 * (384 * 12 + 3) + 2 * 384 * 384 + 384 + 768
    rest = 22_713_216 - 6 * 1_774_464
    assert plan.models["lstm"].params == rest + lstm
    assert plan.models["cnn"].params == rest + cnn
