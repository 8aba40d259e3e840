"""Latency of models side by side: one sequence at a time, runs interleaved so that noise hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import torch
from torch import nn

ROUNDS = 15
WARMUP = 3


def measure_latency(
    models: Mapping[str, nn.Module], inputs: Mapping[str, torch.Tensor], rounds: int = ROUNDS
) -> dict[str, float]:
    """Return the median milliseconds of one forward pass of each model on `inputs`.

    All models take the same keyword inputs, on one device, in eval mode and without gradients. In every round
    each model runs once, in turn.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for round_ in range(-WARMUP, rounds):
            for name, model in models.items():
                elapsed = _once(model, inputs)
                if round_ >= 0:
                    times[name].append(elapsed)
    return {name: 1000 * statistics.median(samples) for name, samples in times.items()}


def _once(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> float:
    _synchronise(inputs)
    start = time.perf_counter()
    model(**inputs)
    _synchronise(inputs)
    return time.perf_counter() - start


def _synchronise(inputs: Mapping[str, torch.Tensor]) -> None:
    if any(tensor.is_cuda for tensor in inputs.values()):
        torch.cuda.synchronize()
