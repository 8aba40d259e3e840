"""Small modules that live only in the graph view: they stand where the source calls a function."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn


class Attention(nn.Module):
    """Scaled dot-product attention as a module, the same bits as the function it stands for.

    Takes q `(..., L, d)`, k `(..., S, d)`, v `(..., S, dv)` and an optional mask that broadcasts to
    `(..., L, S)` (bool: True takes part; float: added to the scores); returns `(..., L, dv)`. `dropout_p`
    acts in training only.
    """

    def __init__(
        self,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        super().__init__()
        self.dropout_p = dropout_p
        self.is_causal = is_causal
        self.scale = scale
        self.enable_gqa = enable_gqa

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return softmax(q k^T scale + mask) v."""
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout_p if self.training else 0.0,
            is_causal=self.is_causal,
            scale=self.scale,
            enable_gqa=self.enable_gqa,
        )

    def extra_repr(self) -> str:
        """Name the settings that differ from the defaults of the function."""
        shown = [f"dropout_p={self.dropout_p:g}"]
        shown += ["is_causal"] if self.is_causal else []
        shown += [f"scale={self.scale:.6g}"] if self.scale is not None else []
        shown += ["enable_gqa"] if self.enable_gqa else []
        return ", ".join(shown)


class Region(nn.Module):
    """A part of the graph that the source runs with gradients switched off (or on)."""

    def __init__(self, body: fx.GraphModule, enabled: bool) -> None:
        super().__init__()
        self.body = body
        self.enabled = enabled

    def forward(self, *args: Any) -> Any:
        """Return what the body returns, with gradients switched as the source does."""
        with torch.set_grad_enabled(self.enabled):
            return self.body(*args)

    def extra_repr(self) -> str:
        """Say whether gradients are on inside."""
        return f"grad={self.enabled}"
