"""Splitting a budget against all splits; the harm of rounding against the outputs themselves."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from kroncc.api import PassError, Site, SiteStats
from kroncc_passes._kronecker_layers import KroneckerLinear
from kroncc_passes._low_rank_layers import LowRankEmbedding
from kroncc_passes._quantize_budget import CHOICES, rounding_error, split
from kroncc_passes.quantize import Quantize


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def total(table, choice):
    return sum(row[c] for row, c in zip(table, choice, strict=True))


@st.composite
def tables(draw):
    sizes = draw(st.lists(st.integers(1, 50), min_size=1, max_size=3))
    weights = [draw(st.floats(0.01, 100)) for _ in sizes]
    costs = [[size * bits for bits in CHOICES] for size in sizes]
    errors = [[weight * 4.0**-bits for bits in CHOICES] for weight in weights]
    least, most = total(costs, [0] * len(sizes)), total(costs, [6] * len(sizes))
    return costs, errors, draw(st.integers(least, most + 5))


@settings(max_examples=60, deadline=None)
@given(tables())
def test_fits_and_is_near_the_best_of_all_splits(case):
    costs, errors, budget = case
    taken = split(costs, errors, budget)
    assert total(costs, taken) <= budget
    every = itertools.product(range(len(CHOICES)), repeat=len(costs))
    best = min(total(errors, one) for one in every if total(costs, one) <= budget)
    largest = max(row[c] for row, c in zip(errors, taken, strict=True))
    assert total(errors, taken) <= best + largest  # a step that does not fit is at most one module's error
    uniform = [[c] * len(costs) for c in range(len(CHOICES))]
    assert all(total(errors, taken) <= total(errors, u) for u in uniform if total(costs, u) <= budget)


def test_what_suffers_most_gets_the_bits():
    costs = [[10 * bits for bits in CHOICES]] * 2
    errors = [[100 * 4.0**-bits for bits in CHOICES], [4.0**-bits for bits in CHOICES]]
    taken = split(costs, errors, 100)
    assert taken[0] > taken[1]
    assert total(costs, taken) == 100


MODULES = {
    "linear": (lambda: nn.Linear(10, 6), normal(50, 10)),
    "conv1d": (lambda: Conv1D(6, 10), normal(50, 10)),
    "kronecker": (
        lambda: KroneckerLinear(normal(2, 3, 2), normal(2, 2, 5, seed=1), normal(6)),
        normal(50, 10),
    ),
    "embedding": (lambda: nn.Embedding(12, 10), torch.arange(50) % 7),
    "low-rank embedding": (
        lambda: LowRankEmbedding(normal(12, 8), normal(8, 16, seed=1)),
        torch.arange(50) % 7,
    ),
}


@pytest.mark.parametrize("kind", MODULES)
def test_the_harm_is_that_to_the_outputs(kind):
    make, x = MODULES[kind]
    torch.manual_seed(0)
    module = make()
    if x.is_floating_point():
        stats = SiteStats(count=50, moment=x.T @ x / 50)
    else:
        stats = SiteStats(count=50, lookups=torch.bincount(x, minlength=12) / 50)
    site = Site("m", module, stats=stats)
    names = [name for name, p in module.named_parameters() if p.dim() > 1]
    new = Quantize(bits=3, weights=names).replace(site)
    with torch.no_grad():
        error = (new(x) - module(x)).square().sum()
        bias = getattr(module, "bias", None)
        whole = (module(x) - (0 if bias is None else bias)).square().sum()
        got = rounding_error(site, new, "outputs")
    assert got == pytest.approx((error / whole).item(), rel=1e-3)


def test_fisher_weighs_each_weight():
    module = nn.Linear(10, 6)
    fisher = normal(6, 10).square()
    site = Site("m", module, stats=SiteStats(fisher=fisher))
    new = Quantize(bits=3, weights=["weight"]).replace(site)
    with torch.no_grad():
        got = rounding_error(site, new, "fisher")
        assert got == pytest.approx((fisher * (module.weight - new.weight).square()).sum().item(), rel=1e-5)


@pytest.mark.parametrize("sensitivity", ["outputs", "fisher"])
def test_nothing_measured(sensitivity):
    module = nn.Linear(10, 6)
    with pytest.raises(PassError, match=r"K473: m: quantize needs its"):
        rounding_error(Site("m", module), module, sensitivity)
