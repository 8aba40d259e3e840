"""Integers of 2 to 8 bits, packed without a gap: eight of them take as many bytes as one has bits.

A row of values is padded to a multiple of eight and cut into planes of 4, 2 and 1 bits (one of 8 bits for
bytes): 3 bits are a plane of the lower two and a plane of the highest. A plane of k bits holds 8 / k values a
byte, lowest bits first: of a row of w values, byte j holds those at j, j + w k / 8, j + 2 w k / 8, ... So
unpacking takes a few operations on whole bytes, and a row starts at a byte.
"""

from __future__ import annotations

import torch
from torch import Tensor

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


def packed_size(count: int, bits: int) -> int:
    """Return the bytes that a row of `count` values of `bits` bits takes."""
    return -(-count // 8) * bits


def pack(values: Tensor, bits: int) -> Tensor:
    """Return uint8 [..., packed_size(n, bits)] for `values` uint8 [..., n], each below 2^bits."""
    short = -values.shape[-1] % 8
    padded = torch.nn.functional.pad(values, (0, short)) if short else values
    planes, below = [], 0
    for width in PLANES[bits]:
        plane = (padded >> below) & ((1 << width) - 1)
        parts = plane.chunk(8 // width, dim=-1)
        byte = parts[0]
        for place, part in enumerate(parts[1:], start=1):
            byte = byte | (part << (place * width))
        planes.append(byte)
        below += width
    return torch.cat(planes, dim=-1)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the values uint8 [..., count] that `pack` made `packed` of."""
    size = packed.shape[-1] // bits  # bytes of a plane of one bit
    values, below = None, 0
    for width in PLANES[bits]:
        part = _spread(packed.narrow(-1, below * size, width * size), width)
        values = part if values is None else values | (part << below)
        below += width
    assert values is not None
    return values[..., :count]


def _spread(plane: Tensor, width: int) -> Tensor:
    """Return the values of a plane, one a byte."""
    if width == 8:
        return plane
    mask = (1 << width) - 1
    return torch.cat([(plane >> shift) & mask for shift in range(0, 8, width)], dim=-1)
