"""A weight with zeros, as it is stored: a bitmask and the values that it lets through."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from kroncc_passes._bitmask import pack, packed_size, spread, unpack
from kroncc_passes._stored import Store


class PrunedStore(Store):
    """`entries` [kept] are the weights that are not pruned, in row-major order; `bits` says where they stand.

    The values train, the zeros stay. While no gradient is wanted, the full weight is formed once and kept in
    memory (never saved), so that a pruned module is as fast as a dense one; a step of an optimiser or a
    loaded checkpoint drops it. Writing through `entries.data` goes unnoticed there, as it does for autograd.
    """

    entries: Tensor  # a Parameter, or what a store inside gives

    def __init__(self, values: nn.Parameter, bits: Tensor, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.entries = values
        self.bits = nn.Parameter(bits, requires_grad=False)
        self.shape = shape
        self.kept = values.numel()

    @classmethod
    def of(cls, weight: nn.Parameter, mask: Tensor) -> Self:
        """Return the store of `weight` with the mask's zeros; it trains if the weight does."""
        values = nn.Parameter(weight.detach()[mask], weight.requires_grad)
        return cls(values, pack(mask), tuple(weight.shape))

    @classmethod
    def planned(cls, weight: nn.Parameter, kept: int) -> Self:
        """Return the store, on meta, of a `weight` on meta with `kept` weights left."""
        bits = weight.new_empty(packed_size(weight.numel()), dtype=torch.uint8)
        return cls(nn.Parameter(weight.new_empty(kept), weight.requires_grad), bits, tuple(weight.shape))

    def forward(self) -> Tensor:
        """Return the weight, zeros and all."""
        held = tuple(self.parameters())
        wanted = torch.is_grad_enabled() and any(each.requires_grad for each in held)
        if wanted or torch.compiler.is_compiling() or not all(_is_plain(each) for each in held):
            return self._formed()
        state = [(each, each._version, each.data_ptr(), each.dtype) for each in held]
        before = self.__dict__.get("_dense")
        if before is None or not _same(before[0], state):
            with torch.inference_mode(False), torch.no_grad():
                before = (state, self._formed())
            self.__dict__["_dense"] = before
        dense: Tensor = before[1]
        return dense

    def weights(self) -> int:
        """Return how many weights are left."""
        return self.kept

    def text(self) -> str:
        """Return the share of zeros, and the form of the values where they have one of their own."""
        zeros = 100 * (1 - self.kept / torch.Size(self.shape).numel())
        return f"{zeros:.4g} % zeros"

    def train(self, mode: bool = True) -> Self:
        """Set training mode; the weight formed before is dropped."""
        self.__dict__.pop("_dense", None)
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the formed weight out of copies."""
        return {key: value for key, value in self.__dict__.items() if key != "_dense"}

    def _formed(self) -> Tensor:
        return spread(self.entries, unpack(self.bits, self.shape))


def _is_plain(tensor: Tensor) -> bool:
    """Say whether a tensor is a module's own: not on meta, not swapped in by a tracer."""
    return type(tensor) is nn.Parameter and not tensor.is_meta


def _same(one: list[tuple[Any, ...]], two: list[tuple[Any, ...]]) -> bool:
    return len(one) == len(two) and all(
        a[0] is b[0] and a[1:] == b[1:] for a, b in zip(one, two, strict=True)
    )
