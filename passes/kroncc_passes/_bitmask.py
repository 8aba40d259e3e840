"""A mask of one bit a weight, and the values it lets through: how a pruned weight is stored."""

from __future__ import annotations

import torch
from torch import Tensor


def packed_size(count: int) -> int:
    """Return the bytes that a mask of `count` weights takes."""
    return -(-count // 8)


def pack(mask: Tensor) -> Tensor:
    """Return a boolean mask of any shape as uint8 [ceil(n / 8)]: weight i, in row-major order, is bit i % 8
    (from the lowest) of byte i // 8, as `numpy.packbits(..., bitorder="little")` has it.
    """
    flat = mask.reshape(-1)
    padded = flat.new_zeros(packed_size(flat.numel()) * 8, dtype=torch.uint8)
    padded[: flat.numel()] = flat
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (padded.view(-1, 8) << places).sum(1, dtype=torch.uint8)


def unpack(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the boolean mask of `shape` that `pack` made `bits` of."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    flat = ((bits.unsqueeze(1) >> places) & 1).view(-1)
    return flat[: torch.Size(shape).numel()].view(shape).bool()


def spread(values: Tensor, mask: Tensor) -> Tensor:
    """Return a weight of the mask's shape: `values` [kept] where the mask is set, in row-major order, 0 else.

    Gradients reach `values`.
    """
    return values.new_zeros(mask.shape).masked_scatter(mask, values)
