"""A linear map and an embedding whose weight is a sum of Kronecker products, computed from the factors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kroncc.api import PassError
from kroncc_passes._kronecker_product import contraction, dense, multiply


class KroneckerFactors(nn.Module):
    """The factors of W = sum_k scale_k A_k (x) B_k.

    `a` is [rank, m1, n1], `b` [rank, m2, n2], `scale` [rank] or None. A tensor that is a `Parameter` is kept
    as the same object, so that two modules can share it.
    """

    def __init__(self, a: Tensor, b: Tensor, scale: Tensor | None = None) -> None:
        super().__init__()
        self.a = _parameter(a)
        self.b = _parameter(b)
        self.scale = None if scale is None else _parameter(scale)

    @property
    def rank(self) -> int:
        """The number of products summed."""
        return self.a.shape[0]

    @property
    def weight(self) -> Tensor:
        """W [m1 m2, n1 n2], formed anew at every access: for code that asks for it, not for computing."""
        return dense(*self.factors())

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A and B with the scalars, if any, multiplied into the smaller of them."""
        if self.scale is None:
            return self.a, self.b
        scale = self.scale[:, None, None]
        if self.a.numel() < self.b.numel():
            return self.a * scale, self.b
        return self.a, self.b * scale

    def tied_to(self, module: nn.Module) -> nn.Module:
        """Return what takes the place of `module`, which shares W: the same factors, its own bias.

        Raises PassError K424 for anything but a Linear or an Embedding with a weight of W's shape.
        """
        size = self.a.shape[1] * self.b.shape[1], self.a.shape[2] * self.b.shape[2]
        known = type(module) in (nn.Linear, nn.Embedding)
        if not known or tuple(getattr(module, "weight", self.a).shape) != size:
            raise PassError(
                f"a {type(module).__name__} cannot share the factors of a {size[0]}x{size[1]} weight",
                code="K424",
                expected="a Linear or an Embedding with a weight of that shape",
                remedy="leave the weight and what is tied to it out with `exclude`",
            )
        twin: KroneckerFactors
        if isinstance(module, nn.Linear):
            twin = KroneckerLinear(self.a, self.b, module.bias, self.scale)
        else:
            twin = KroneckerEmbedding(self.a, self.b, self.scale, getattr(module, "padding_idx", None))
        return twin.train(module.training)

    def shape_text(self) -> str:
        """Return the shapes for the plan: `384x384 (x) 2x2`, with the number of terms where it is not one."""
        a, b = ("x".join(map(str, factor.shape[1:])) for factor in (self.a, self.b))
        return f"{a} (x) {b}" if self.rank == 1 else f"{self.rank} of {a} (x) {b}"

    def extra_repr(self) -> str:
        """Return the shapes for `print`."""
        a, b = ("x".join(map(str, factor.shape[1:])) for factor in (self.a, self.b))
        scalars = ", scalars" if self.scale is not None else ""
        return f"{a} (x) {b}, rank={self.rank}{scalars}"


class KroneckerLinear(KroneckerFactors):
    """y = x W^T + bias for x [..., n1 n2], without forming W.

    Source: Tahaei et al., KroneckerBERT, NAACL 2022, section 3; order and layout as in `_kronecker_product`.
    """

    def __init__(self, a: Tensor, b: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> None:
        super().__init__(a, b, scale)
        self.in_features = a.shape[2] * b.shape[2]
        self.out_features = a.shape[1] * b.shape[1]
        self.bias = None if bias is None else _parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., m1 m2] for x [..., n1 n2]."""
        a, b = self.factors()
        y = multiply(x.reshape(-1, self.in_features), a, b)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)  # under autocast, y is in half precision as nn.Linear's is
        return y.view(*x.shape[:-1], self.out_features)

    def flops(self, shape: Sequence[int]) -> int:
        """Return the FLOPs for an input of `shape`, 2 a multiply-add, in the order that costs least."""
        cost = contraction(self.a.shape[1:], self.b.shape[1:]).cost
        return 2 * math.prod(shape[:-1]) * self.rank * cost

    def extra_repr(self) -> str:
        """Return the shapes for `print`."""
        return (
            f"{self.in_features}, {self.out_features}, {super().extra_repr()}, bias={self.bias is not None}"
        )


class KroneckerEmbedding(KroneckerFactors):
    """Rows of W by number, each formed on the fly: row i is sum_k A_k[i // m2] (x) B_k[i % m2].

    With B of one row (m2 = 1) every number has a row of A of its own. What `padding_idx` looks up sends no
    gradient.
    """

    def __init__(
        self, a: Tensor, b: Tensor, scale: Tensor | None = None, padding_idx: int | None = None
    ) -> None:
        super().__init__(a, b, scale)
        self.num_embeddings = a.shape[1] * b.shape[1]
        self.embedding_dim = a.shape[2] * b.shape[2]
        self.padding_idx = padding_idx

    def forward(self, index: Tensor) -> Tensor:
        """Return [..., n1 n2] for integer `index` [...]."""
        a, b = self.factors()
        per_row = b.shape[1]
        if per_row == 1:
            left, right = _rows(a, index), b[:, 0]
        else:
            left, right = _rows(a, index // per_row), _rows(b, index % per_row)
        out = left.mT * right if self.rank == 1 else left.mT @ right  # [..., n1, n2]
        out = out.flatten(-2)
        if self.padding_idx is None:
            return out
        return torch.where((index == self.padding_idx).unsqueeze(-1), out.detach(), out)

    def flops(self, shape: Sequence[int]) -> int:
        """Return the FLOPs for indices of `shape`: what forms the rows; look-ups are free."""
        return math.prod(shape) * self.embedding_dim * (2 * self.rank - 1)

    def extra_repr(self) -> str:
        """Return the shapes for `print`."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}, {super().extra_repr()}{padding}"


def _rows(factor: Tensor, index: Tensor) -> Tensor:
    """Return the rows [..., rank, n] of all terms of `factor` [rank, m, n] in one look-up."""
    rank, m, n = factor.shape
    terms = torch.arange(rank, device=index.device) * m
    return F.embedding(index.unsqueeze(-1) + terms, factor.reshape(rank * m, n))


def _parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
