"""The pass: options, shapes, starting values, what it skips and refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from transformers.pytorch_utils import Conv1D

from kroncc.api import Calibration, PassError, Site, SiteStats, Skip
from kroncc.graph.capture import capture
from kroncc.model.save import save_model
from kroncc.recipe.schema import PassCall, Scope
from kroncc.rewrite.pipeline import compress_graph
from kroncc.testing import assert_lossless, assert_reloads, assert_rewrites, assert_skips
from kroncc_passes.kronecker import Kronecker


def site(module, fqn="encoder.up", seed=0):
    return Site(fqn, module, seed=seed)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def kron_weight(a_shape, b_shape, rank=1):
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(rank, *a_shape, generator=generator), torch.randn(rank, *b_shape, generator=generator)
    return sum(torch.kron(left, right) for left, right in zip(a, b, strict=True))


def error(weight, module):
    return ((module.weight.detach() - weight).norm() / weight.norm()).item()


MODULES = {
    "linear": lambda: nn.Linear(24, 36),
    "linear without bias": lambda: nn.Linear(24, 36, bias=False),
    "conv1d": lambda: Conv1D(36, 24),
    "embedding": lambda: nn.Embedding(36, 24, padding_idx=2),
}


@pytest.mark.parametrize("scalars", [False, True])
@pytest.mark.parametrize("init", ["nearest", "scaled", "prune", "random"])
@pytest.mark.parametrize("kind", MODULES)
def test_rewrites_as_planned(kind, init, scalars):
    new = assert_rewrites(Kronecker(a=(12, 6), rank=2, init=init, scalars=scalars), MODULES[kind]())
    assert new.a.shape == (2, 12, 6)
    assert new.b.shape == (2, 3, 4)
    assert ("scale" in new.state_dict()) == scalars
    assert new.a.is_contiguous()
    assert new.b.is_contiguous()


@pytest.mark.parametrize("kind", MODULES)
def test_lossless_where_the_weight_is_a_sum_of_so_many_products(kind):
    module = MODULES[kind]()
    weight = kron_weight((12, 6), (3, 4), rank=3)
    module.weight.data = weight.T.contiguous() if kind == "conv1d" else weight
    assert_lossless(Kronecker(b=(3, 4), rank=3), module)


def test_a_low_rank_weight_is_the_case_of_one_column_and_one_row():
    module = nn.Linear(20, 30)
    module.weight.data = torch.randn(30, 4) @ torch.randn(4, 20)
    assert_lossless(Kronecker(a=(30, 1), rank=4), module)


def test_the_bias_is_kept_as_it_is():
    module = nn.Linear(24, 36)
    assert Kronecker(a=(12, 6)).replace(site(module)).bias is module.bias


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_type_of_the_weight_is_kept(dtype):
    new = Kronecker(a=(12, 6), scalars=True).replace(site(nn.Linear(24, 36, dtype=dtype)))
    assert {p.dtype for p in new.parameters()} == {dtype}


def test_mode_and_frozen_state_are_kept():
    module = nn.Linear(24, 36).eval().requires_grad_(False)
    new = Kronecker(a=(12, 6), scalars=True).replace(site(module))
    assert not new.training
    assert not any(p.requires_grad for p in new.parameters())
    assert Kronecker(b=(1, 4)).replace(site(nn.Embedding(8, 8, padding_idx=3))).padding_idx == 3


@pytest.mark.parametrize("init", ["nearest", "random"])
def test_the_same_seed_gives_the_same_bits(init):
    module = nn.Linear(24, 36)
    one, two, other = (Kronecker(a=(12, 6), init=init).replace(site(module, seed=s)) for s in (1, 1, 2))
    assert torch.equal(one.a, two.a)
    assert torch.equal(one.b, two.b)
    assert torch.equal(one.a, other.a) == (init == "nearest")


def test_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    want = torch.rand(1)
    torch.manual_seed(5)
    Kronecker(a=(24, 24), init="random").replace(site(nn.Linear(576, 576, device="meta")))
    module = nn.Linear(4, 4, device="meta").to_empty(device="cpu")
    nn.init.ones_(module.weight)
    Kronecker(a=(2, 1), init="random").replace(site(module))
    assert torch.equal(torch.rand(1), want)


class TestInit:
    weight = torch.randn(36, 24, generator=torch.Generator().manual_seed(0))

    def build(self, init, rank=1, a=(12, 6)):
        module = nn.Linear(24, 36)
        module.weight.data = self.weight.clone()
        return Kronecker(a=a, rank=rank, init=init).replace(site(module))

    def test_scaled_has_the_norm_of_the_weight_in_the_direction_of_the_nearest(self):
        nearest, scaled = self.build("nearest", 2).weight, self.build("scaled", 2).weight
        torch.testing.assert_close(scaled.norm(), self.weight.norm())
        torch.testing.assert_close(scaled / scaled.norm(), nearest / nearest.norm())
        assert nearest.norm() < 0.9 * scaled.norm()

    @pytest.mark.parametrize("a", [(12, 6), (3, 4)])
    def test_prune_keeps_entries_of_the_weight_and_zeros_the_others(self, a):
        kept = self.build("prune", 2, a).weight
        assert ((kept == self.weight) | (kept == 0)).all()
        assert (kept != 0).sum() == 2 * 12 * 6

    def test_prune_keeps_every_third_row_as_krony_does(self):
        kept = self.build("prune", 1, (12, 24)).weight
        rows = kept.abs().sum(1).nonzero().flatten()
        assert len(rows) == 12
        assert set(rows.diff().tolist()) == {3}
        strongest = max(range(3), key=lambda k: self.weight[k::3].norm())
        assert rows[0] == strongest

    def test_random_has_about_the_norm_of_the_weight(self):
        module = nn.Linear(256, 256)
        norms = [
            Kronecker(a=(16, 16), rank=8, init="random").replace(site(module, seed=s)).weight.norm()
            for s in range(5)
        ]
        torch.testing.assert_close(torch.stack(norms).mean(), module.weight.norm(), rtol=0.15, atol=0)

    def test_nearest_is_nearer_than_the_others(self):
        errors = {
            init: error(self.weight, self.build(init)) for init in ("nearest", "scaled", "prune", "random")
        }
        assert min(errors, key=errors.__getitem__) == "nearest"
        assert errors["prune"] < 1


class TestShapes:
    def test_b_of_an_embedding_gives_a(self):
        resolved = Kronecker(b=(1, 8)).resolve(site(nn.Embedding(30522, 768, device="meta")))
        assert (resolved.a, resolved.b) == ((30522, 96), (1, 8))

    def test_conv1d_takes_the_shapes_of_out_by_in(self):
        new = Kronecker(a=(8, 2)).replace(site(Conv1D(3072, 768).to("meta")))
        assert (new.in_features, new.out_features) == (768, 3072)
        assert new.b.shape == (1, 384, 384)

    @pytest.mark.parametrize("rank", [1, 3])
    @pytest.mark.parametrize("way", [{"ratio": 8.0}, {"params": 60_000}])
    @pytest.mark.parametrize(
        "module",
        [nn.Linear(768, 768, device="meta"), nn.Embedding(1000, 384, device="meta")],
        ids=["linear", "embedding"],
    )
    def test_a_budget_is_met_by_the_largest_that_fits(self, module, way, rank):
        pass_ = Kronecker(rank=rank, **way)
        budget = way.get("params") or parameters(module) / way["ratio"]
        got = parameters(pass_.replace(site(module)))
        bias = 768 if isinstance(module, nn.Linear) else 0
        m, n = module.weight.shape
        sizes = []
        for m1 in (d for d in range(1, m + 1) if m % d == 0):
            for n1 in (d for d in range(1, n + 1) if n % d == 0):
                whole = not isinstance(module, nn.Embedding) or m1 == m
                if whole and rank <= min(m1 * n1, m * n // (m1 * n1)):
                    sizes.append(rank * (m1 * n1 + m * n // (m1 * n1)) + bias)
        assert got == max(size for size in sizes if size <= budget)

    def test_among_equals_the_fewest_flops_then_the_smallest_a(self):
        module = nn.Linear(768, 768, bias=False, device="meta")
        resolved = Kronecker(params=400 * 384).resolve(site(module))
        chosen = resolved.replace(site(module))
        divisors = [d for d in range(1, 769) if 768 % d == 0]
        every = [Kronecker(a=(m1, n1)) for m1 in divisors for n1 in divisors]
        modules = [new for p in every if not isinstance(new := p.replace(site(module)), Skip)]
        equals = [new for new in modules if parameters(new) == parameters(chosen)]
        assert len(equals) > 2
        least = min(new.flops((1, 768)) for new in equals)
        assert chosen.flops((1, 768)) == least
        assert resolved.a == min(tuple(new.a.shape[1:]) for new in equals if new.flops((1, 768)) == least)

    def test_resolved_options_resolve_to_themselves(self):
        module = nn.Linear(768, 768, device="meta")
        once = Kronecker(ratio=8, rank=2, scalars=True, init="scaled").resolve(site(module))
        again = Kronecker(**once.model_dump(mode="json", exclude_none=True)).resolve(site(module))
        assert once == again
        assert (once.ratio, once.params) == (None, None)
        assert (once.rank, once.scalars, once.init) == (2, True, "scaled")


class TestBertBase:
    """Per-layer counts of KroneckerBERT: the six maps with their biases, and two LayerNorms."""

    @pytest.mark.parametrize(
        ("attention", "up", "down", "total"),
        [
            (
                {"a": (384, 384), "b": (2, 2)},
                {"a": (8, 2), "b": (384, 384)},
                {"a": (2, 8), "b": (384, 384)},
                894_768,
            ),
            (
                {"a": (384, 48), "b": (2, 16)},
                {"a": (16, 2), "b": (192, 384)},
                {"a": (2, 16), "b": (384, 192)},
                231_360,
            ),
        ],
    )
    def test_parameters_a_layer(self, attention, up, down, total):
        sizes = [(768, 768, attention)] * 4 + [(768, 3072, up), (3072, 768, down)]
        maps = [Kronecker(**how).replace(site(nn.Linear(n, m, device="meta"))) for n, m, how in sizes]
        assert sum(map(parameters, maps)) + 2 * 2 * 768 == total


class TestSkips:
    def test_other_modules(self):
        assert_skips(Kronecker(a=(2, 2)), nn.LayerNorm(8), "LayerNorm.*Linear, Embedding, Conv1D")

    def test_subclasses_with_a_forward_of_their_own(self):
        class Scaled(nn.Embedding):
            def forward(self, index):
                return 3 * super().forward(index)

        assert_skips(Kronecker(b=(1, 2)), Scaled(8, 8), "is a Scaled.*not subclasses")

    def test_a_module_that_is_factored_already(self):
        once = Kronecker(a=(12, 6)).replace(site(nn.Linear(24, 36)))
        assert_skips(Kronecker(a=(12, 6)), once, "is a KroneckerLinear")

    @pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}])
    def test_embeddings_that_act_on_whole_rows(self, option):
        assert_skips(
            Kronecker(b=(1, 2)), nn.Embedding(8, 8, **option), f"an embedding with {next(iter(option))}"
        )

    @pytest.mark.parametrize(
        "pass_", [Kronecker(a=(36, 24)), Kronecker(a=(1, 1)), Kronecker(a=(12, 6), rank=12)]
    )
    def test_what_would_not_shrink(self, pass_):
        assert_skips(pass_, nn.Linear(24, 36), "would have (865|1,008) parameters, the weight has 864")

    def test_replace_says_the_same_as_resolve(self):
        pass_, where = Kronecker(a=(36, 24)), site(nn.Linear(24, 36))
        assert pass_.replace(where) == pass_.resolve(where)


class TestRefuses:
    module = nn.Linear(24, 36)

    def refused(self, module=None, **options):
        with pytest.raises(PassError) as caught:
            Kronecker(**options).resolve(site(module or self.module))
        (problem,) = caught.value.problems
        assert problem.message.startswith("encoder.up: ")
        return problem

    def test_a_shape_that_does_not_divide(self):
        problem = self.refused(a=(5, 6))
        assert problem.code == "K420"
        assert "a [5, 6] does not divide the 36x24 weight" in problem.message
        assert problem.expected == "a[0] one of 1, 2, 3, 4, 6, 9, 12, 18, 36"
        assert problem.remedy == "nearest: a: [4, 6]"
        problem = self.refused(b=(36, 9))
        assert problem.expected == "b[1] one of 1, 2, 3, 4, 6, 8, 12, 24"

    def test_shapes_that_do_not_make_up_the_weight(self):
        problem = self.refused(a=(12, 6), b=(3, 3))
        assert problem.code == "K421"
        assert "36x18, the weight is 36x24" in problem.message

    def test_a_rank_too_large(self):
        problem = self.refused(a=(12, 6), rank=13)
        assert problem.code == "K422"
        assert problem.expected.startswith("1 to 12:")

    @pytest.mark.parametrize("way", [{"ratio": 1000.0}, {"params": 40}, {"ratio": 1.5, "rank": 30}])
    def test_a_budget_that_nothing_meets(self, way):
        problem = self.refused(**way)
        assert problem.code == "K423"

    def test_the_budget_named_in_the_message_is_met(self):
        expected = self.refused(params=40).expected
        least = int(expected.split()[3])
        assert parameters(Kronecker(params=least).replace(site(self.module))) == least

    def test_a_weight_that_is_not_finite(self):
        module = copy.deepcopy(self.module)
        module.weight.data[0, 0] = float("nan")
        with pytest.raises(PassError, match=r"K425: encoder\.up: the weight holds NaN"):
            Kronecker(a=(12, 6)).replace(site(module))

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"ratio": 2.0, "params": 5},
            {"a": (2, 2), "ratio": 2.0},
            {"b": (2, 2), "params": 5},
            {"rank": 2},
        ],
    )
    def test_not_exactly_one_way(self, options):
        with pytest.raises(ValidationError, match="give exactly one of"):
            Kronecker(**options)

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"a": [0, 2]}, "greater than 0"),
            ({"a": [2]}, "Field required|at least 2"),
            ({"a": [2, 2, 2]}, "at most 2"),
            ({"a": [2, "2"]}, "valid integer"),
            ({"ratio": 1.0}, "greater than 1"),
            ({"ratio": float("nan")}, "finite|greater than 1"),
            ({"a": [2, 2], "rank": 0}, "greater than 0"),
            ({"a": [2, 2], "init": "best"}, "'nearest', 'scaled', 'prune' or 'random'"),
            ({"a": [2, 2], "rnk": 1}, "Extra inputs are not permitted"),
        ],
    )
    def test_bad_options(self, options, match):
        with pytest.raises(ValidationError, match=match):
            Kronecker(**options)


def test_a_language_model_keeps_its_tie_when_reloaded(tiny):
    model = tiny("gpt2", "AutoModelForCausalLM")
    loaded = assert_reloads("kronecker", {"b": [1, 8], "rank": 2}, ["transformer.wte"], model)
    assert loaded.lm_head.a is loaded.transformer.wte.a
    assert loaded.lm_head.b is loaded.transformer.wte.b


def test_every_option_is_described_and_the_page_is_complete():
    assert all(field.description for field in Kronecker.model_fields.values())
    headings = [line.strip()[3:] for line in Kronecker.__doc__.splitlines() if line.strip().startswith("## ")]
    assert headings == [
        "What it does",
        "When it helps",
        "When it is skipped",
        "Cost",
        "Example",
        "References",
    ]


def stats_of(module, count=50):
    """Return statistics of random inputs for `module`, as calibration gives them."""
    generator = torch.Generator().manual_seed(1)
    if isinstance(module, nn.Embedding):
        return SiteStats(count=count, lookups=torch.arange(float(module.num_embeddings)))
    n = module.weight.shape[0] if isinstance(module, Conv1D) else module.weight.shape[1]
    x = torch.randn(count, n, generator=generator) * torch.logspace(0, -1, n) + 0.5
    return SiteStats(count=count, mean=x.mean(0), moment=x.T @ x / count)


class TestWeighted:
    @pytest.mark.parametrize("scalars", [False, True])
    @pytest.mark.parametrize("kind", MODULES)
    def test_is_laid_out_as_planned(self, kind, scalars):
        pass_ = Kronecker(a=(12, 6), rank=2, scalars=scalars, weighted="activations")
        module = MODULES[kind]()
        before = copy.deepcopy(module.state_dict())
        new = pass_.replace(Site("up", module, stats=stats_of(module)))
        planned = pass_.replace(site(copy.deepcopy(module).to("meta")))
        layouts = [{n: (p.shape, p.dtype) for n, p in each.state_dict().items()} for each in (new, planned)]
        assert layouts[0] == layouts[1]
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())

    def test_outputs_are_closer_and_right_in_the_mean(self):
        module = nn.Linear(24, 36)
        x = torch.randn(500, 24) * torch.logspace(0, -1, 24) + 2
        stats = SiteStats(count=500, mean=x.mean(0), moment=x.T @ x / 500)
        new = Kronecker(a=(12, 6), weighted="activations").replace(Site("up", module, stats=stats))
        plain = Kronecker(a=(12, 6)).replace(Site("up", module, stats=stats))
        torch.testing.assert_close(new(x).mean(0), module(x).mean(0), atol=1e-4, rtol=0)
        assert (new(x) - module(x)).norm() < 0.9 * (plain(x) - module(x)).norm()

    @pytest.mark.parametrize("kind", MODULES)
    def test_lossless_where_the_weight_is_a_sum_of_so_many_products(self, kind):
        module = MODULES[kind]()
        weight = kron_weight((12, 6), (3, 4), rank=3)
        module.weight.data = weight.T.contiguous() if kind == "conv1d" else weight
        pass_ = Kronecker(b=(3, 4), rank=3, weighted="activations")
        new = pass_.replace(Site("up", module, stats=stats_of(module)))
        assert error(weight, new) < 1e-5

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_the_type_of_the_weight_is_kept(self, dtype):
        module = nn.Linear(24, 36, dtype=dtype)
        new = Kronecker(a=(12, 6), weighted="activations").replace(Site("up", module, stats=stats_of(module)))
        assert {p.dtype for p in new.parameters()} == {dtype}

    def test_what_it_asks_for(self):
        assert Kronecker(a=(2, 2)).needs() == Calibration()
        weighted = Kronecker(a=(2, 2), weighted="activations")
        assert weighted.needs() == Calibration(moments=True)
        sequential = Kronecker(a=(2, 2), weighted="activations", sequential=True)
        assert sequential.needs() == Calibration(moments=True, sequential=True)
        assert sequential.settled()

    def test_without_statistics_it_is_refused(self):
        with pytest.raises(PassError, match=r"K426: encoder\.up: a weighted fit needs"):
            Kronecker(a=(12, 6), weighted="activations").replace(site(nn.Linear(24, 36)))

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"sequential": True}, "add `weighted: activations`"),
            ({"weighted": "activations", "init": "scaled"}, "leave out `init`"),
            ({"weighted": "fisher"}, "'none' or 'activations'"),
        ],
    )
    def test_bad_options(self, options, match):
        with pytest.raises(ValidationError, match=match):
            Kronecker(a=(2, 2), **options)

    @pytest.mark.parametrize(
        ("family", "auto"), [("bert", "AutoModelForMaskedLM"), ("gpt2", "AutoModelForCausalLM")]
    )
    def test_a_weighted_model_saves_and_loads(self, tiny, tmp_path, family, auto):
        model = tiny(family, auto).eval()
        graph = capture(model)
        dense = (nn.Linear, nn.Embedding, Conv1D)
        stats = {fqn: stats_of(graph.get(fqn)) for fqn in graph.fqns() if type(graph.get(fqn)) in dense}
        calls = [
            PassCall(name="kronecker", scope=Scope(targets=targets), options={"weighted": "activations"} | o)
            for targets, o in [
                (["@attention.*", "@ffn.*"], {"ratio": 2.0}),
                (["@embedding.word"], {"b": [1, 4]}),
            ]
        ]
        done = compress_graph(graph, calls, stats=stats)
        assert not done.skipped
        ids = torch.arange(14).reshape(2, 7)
        want = model(ids)[0]
        save_model(model, tmp_path / "model", done.structure)
        loaded = type(model).from_pretrained(tmp_path / "model").eval()
        assert torch.equal(loaded(ids)[0], want)
        assert loaded.get_output_embeddings().a is loaded.get_input_embeddings().a
