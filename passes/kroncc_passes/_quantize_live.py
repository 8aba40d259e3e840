"""Weights and activations that are rounded in the forward pass while the floats behind them train.

Sources: Bengio et al., 2013 (straight-through gradients); Zafrir et al., Q8BERT, 2019 (weights by their
maximum, activations by an exponential moving average of theirs).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kroncc_passes._quantize_grid import Grid
from kroncc_passes._quantize_int8 import Int8Linear, fake_quantised
from kroncc_passes._quantize_stores import Layout, grid_text, packed_weight
from kroncc_passes._stored import Store

DECAY = 0.9999


class TrainedWeight(Store):
    """A weight that trains and is seen rounded to the grid; gradients pass the rounding unchanged.

    Before the share `start` of the training it is seen as it is.
    """

    def __init__(
        self, weight: nn.Parameter, layout: Layout, grid: Grid, *, start: float = 0.0, trained: bool = False
    ) -> None:
        super().__init__()
        self.shape = layout.shape
        self.layout = layout
        self.grid = grid
        self.start = start
        self.trained = trained
        self.active = start == 0
        self.weight = weight

    def set_progress(self, progress: float) -> None:
        """Begin to round when the share `start` of the training is done."""
        self.active = progress >= self.start

    def forward(self) -> Tensor:
        """Return the weight as it is seen."""
        return self._seen(self.weight) if self.active else self.weight

    def rows(self, index: Tensor) -> Tensor:
        """Return the rows at `index` [...]; no others are rounded, unless all share a scale."""
        if self.active and self.grid.granularity == "tensor":
            return F.embedding(index, self._seen(self.weight))
        rows = F.embedding(index, self.weight)
        if not self.active:
            return rows
        matrix = rows.detach().reshape(-1, rows.shape[-1])
        return _through(rows, _rounded(self.grid, matrix).view(rows.shape))

    def finalise(self) -> Store:
        """Return the weight packed."""
        return packed_weight(self.weight, self.layout, self.grid, trained=self.trained)

    def text(self) -> str:
        """Return the form that it will have."""
        return f"trained for {grid_text(self.grid)}"

    def _seen(self, weight: Tensor) -> Tensor:
        return _through(weight, self.layout.weight(_rounded(self.grid, self.layout.matrix(weight.detach()))))


class TrainedInt8(nn.Module):
    """A linear map that trains as `Int8Linear` computes: rounded weight, rounded inputs.

    `inner` is the Linear or Conv1D itself. With `fixed`, inputs are rounded in the range of a moving average
    of their largest absolute value, decay 0.9999; else every vector has its own range.
    """

    def __init__(self, weight: TrainedWeight, bias: nn.Parameter | None, *, fixed: bool) -> None:
        super().__init__()
        self.stored = weight
        self.bias = bias
        self.out_features, self.in_features = weight.layout.rows, weight.layout.columns
        reach = weight.weight.detach().new_zeros((), dtype=torch.float32) if fixed else None
        self.register_buffer("reach", reach)
        self.reach: Tensor | None

    @property
    def weight(self) -> nn.Parameter:
        """The weight that trains."""
        return self.stored.weight

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out] for x [..., in]."""
        if self.training and self.reach is not None:
            self._follow(x.detach())
        if self.stored.active:
            x = fake_quantised(x, self.reach)
        return F.linear(x, self.stored.layout.matrix(self.stored()), self.bias)

    def finalise(self) -> nn.Module:
        """Return the map that multiplies bytes."""
        return int8_linear(self.weight, self.stored.layout, self.stored.grid, self.bias, self.reach)

    def flops(self, shape: Sequence[int]) -> int:
        """Return the FLOPs for an input of `shape`, 2 a multiply-add."""
        return 2 * math.prod(shape) * self.out_features

    def shape_text(self) -> str:
        """Return the shape for the plan."""
        return f"{self.out_features}x{self.in_features}, trained for int8 x int8"

    def tied_to(self, module: nn.Module) -> nn.Module:
        """Return what takes the place of a module that shares the weight: the same weight, its own bias."""
        twin = TrainedInt8(self.stored, getattr(module, "bias", None), fixed=self.reach is not None)
        return twin.train(module.training)

    @torch.no_grad()
    def _follow(self, x: Tensor) -> None:
        """Take the largest absolute value of x into the average; the first one is the average."""
        assert self.reach is not None
        largest = x.abs().max().float()
        average = DECAY * self.reach + (1 - DECAY) * largest
        self.reach.copy_(torch.where(self.reach == 0, largest, average))


def int8_linear(
    weight: Tensor, layout: Layout, grid: Grid, bias: nn.Parameter | None, reach: Tensor | None
) -> Int8Linear:
    """Return the linear map of `weight` that multiplies bytes; on meta the shapes alone."""
    matrix = layout.matrix(weight.detach())
    scale, _ = grid.fit(matrix)
    codes = (grid.encode(matrix, scale, None).to(torch.int16) - grid.centre).to(torch.int8)
    held = None if reach is None else reach.detach().to(weight.dtype)
    return Int8Linear(codes.contiguous(), scale.view(-1), bias, held)


def _rounded(grid: Grid, matrix: Tensor) -> Tensor:
    scale, zero = grid.fit(matrix)
    return grid.decode(grid.encode(matrix, scale, zero), scale, zero)


def _through(weight: Tensor, seen: Tensor) -> Tensor:
    """Return `seen`, to the last bit, with the gradient of `weight`."""
    return seen + (weight - weight.detach())
