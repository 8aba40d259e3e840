"""The `block-diagonal` pass: keep the diagonal blocks of a weight, drop the rest."""

from typing import ClassVar

import torch
from pydantic import Field
from torch import nn

from kroncc.api import Site, SitePass, Skip


class BlockDiagonalLinear(nn.Module):
    """y = concat_g(x_g W_g^T) + bias, with W of shape [blocks, out/blocks, in/blocks]."""

    def __init__(self, weight: torch.Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.unflatten(-1, (self.weight.shape[0], self.weight.shape[2]))
        y = torch.einsum("...gi,goi->...go", x, self.weight).flatten(-2)
        return y if self.bias is None else y + self.bias


class BlockDiagonal(SitePass):
    """Replace a linear map by its diagonal blocks."""

    kind: ClassVar[str] = "block-diagonal"
    blocks: int = Field(gt=1, description="number of blocks; divides both sizes")

    def replace(self, site: Site) -> nn.Module | Skip:
        weight = site.module.weight
        if any(size % self.blocks for size in weight.shape):
            return Skip(f"{self.blocks} blocks do not divide {tuple(weight.shape)}")
        rows = weight.detach().unflatten(0, (self.blocks, -1)).unflatten(-1, (self.blocks, -1))
        kept = torch.stack([rows[g, :, g] for g in range(self.blocks)])
        return BlockDiagonalLinear(kept, site.module.bias)
