"""Tables whose rows are sums of shared vectors: code books, and buckets that rows are hashed to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kroncc_passes._stored import Store

PRIME = 2_147_483_647  # larger than any number of rows; products of two smaller numbers fit in 64 bits


class CodeStore(Store):
    """Row v is the sum over m of entry codes[v, m] of book m.

    `codes` [rows, M] are integers and stay; `books` [M, K, width] train.
    Source: Chen, Min and Sun, Learning K-way D-dimensional discrete codes, ICML 2018; the sum over whole
    entries is that of additive quantisation (Babenko and Lempitsky, CVPR 2014).
    """

    books: Tensor

    def __init__(self, codes: Tensor, books: Tensor) -> None:
        super().__init__()
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.books = nn.Parameter(books)
        self.shape = (codes.shape[0], books.shape[2])
        self.numbers = books.numel() + codes.numel()
        self.extents = (books.shape[0], books.shape[1])

    def forward(self) -> Tensor:
        """Return the table [rows, width]."""
        return self._sums(self.codes)

    def rows(self, index: Tensor) -> Tensor:
        """Return [..., width] for integer `index` [...]."""
        return self._sums(self.codes[index.flatten()]).view(*index.shape, self.shape[1])

    def weights(self) -> int:
        """Return how many numbers are stored: entries of books, and codes."""
        return self.numbers

    def text(self) -> str:
        """Return the number of books and of their entries."""
        return f"codes {self.extents[0]}x{self.extents[1]}"

    def _sums(self, codes: Tensor) -> Tensor:
        """Return [n, width] for codes [n, M]."""
        books, entries = self.extents
        first = torch.arange(books, device=codes.device) * entries
        rows: Tensor = F.embedding_bag(codes.long() + first, self.books.flatten(0, 1), mode="sum")
        return rows


class HashStore(Store):
    """Row v is the sum over i of shares[v, i] times bucket h_i(v), with h_i(v) = (a_i v + b_i) mod p mod N.

    `buckets` [N, width] and `shares` [rows, functions] train; `constants` [functions, 2] hold a_i and b_i.
    Source: Svenstrup, Hansen and Winther, Hash embeddings, NIPS 2017.
    """

    buckets: Tensor
    shares: Tensor

    def __init__(self, buckets: Tensor, shares: Tensor, constants: Tensor) -> None:
        super().__init__()
        self.buckets = nn.Parameter(buckets)
        self.shares = nn.Parameter(shares)
        self.constants = nn.Parameter(constants, requires_grad=False)
        self.shape = (shares.shape[0], buckets.shape[1])
        self.numbers = buckets.numel() + shares.numel()
        self.count = buckets.shape[0]

    def forward(self) -> Tensor:
        """Return the table [rows, width]."""
        return self.rows(torch.arange(self.shape[0], device=self.constants.device))

    def rows(self, index: Tensor) -> Tensor:
        """Return [..., width] for integer `index` [...]."""
        places = hashed(index.flatten(), self.constants, self.count)
        shares = F.embedding(index.flatten(), self.shares)
        rows: Tensor = F.embedding_bag(places, self.buckets, mode="sum", per_sample_weights=shares)
        return rows.view(*index.shape, self.shape[1])

    def weights(self) -> int:
        """Return how many numbers are stored: those of the buckets, and the shares."""
        return self.numbers

    def text(self) -> str:
        """Return the number of buckets and of hash functions."""
        return f"{self.count} buckets, {self.constants.shape[0]} hashes"


def hashed(index: Tensor, constants: Tensor, count: int) -> Tensor:
    """Return the buckets [n, functions] of `index` [n]."""
    return (index.long().unsqueeze(1) * constants[:, 0] + constants[:, 1]) % PRIME % count


def draw_constants(functions: int, seed: int) -> Tensor:
    """Return int64 [functions, 2], a_i from 1 and b_i from 0 to p - 1."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(1, PRIME, (functions, 2), generator=generator)
    drawn[:, 1] -= 1
    return drawn
