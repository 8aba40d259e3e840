"""The gate behind a layer that trains with LayerDrop."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn


class LayerGate(nn.Identity):
    """Pass a layer's output on, or in training with probability `rate` its input instead.

    Which one is drawn anew for every optimiser step, from `seed` and the progress that `set_progress` tells:
    no state of a random generator is touched, and the same step draws the same anywhere. Both are computed;
    the one that is not taken gets gradients of 0. In evaluation the output passes.
    """

    dropped: Tensor

    def __init__(self, rate: float, seed: str) -> None:
        super().__init__()
        self.rate = rate
        self.seed = seed
        self.register_buffer("dropped", torch.tensor(False), persistent=False)

    def set_progress(self, progress: float) -> None:
        """Draw for the step that is due when the share `progress` of training is done."""
        drawn = random.Random(f"{self.seed}/{progress!r}").random()
        self.dropped.fill_(drawn < self.rate)

    def forward(self, output: Tensor, entered: Tensor) -> Tensor:  # type: ignore[override]
        """Return `output` [..., d] of the layer, or `entered` [..., d], what went into it."""
        return torch.where(self.dropped, entered, output) if self.training else output

    def extra_repr(self) -> str:
        """Show the rate."""
        return f"rate={self.rate:g}"
