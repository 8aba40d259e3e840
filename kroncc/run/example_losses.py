"""One loss an example, for statistics that are made of gradients.

| the model gives | the loss of one example |
|---|---|
| logits; the batch has `labels` | the task's own: cross entropy, or squared error for numbers |
| logits; no labels | the same, labels drawn from its own predictions (the true Fisher information) |
| feature-extraction, no logits | masked mean of the last hidden state, times a random vector of +-1 |

Of tokens, the loss is the mean over those that count.
The last is the gradient of a unit-variance Gaussian around the sentence embedding: its square is, on average,
the sum of the squares over all entries of the embedding (Hutchinson 1990). What is drawn for an example
depends on the seed and on its number alone, not on how rows are grouped.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kroncc.data.batching import IGNORED
from kroncc.errors import RunError

EMBEDDING = "feature-extraction"
CAUSAL = "text-generation"
_SPREAD = 0.5**0.5  # of labels under a squared error, which is a Gaussian's log likelihood at variance 1/2


class Draws:
    """Random numbers an example. Call `next` once for every batch, in order."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._first = self._next = 0

    def next(self, rows: int) -> None:
        """Go on to the next `rows` examples."""
        self._first, self._next = self._next, self._next + rows

    def generators(self) -> list[np.random.Generator]:
        """Return one generator for each example of the batch."""
        return [np.random.default_rng([self.seed, number]) for number in range(self._first, self._next)]


def example_losses(
    outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor], task: str, draws: Draws
) -> Tensor:
    """Return the loss of every example, [rows], float32. Raises RunError K831 for outputs of no use."""
    mask = batch.get("attention_mask")
    if task == EMBEDDING or "logits" not in outputs:
        return _projected(outputs, mask, draws)
    logits, labels = outputs["logits"].float(), batch.get("labels")
    if logits.dim() == 3:
        return _of_tokens(logits, labels, mask, task == CAUSAL, draws)
    if logits.dim() != 2:
        raise _no_use(f"logits of shape {list(logits.shape)}")
    return _of_rows(logits, labels, draws)


def _of_rows(logits: Tensor, labels: Tensor | None, draws: Draws) -> Tensor:
    if labels is None and logits.shape[1] == 1:
        noise = [generator.standard_normal() * _SPREAD for generator in draws.generators()]
        labels = logits.detach()[:, 0] + torch.tensor(noise, dtype=torch.float32, device=logits.device)
    if labels is None:
        uniform = np.stack([generator.random(1) for generator in draws.generators()])
        labels = _drawn(logits[:, None], uniform)[:, 0]
    if labels.is_floating_point():
        return (logits.reshape(labels.shape) - labels).square()
    return F.cross_entropy(logits, labels, reduction="none")


def _of_tokens(
    logits: Tensor, labels: Tensor | None, mask: Tensor | None, causal: bool, draws: Draws
) -> Tensor:
    """Return the mean of each example's tokens that count; a causal model's position i predicts i + 1."""
    if labels is None:
        uniform = np.zeros(logits.shape[:2])
        for row, generator in enumerate(draws.generators()):
            real = slice(None) if mask is None else mask[row].bool().cpu().numpy()
            uniform[row, real] = generator.random(uniform[row, real].shape)
        labels = _drawn(logits, uniform)
        labels = labels if mask is None else labels.masked_fill(mask == 0, IGNORED)
    elif causal:
        logits, labels = logits[:, :-1], labels[:, 1:]
    values = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(labels.shape)
    return values.sum(1) / (labels != IGNORED).sum(1).clamp(min=1)


def _drawn(logits: Tensor, uniform: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Tensor:
    """Return a class for each position of logits [rows, positions, classes], by uniform [rows, positions]."""
    levels = logits.detach().cpu().double().softmax(-1).cumsum(-1)
    below = (levels < torch.from_numpy(uniform)[..., None]).sum(-1)
    return below.clamp(max=logits.shape[-1] - 1).to(logits.device)


def _projected(outputs: Mapping[str, Tensor], mask: Tensor | None, draws: Draws) -> Tensor:
    hidden = outputs.get("encoder_last_hidden_state", outputs.get("last_hidden_state"))
    if hidden is None or hidden.dim() != 3:
        raise _no_use(f"the outputs {', '.join(outputs)}")
    hidden = hidden.float()
    if mask is None:
        sentences = hidden.mean(1)
    else:
        real = (mask != 0).unsqueeze(-1)
        sentences = hidden.masked_fill(~real, 0.0).sum(1) / real.sum(1).clamp(min=1)
    signs = [generator.integers(0, 2, sentences.shape[1]) * 2 - 1 for generator in draws.generators()]
    directions = torch.tensor(np.stack(signs), dtype=sentences.dtype, device=sentences.device)
    return (sentences * directions).sum(1)


def _no_use(what: str) -> RunError:
    return RunError(
        f"cannot measure gradients: the model gives {what}",
        code="K831",
        expected="logits [rows, classes] or [rows, length, vocabulary], or last_hidden_state",
        remedy="choose passes, or options of them, that need no gradients",
    )
