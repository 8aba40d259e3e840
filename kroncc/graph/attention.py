"""Attention as explicit maths, where scores or probabilities must be seen."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from kroncc.graph.modules import Attention


class ExplicitAttention(Attention):
    """Scaled dot-product attention that also returns its scores and probabilities.

    Takes what `Attention` takes. Agrees with the fused kernel to rounding (1e-5 in float32).
    """

    @classmethod
    def like(cls, fused: Attention) -> ExplicitAttention:
        """Return the explicit twin of `fused`, in the same mode."""
        twin = cls(fused.dropout_p, fused.is_causal, fused.scale, fused.enable_gqa)
        return twin.train(fused.training)

    def forward(  # type: ignore[override]
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the output `(..., L, dv)`, the scores q k^T scale and the probabilities, both `(..., L, S)`.

        Scores are taken before the mask, probabilities before dropout.
        """
        if self.enable_gqa:
            groups = q.shape[-3] // k.shape[-3]
            k, v = k.repeat_interleave(groups, -3), v.repeat_interleave(groups, -3)
        scale = 1 / math.sqrt(q.shape[-1]) if self.scale is None else self.scale
        scores = q @ k.transpose(-2, -1) * scale
        probs = _softmax(self._masked(scores, mask))
        kept = F.dropout(probs, self.dropout_p, self.training)
        return kept @ v, scores, probs

    def _masked(self, scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        if self.is_causal:
            causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~causal, -math.inf)
        if mask is None:
            return scores
        return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask


def _softmax(scores: torch.Tensor) -> torch.Tensor:
    """Return the softmax over the last dimension; a row with nothing to attend to is 0, as in the kernel."""
    empty = scores.isneginf().all(-1, keepdim=True)
    return scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
