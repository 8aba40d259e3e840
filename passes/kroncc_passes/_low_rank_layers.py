"""A linear map and an embedding whose weight is a product of two thin matrices, computed from the factors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kroncc.api import PassError


class LowRankFactors(nn.Module):
    """The factors of W = U V, W [m, n].

    `u` is [m, rank], `v` [rank, n]. A tensor that is a `Parameter` is kept as the same object, so that two
    modules can share it.
    """

    def __init__(self, u: Tensor, v: Tensor) -> None:
        super().__init__()
        self.u = _parameter(u)
        self.v = _parameter(v)

    @property
    def rank(self) -> int:
        """The width between the two factors."""
        return self.u.shape[1]

    @property
    def weight(self) -> Tensor:
        """W [m, n], formed anew at every access: for code that asks for it, not for computing."""
        return self.u @ self.v

    def tied_to(self, module: nn.Module) -> nn.Module:
        """Return what takes the place of `module`, which shares W: the same factors, its own bias.

        Raises PassError K462 for anything but a Linear or an Embedding with a weight of W's shape.
        """
        size = self.u.shape[0], self.v.shape[1]
        known = type(module) in (nn.Linear, nn.Embedding)
        if not known or tuple(getattr(module, "weight", self.u).shape) != size:
            raise PassError(
                f"a {type(module).__name__} cannot share U and V of a {size[0]}x{size[1]} weight",
                code="K462",
                expected="a Linear or an Embedding with a weight of that shape",
                remedy="leave the weight and what is tied to it out with `exclude`",
            )
        twin: LowRankFactors
        if isinstance(module, nn.Linear):
            twin = LowRankLinear(self.u, self.v, module.bias)
        else:
            twin = LowRankEmbedding(self.u, self.v, getattr(module, "padding_idx", None))
        return twin.train(module.training)

    def shape_text(self) -> str:
        """Return the shapes of U and V for the plan: `768x48 @ 48x768`."""
        return " @ ".join("x".join(map(str, factor.shape)) for factor in (self.u, self.v))


class LowRankLinear(LowRankFactors):
    """y = (x V^T) U^T + bias for x [..., n]: two linear maps, the first without a bias."""

    def __init__(self, u: Tensor, v: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(u, v)
        self.in_features = v.shape[1]
        self.out_features = u.shape[0]
        self.bias = None if bias is None else _parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., m] for x [..., n]."""
        return F.linear(F.linear(x, self.v), self.u, self.bias)

    def flops(self, shape: Sequence[int]) -> int:
        """Return the FLOPs for an input of `shape`, 2 a multiply-add."""
        return 2 * math.prod(shape[:-1]) * self.rank * (self.in_features + self.out_features)

    def extra_repr(self) -> str:
        """Return the shapes for `print`."""
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, bias={self.bias is not None}"


class LowRankEmbedding(LowRankFactors):
    """Rows of W by number: a row of the table U [tokens, rank], projected by V [rank, width].

    What `padding_idx` looks up sends no gradient.
    Source: Lan et al., ALBERT, ICLR 2020, section 3.1 (factorised embedding).
    """

    def __init__(self, u: Tensor, v: Tensor, padding_idx: int | None = None) -> None:
        super().__init__(u, v)
        self.num_embeddings = u.shape[0]
        self.embedding_dim = v.shape[1]
        self.padding_idx = padding_idx

    def forward(self, index: Tensor) -> Tensor:
        """Return [..., n] for integer `index` [...]."""
        out = F.embedding(index, self.u) @ self.v
        out = out.to(self.v.dtype)  # a look-up keeps its type under autocast, a product does not
        if self.padding_idx is None:
            return out
        return torch.where((index == self.padding_idx).unsqueeze(-1), out.detach(), out)

    def flops(self, shape: Sequence[int]) -> int:
        """Return the FLOPs for indices of `shape`: those of the projection; look-ups are free."""
        return 2 * math.prod(shape) * self.rank * self.embedding_dim

    def extra_repr(self) -> str:
        """Return the shapes for `print`."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}{padding}"


def _parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
