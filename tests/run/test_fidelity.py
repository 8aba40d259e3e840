"""The parts of fidelity that an evaluation does not show: sampling, and figures without a value."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kroncc.run.fidelity import DistributionFidelity, EmbeddingFidelity, ScoreFidelity, pearson, spearman


def test_the_sample_is_even_and_repeatable() -> None:
    counts = np.zeros(100)
    for seed in range(300):
        fidelity = EmbeddingFidelity(sentences=20, seed=seed)
        rows = torch.stack([torch.arange(1.0, 101), torch.ones(100)], 1)
        for start in range(0, 100, 9):
            fidelity.update(rows[start : start + 9], rows[start : start + 9])
        kept = [round(float(mine[0] / mine[1])) - 1 for mine, _ in fidelity.sample]
        assert len(set(kept)) == 20
        counts[kept] += 1
    assert abs(counts / 300 - 0.2).max() < 0.09
    first, second = EmbeddingFidelity(5), EmbeddingFidelity(5)
    for fidelity in (first, second):
        fidelity.update(rows, rows)
    assert np.array_equal([m for m, _ in first.sample], [m for m, _ in second.sample])


def test_widths_may_differ_but_then_cosine_has_no_value() -> None:
    fidelity = EmbeddingFidelity()
    rows = torch.randn(10, 4)
    fidelity.update(rows, torch.cat([rows, rows], 1))
    figures = fidelity.result()
    assert math.isnan(figures["cosine"])
    assert figures["rank_correlation"] == pytest.approx(1.0)


@pytest.mark.parametrize("kind", [DistributionFidelity, ScoreFidelity, EmbeddingFidelity])
def test_nothing_seen(kind: type[DistributionFidelity | ScoreFidelity | EmbeddingFidelity]) -> None:
    assert all(math.isnan(value) for value in kind().result().values())


def test_a_zero_embedding_is_not_like_anything() -> None:
    fidelity = EmbeddingFidelity()
    fidelity.update(torch.zeros(3, 4), torch.ones(3, 4))
    assert fidelity.result()["cosine"] == 0


@pytest.mark.parametrize("correlation", [pearson, spearman])
def test_correlations_without_a_value(correlation: object) -> None:
    assert callable(correlation)
    one = np.array([1.0])
    line = np.arange(4.0)
    assert math.isnan(correlation(one, one))
    assert math.isnan(correlation(line, np.ones(4)))
    assert math.isnan(correlation(line, np.array([1.0, math.nan, 2.0, 3.0])))
    assert correlation(line, -line) == pytest.approx(-1)
