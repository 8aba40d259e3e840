"""Modules whose weight is a mapping of a larger, frozen one: what `squeeze` trains."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

KINDS = (nn.Linear, nn.Embedding, Conv1D)


class Mapping:
    """What modules with one tied weight share: the maps of both sides, and the weight they merge to."""

    def __init__(self, large: nn.Parameter, sides: Sequence[nn.Parameter | None]) -> None:
        self.large = nn.Parameter(large.detach(), requires_grad=False)
        self.left, self.right = sides
        self.merged: nn.Parameter | None = None


class Squeezed(nn.Module):
    """A linear map or table whose weight is left @ large @ right; a side that is not cut has no map.

    `large` [M, N] is frozen; `left` [m, M] and `right` [N, n] train, and the bias of `small`, the module of
    the new size that it stands for. Takes and gives what `small` does.
    """

    def __init__(self, small: nn.Module, mapping: Mapping) -> None:
        super().__init__()
        self.kind = KINDS.index(type(small))
        self.large, self.left, self.right = mapping.large, mapping.left, mapping.right
        self.bias = getattr(small, "bias", None)
        self.padding_idx = getattr(small, "padding_idx", None)
        self.__dict__["_mapping"] = mapping  # no sub-module: to the graph this is one module

    def weight_now(self) -> Tensor:
        """Return the weight of the new size [m, n]."""
        weight: Tensor = self.large if self.left is None else self.left @ self.large
        return weight if self.right is None else weight @ self.right

    def forward(self, x: Tensor) -> Tensor:
        """Return what the module of the new size gives."""
        weight = self.weight_now()
        if KINDS[self.kind] is nn.Embedding:
            return F.embedding(x, weight, self.padding_idx)
        if KINDS[self.kind] is Conv1D:
            weight = weight.t()
        return F.linear(x, weight, self.bias)

    def flops(self, shape: Sequence[int]) -> int:
        """Return the FLOPs of the module that it will be, for an input of `shape`."""
        if KINDS[self.kind] is nn.Embedding:
            return 0
        rows = torch.Size(shape[:-1]).numel()
        return 2 * rows * self._extent(0) * self._extent(1)

    def _extent(self, dim: int) -> int:
        side = (self.left, self.right)[dim]
        return int(self.large.shape[dim] if side is None else side.shape[dim])

    @torch.no_grad()
    def finalise(self) -> nn.Module:
        """Return the module of the new size with the merged weight; tied modules get the same one."""
        mapping: Mapping = self.__dict__["_mapping"]
        if mapping.merged is None:
            mapping.merged = nn.Parameter(self.weight_now().contiguous())
        rows, columns = mapping.merged.shape
        new: nn.Module
        if KINDS[self.kind] is nn.Embedding:
            new = nn.Embedding(rows, columns, self.padding_idx, device="meta")
        elif KINDS[self.kind] is Conv1D:
            new = Conv1D(columns, rows)
        else:
            new = nn.Linear(columns, rows, bias=self.bias is not None, device="meta")
        new.weight = mapping.merged
        if self.bias is not None:
            new.bias = self.bias
        return new.train(self.training)
