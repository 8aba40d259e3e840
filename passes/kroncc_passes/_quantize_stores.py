"""The two forms of a quantised weight: codes on an even grid, and codes of centroids with exact outliers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kroncc_passes._packing import pack, packed_size, unpack
from kroncc_passes._quantize_grid import Grid
from kroncc_passes._stored import Store


class Layout:
    """How a weight of any shape is seen as a matrix, row by row, and how its codes lie in bytes.

    A row is what the last dimension holds; with `transposed` (Conv1D, in x out) a column, with `conv` (out x
    in x size) all of an output. Rows start at a byte if that takes no more room; else they are packed as one.
    """

    def __init__(
        self, shape: Sequence[int], bits: int, *, transposed: bool = False, conv: bool = False
    ) -> None:
        self.shape = tuple(shape)
        self.bits = bits
        self.transposed = transposed
        size = torch.Size(shape).numel()
        self.columns = shape[0] if transposed else size // shape[0] if conv else shape[-1]
        self.rows = size // self.columns
        self.aligned = self.columns % 8 == 0

    @property
    def packed_shape(self) -> tuple[int, int]:
        """The shape of the packed codes."""
        rows, columns = (self.rows, self.columns) if self.aligned else (1, self.rows * self.columns)
        return rows, packed_size(columns, self.bits)

    def matrix(self, weight: Tensor) -> Tensor:
        """Return `weight` as [rows, columns]."""
        return weight.t() if self.transposed else weight.reshape(self.rows, self.columns)

    def weight(self, matrix: Tensor) -> Tensor:
        """Return what `matrix` made a matrix of."""
        return matrix.t() if self.transposed else matrix.view(self.shape)

    def pack(self, codes: Tensor) -> Tensor:
        """Return the bytes of `codes` [rows, columns]; on meta their shape alone."""
        if codes.is_meta:
            return codes.new_empty(self.packed_shape, dtype=torch.uint8)
        return pack(codes if self.aligned else codes.reshape(1, -1), self.bits).contiguous()

    def unpack(self, packed: Tensor) -> Tensor:
        """Return the codes [rows, columns]."""
        count = self.columns if self.aligned else self.rows * self.columns
        return unpack(packed, self.bits, count).reshape(self.rows, self.columns)

    def unpack_rows(self, packed: Tensor, index: Tensor) -> Tensor:
        """Return the codes [..., columns] of the rows at `index`; of aligned rows no others are read."""
        if self.aligned:
            return unpack(packed[index], self.bits, self.columns)
        return self.unpack(packed)[index]


class PackedWeight(Store):
    """A weight as packed codes on an even grid: (code - code of zero) * scale.

    `codes` uint8 [rows, bytes], `scale` [rows | 1, groups] in the model's type, `zero` uint8 like it or None.
    """

    def __init__(
        self, layout: Layout, grid: Grid, codes: Tensor, scale: Tensor, zero: Tensor | None, *, trained: bool
    ) -> None:
        super().__init__()
        self.shape = layout.shape
        self.layout = layout
        self.grid = grid
        self.codes = frozen(codes)
        self.scale = nn.Parameter(scale, requires_grad=trained)
        self.zero = None if zero is None else frozen(zero)

    def forward(self) -> Tensor:
        """Return the weight."""
        codes = self.layout.unpack(self.codes)
        return self.layout.weight(self.grid.decode(codes, self.scale, self.zero))

    def rows(self, index: Tensor) -> Tensor:
        """Return the rows at `index` [...]; no others are unpacked."""
        codes = self.layout.unpack_rows(self.codes, index)
        if self.grid.granularity == "tensor":
            return self.grid.decode(codes, self.scale, self.zero)
        zero = None if self.zero is None else self.zero[index]
        return self.grid.decode(codes, F.embedding(index, self.scale), zero)

    def text(self) -> str:
        """Return `4 bits`, `4 bits in groups of 64`, `4 bits, asymmetric`."""
        return grid_text(self.grid)


class CodedWeight(Store):
    """A weight as packed numbers of centroids, but for outliers, which are kept exactly.

    `codes` uint8 [rows, bytes], `centroids` [2^bits] and `outliers` [k] in the model's type, `places` int32
    [k]: where the outliers are in the matrix, row by row, in increasing order.
    Source: Zadeh et al., GOBO, MICRO 2020, section IV.
    """

    def __init__(
        self,
        layout: Layout,
        codes: Tensor,
        centroids: Tensor,
        places: Tensor,
        outliers: Tensor,
        *,
        trained: bool = False,
    ) -> None:
        super().__init__()
        self.shape = layout.shape
        self.layout = layout
        self.codes = frozen(codes)
        self.centroids = nn.Parameter(centroids, requires_grad=trained)
        self.places = frozen(places)
        self.outliers = nn.Parameter(outliers, requires_grad=trained)

    def forward(self) -> Tensor:
        """Return the weight."""
        codes = self.layout.unpack(self.codes).reshape(-1)
        values = self.centroids[codes.int()].index_put((self.places.long(),), self.outliers)
        return self.layout.weight(values.view(self.layout.rows, self.layout.columns))

    def rows(self, index: Tensor) -> Tensor:
        """Return the rows at `index` [...]; no others are unpacked."""
        values = self.centroids[self.layout.unpack_rows(self.codes, index).int()]
        if not self.outliers.numel():
            return values
        columns = torch.arange(self.layout.columns, device=index.device)
        wanted = (index.unsqueeze(-1) * self.layout.columns + columns).int()
        found = torch.searchsorted(self.places, wanted).clamp(max=self.places.numel() - 1)
        return torch.where(self.places[found] == wanted, self.outliers[found], values)

    def text(self) -> str:
        """Return `3 bits, 31 outliers`."""
        return f"{self.layout.bits} bits, {self.outliers.numel()} outliers"


def frozen(values: Tensor) -> nn.Parameter:
    """Return integers as a Parameter, which two modules can share."""
    return nn.Parameter(values, requires_grad=False)


def grid_text(grid: Grid) -> str:
    """Return the form of a weight on `grid` for the plan."""
    group = f" in groups of {grid.group}" if grid.group else ""
    whole = " of one scale" if grid.granularity == "tensor" else ""
    return f"{grid.bits} bits{group}{whole}" + ("" if grid.symmetric else ", asymmetric")


def packed_weight(weight: Tensor, layout: Layout, grid: Grid, *, trained: bool = False) -> PackedWeight:
    """Return `weight` rounded to the nearest points of `grid`; on meta the shapes alone."""
    matrix = layout.matrix(weight.detach())
    scale, zero = grid.fit(matrix)
    codes = grid.encode(matrix, scale, zero)
    return PackedWeight(layout, grid, layout.pack(codes), scale, zero, trained=trained)


def stores_in(module: nn.Module) -> list[Store]:
    """Return the quantised weights in `module`."""
    return [cast("Store", part) for part in module.modules() if isinstance(part, PackedWeight | CodedWeight)]
