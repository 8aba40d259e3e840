"""How well a model follows its reference, without labels: agreement, divergence, the geometry it keeps."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from scipy import stats
from torch import Tensor

SENTENCES = 512  # of which all pairs are ranked: 130,816 pairs

Floats = np.ndarray[Any, np.dtype[np.float64]]


class Fidelity(Protocol):
    """Collects batches of (model, reference) values and sums them up."""

    def update(self, mine: Tensor, theirs: Tensor) -> None:
        """Take one batch; both tensors [positions, width]."""

    def result(self) -> dict[str, float]:
        """Return the figures; nan where there was nothing to compare, or something not finite."""


class DistributionFidelity:
    """`agreement`: share of positions with the same largest logit. `kl`: mean KL(reference || model)."""

    def __init__(self) -> None:
        self.positions = 0
        self.agreeing = 0.0
        self.divergence = 0.0

    def update(self, mine: Tensor, theirs: Tensor) -> None:
        """Take the logits of one batch, [positions, classes] each."""
        self.positions += len(mine)
        finite = bool(torch.isfinite(mine).all() and torch.isfinite(theirs).all())
        self.agreeing += float((mine.argmax(-1) == theirs.argmax(-1)).sum()) if finite else math.nan
        log_mine, log_theirs = mine.float().log_softmax(-1), theirs.float().log_softmax(-1)
        self.divergence += float((log_theirs.exp() * (log_theirs - log_mine)).sum(dtype=torch.float64))

    def result(self) -> dict[str, float]:
        """Return `agreement` and `kl`."""
        count = self.positions or math.nan
        return {"agreement": self.agreeing / count, "kl": self.divergence / count}


class ScoreFidelity:
    """`rank_correlation`: Spearman's correlation of the two models' scores, for a head with one output."""

    def __init__(self) -> None:
        self.mine: list[Floats] = []
        self.theirs: list[Floats] = []

    def update(self, mine: Tensor, theirs: Tensor) -> None:
        """Take the scores of one batch, [rows, 1] each."""
        self.mine.append(_array(mine).reshape(-1))
        self.theirs.append(_array(theirs).reshape(-1))

    def result(self) -> dict[str, float]:
        """Return `rank_correlation`."""
        if not self.mine:
            return {"rank_correlation": math.nan}
        return {"rank_correlation": spearman(np.concatenate(self.mine), np.concatenate(self.theirs))}


class EmbeddingFidelity:
    """Compares two models' embeddings of the same sentences.

    `cosine`: mean cosine of each sentence's two embeddings; nan where their widths differ.
    `rank_correlation`: Spearman's correlation between the two models' cosines of all pairs of sentences,
    over a seeded sample of at most `SENTENCES` sentences.
    """

    def __init__(self, sentences: int = SENTENCES, seed: int = 0) -> None:
        self.limit = sentences
        self.random = np.random.default_rng(seed)
        self.seen = 0
        self.cosines = 0.0
        self.sample: list[tuple[Floats, Floats]] = []

    def update(self, mine: Tensor, theirs: Tensor) -> None:
        """Take the sentence embeddings of one batch, [rows, width] each."""
        ours, reference = _unit(_array(mine)), _unit(_array(theirs))
        self.cosines += float((ours * reference).sum()) if ours.shape == reference.shape else math.nan
        for pair in zip(ours, reference, strict=True):
            self._keep(pair)

    def result(self) -> dict[str, float]:
        """Return `cosine` and `rank_correlation`."""
        correlation = math.nan
        if len(self.sample) > 2:
            ours, reference = (np.stack(side) for side in zip(*self.sample, strict=True))
            upper = np.triu_indices(len(ours), k=1)
            correlation = spearman((ours @ ours.T)[upper], (reference @ reference.T)[upper])
        return {"cosine": self.cosines / (self.seen or math.nan), "rank_correlation": correlation}

    def _keep(self, pair: tuple[Floats, Floats]) -> None:
        """Keep an even sample of all sentences seen (reservoir sampling, Vitter 1985, algorithm R)."""
        self.seen += 1
        if len(self.sample) < self.limit:
            self.sample.append(pair)
            return
        place = int(self.random.integers(self.seen))
        if place < self.limit:
            self.sample[place] = pair


def pearson(first: Floats, second: Floats) -> float:
    """Return Pearson's correlation; nan for fewer than two values, constant or not finite ones."""
    return _correlation(stats.pearsonr, first, second)


def spearman(first: Floats, second: Floats) -> float:
    """Return Spearman's rank correlation; nan for fewer than two values, constant or not finite ones."""
    return _correlation(stats.spearmanr, first, second)


def _correlation(function: Callable[..., Any], first: Floats, second: Floats) -> float:
    if len(first) < 2 or not (np.isfinite(first).all() and np.isfinite(second).all()):
        return math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        warnings.simplefilter("ignore", stats.NearConstantInputWarning)
        return float(function(first, second).statistic)


def _array(value: Tensor) -> Floats:
    found: Floats = value.detach().double().cpu().numpy()
    return found


def _unit(rows: Floats) -> Floats:
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    scaled: Floats = rows / np.maximum(lengths, np.finfo(np.float64).tiny)
    return scaled
