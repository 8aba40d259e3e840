"""The grid that weights are rounded to: evenly spaced steps for a tensor, a row, or a group of columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Granularity = Literal["tensor", "channel", "group"]


@dataclass(frozen=True)
class Grid:
    """How a matrix is rounded: bits a weight, which weights share a scale, where zero lies."""

    bits: int
    granularity: Granularity = "channel"
    group: int | None = None
    symmetric: bool = True

    def scales(self, rows: int, columns: int) -> tuple[int, int]:
        """Return the shape of the scales of a matrix."""
        if self.granularity == "tensor":
            return 1, 1
        return rows, 1 if self.group is None else -(-columns // self.group)

    @property
    def centre(self) -> int:
        """The code of zero on a symmetric grid."""
        return 1 << (self.bits - 1)

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def fit(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the scales, of the matrix's type, and the codes of zero (uint8; None if symmetric).

        Symmetric: scale = max abs(w) / (2^(bits-1) - 1). Else (max - min) / (2^bits - 1), where the range
        holds zero, which has a code of its own: what is zero stays zero.
        """
        low, high = self._range(matrix.float())
        if self.symmetric:
            return _usable(torch.maximum(high, -low) / (self.centre - 1), matrix.dtype), None
        scale = _usable((high - low) / self.top, matrix.dtype)
        return scale, (-low / scale.float()).round().clamp(0, self.top).to(torch.uint8)

    def encode(self, matrix: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Return the codes uint8 [rows, columns] nearest to `matrix`."""
        columns = matrix.shape[-1]
        steps = (matrix.float() / self.spread(scale, columns).float()).round()
        if zero is None:  # as many steps below zero as above it
            return (steps + self.centre).clamp(1, self.top).to(torch.uint8)
        return (steps + self.spread(zero, columns)).clamp(0, self.top).to(torch.uint8)

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Return the weights [..., columns] that `codes` stand for, of the scales' type."""
        columns = codes.shape[-1]
        steps = codes.to(scale.dtype, copy=True)
        steps -= self.centre if zero is None else self.spread(zero, columns)
        if scale.requires_grad:
            return steps * self.spread(scale, columns)
        if self.group is None:
            return steps.mul_(scale)
        whole = columns - columns % self.group  # in place: fresh memory costs more than the product
        parts = steps[..., :whole].view(*steps.shape[:-1], whole // self.group, self.group)
        parts.mul_(scale[..., : whole // self.group, None])
        if whole < columns:
            steps[..., whole:].mul_(scale[..., -1:])
        return steps

    def spread(self, scale: Tensor, columns: int) -> Tensor:
        """Return scales [..., groups] so that they go with a matrix [..., columns]."""
        if self.group is None:
            return scale
        return scale.repeat_interleave(self.group, dim=-1)[..., :columns]

    def _range(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Return the least and the largest weight for each scale; zero counts as one of them."""
        rows, columns = matrix.shape
        shape = self.scales(rows, columns)
        size = rows * columns if self.granularity == "tensor" else self.group or columns
        parts = F.pad(matrix, (0, -columns % size)) if self.group else matrix
        parts = parts.reshape(*shape, size)
        return parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)


def _usable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `scale` in `dtype`; where all weights are zero, or too small for it, one."""
    cast = scale.to(dtype)
    return torch.where(cast > 0, cast, 1.0)
