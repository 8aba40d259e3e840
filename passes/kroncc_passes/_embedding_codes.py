"""Learn code books: every row of a table becomes a sum of M entries, one of each book."""

from __future__ import annotations

import torch
from torch import Tensor

CLUSTERING = 3  # rounds of k-means with which a book starts
SWEEPS = 6  # rounds over all books afterwards
CHUNK = 16384  # rows whose distances are held at once


def learn_codes(
    table: Tensor, books: int, entries: int, weights: Tensor | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return int64 codes [rows, books] and float32 books [books, entries, width] for a table [rows, width].

    They make sum_v weights_v |table_v - sum_m book_m[code_vm]|^2 small: residual k-means, book after book,
    then rounds in which each book in turn takes its best codes and its best entries for what the others
    leave. No round makes the error larger. `weights` [rows] are positive; None weighs all rows alike.
    """
    generator = torch.Generator(device=table.device).manual_seed(seed)
    rest = table.float().clone()
    weights = rest.new_ones(len(rest)) if weights is None else weights.float()
    codes = torch.zeros(len(rest), books, dtype=torch.long, device=rest.device)
    entry = rest.new_zeros(books, entries, rest.shape[1])
    for book in range(books):
        entry[book] = _start(rest, entries, weights, generator)
        for _ in range(CLUSTERING):
            codes[:, book] = nearest(rest, entry[book])
            entry[book] = means(rest, codes[:, book], weights, entry[book])
        codes[:, book] = nearest(rest, entry[book])
        rest -= entry[book, codes[:, book]]
    for _ in range(SWEEPS if books > 1 else 0):
        for book in range(books):
            rest += entry[book, codes[:, book]]
            entry[book] = means(rest, codes[:, book], weights, entry[book])
            codes[:, book] = nearest(rest, entry[book])
            rest -= entry[book, codes[:, book]]
    return codes, entry


def nearest(rows: Tensor, entries: Tensor) -> Tensor:
    """Return for each row [rows, width] the number of the entry [entries, width] nearest to it."""
    half = entries.square().sum(1) / 2
    return torch.cat([(half - part @ entries.T).argmin(1) for part in torch.split(rows, CHUNK)])


def means(rows: Tensor, codes: Tensor, weights: Tensor, before: Tensor) -> Tensor:
    """Return the weighted mean of the rows of each code; an entry that no row has stays as it was."""
    mass = torch.zeros_like(before[:, 0]).index_add_(0, codes, weights)
    total = torch.zeros_like(before).index_add_(0, codes, rows * weights[:, None])
    return torch.where(mass[:, None] > 0, total / mass.clamp_min(1e-30)[:, None], before)


def code_type(entries: int) -> torch.dtype:
    """Return the smallest integer type that holds the numbers of `entries` entries."""
    fitting = (
        kind for kind in (torch.uint8, torch.int16, torch.int32) if torch.iinfo(kind).max >= entries - 1
    )
    return next(fitting)


def _start(rows: Tensor, entries: int, weights: Tensor, generator: torch.Generator) -> Tensor:
    """Return different rows, drawn by weight, as first entries; zeros where there are no more."""
    distinct, place = torch.unique(rows, dim=0, return_inverse=True)
    mass = torch.zeros_like(distinct[:, 0]).index_add_(0, place, weights)
    drawn = rows.new_zeros(entries, rows.shape[1])
    count = min(entries, len(distinct))
    order = torch.rand(len(distinct), generator=generator, device=rows.device).log() / mass
    drawn[:count] = distinct[order.topk(count).indices]
    return drawn
