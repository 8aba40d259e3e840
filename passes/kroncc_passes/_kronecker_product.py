"""Multiply by a sum of Kronecker products without forming it.

W = sum_k A_k (x) B_k is [m1 m2, n1 n2], A is [rank, m1, n1], B is [rank, m2, n2]. A token x, seen as
[n1, n2], gives sum_k A_k x B_k^T, seen as [m1, m2]. B acts along the fast axis of x, A along the slow one. As
x lies, B is one large matrix product and A a batch of small ones, as wide as the fast axis; where that is
narrow the batch is slow, and the axes are exchanged: then A is the large product.
`python -m benchmarks kronecker-forward` compares with the dense layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

WIDE = 16  # width from which a batch of products is at least as fast as exchanging the axes


class Contraction(NamedTuple):
    """How to multiply: which factor acts first, are the axes exchanged, multiply-adds a token and term."""

    b_first: bool
    exchanged: bool
    cost: int


def contraction(a: Sequence[int], b: Sequence[int]) -> Contraction:
    """Choose the cheaper order for factors of shapes `a` (m1, n1) and `b` (m2, n2), and the layout for it."""
    (m1, n1), (m2, n2) = a, b
    b_then_a = n1 * n2 * m2 + n1 * m2 * m1
    a_then_b = m1 * n1 * n2 + m1 * n2 * m2
    b_first = b_then_a < a_then_b
    return Contraction(b_first, (m2 if b_first else n2) < WIDE, min(b_then_a, a_then_b))


def multiply(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return x W^T, [tokens, m1 m2], for x [tokens, n1 n2]."""
    how = contraction(a.shape[1:], b.shape[1:])
    x = x.reshape(x.shape[0], a.shape[2], b.shape[2])
    if how.exchanged:
        return _exchanged_b_first(x, a, b) if how.b_first else _exchanged_a_first(x, a, b)
    return _direct_b_first(x, a, b) if how.b_first else _direct_a_first(x, a, b)


def dense(a: Tensor, b: Tensor) -> Tensor:
    """Return W itself, [m1 m2, n1 n2]."""
    return torch.einsum("kij,kpq->ipjq", a, b).reshape(a.shape[1] * b.shape[1], a.shape[2] * b.shape[2])


def _direct_b_first(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    (rank, m1, n1), (_, m2, n2), tokens = a.shape, b.shape, x.shape[0]
    mixed = x.reshape(tokens * n1, n2) @ b.reshape(rank * m2, n2).t()
    left = a.permute(1, 2, 0).reshape(m1, n1 * rank)
    out = torch.bmm(left.expand(tokens, m1, n1 * rank), mixed.view(tokens, n1 * rank, m2))
    return out.reshape(tokens, m1 * m2)


def _direct_a_first(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    (rank, m1, n1), (_, m2, n2), tokens = a.shape, b.shape, x.shape[0]
    left = a.permute(1, 0, 2).reshape(m1 * rank, n1)
    mixed = torch.bmm(left.expand(tokens, m1 * rank, n1), x)
    right = b.permute(1, 0, 2).reshape(m2, rank * n2)
    return (mixed.reshape(tokens * m1, rank * n2) @ right.t()).view(tokens, m1 * m2)


def _exchanged_b_first(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    (rank, m1, n1), (_, m2, n2), tokens = a.shape, b.shape, x.shape[0]
    left = b.permute(1, 0, 2).reshape(m2 * rank, n2)
    mixed = (left @ _fast_axis_first(x)).view(m2, rank, tokens, n1).transpose(1, 2)
    right = a.permute(1, 0, 2).reshape(m1, rank * n1)
    out = mixed.reshape(m2 * tokens, rank * n1) @ right.t()
    return _fast_axis_last(out.view(m2, tokens, m1))


def _exchanged_a_first(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    (rank, m1, n1), (_, m2, n2), tokens = a.shape, b.shape, x.shape[0]
    rows = _fast_axis_first(x).view(n2 * tokens, n1)
    mixed = torch.bmm(rows.expand(rank, n2 * tokens, n1), a.mT).view(rank * n2, tokens * m1)
    out = b.permute(1, 0, 2).reshape(m2, rank * n2) @ mixed
    return _fast_axis_last(out.view(m2, tokens, m1))


def _fast_axis_first(x: Tensor) -> Tensor:
    """[tokens, n1, n2] -> [n2, tokens n1]."""
    tokens, n1, n2 = x.shape
    return x.permute(2, 0, 1).contiguous().view(n2, tokens * n1)


def _fast_axis_last(y: Tensor) -> Tensor:
    """[m2, tokens, m1] -> [tokens, m1 m2]."""
    m2, tokens, m1 = y.shape
    return y.permute(1, 2, 0).contiguous().view(tokens, m1 * m2)
