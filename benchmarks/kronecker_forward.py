"""Factored layers of KroneckerBERT against the dense layer of the same size."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.timing import interleaved
from kroncc_passes._kronecker_layers import KroneckerLinear

TOKENS = 128
BATCH = 8  # sequences of a training step
CASES = {
    "K_8 attention": ((384, 384), (2, 2)),
    "K_8 ffn up": ((8, 2), (384, 384)),
    "K_8 ffn down": ((2, 8), (384, 384)),
    "K_21 attention": ((384, 48), (2, 16)),
    "K_21 ffn up": ((16, 2), (192, 384)),
    "K_21 ffn down": ((2, 16), (384, 192)),
}


def main() -> None:
    """Print one row a layer: milliseconds and ratios, dense over factored."""
    print(f"float32, {torch.get_num_threads()} threads; {TOKENS} tokens, training step {BATCH} x {TOKENS}")
    print(f"{'layer':<16}{'dense':>10}{'factored':>10}{'ratio':>8}{'dense step':>12}{'step':>10}{'ratio':>8}")
    for name, (a, b) in CASES.items():
        layer = KroneckerLinear(torch.randn(1, *a), torch.randn(1, *b), torch.zeros(a[0] * b[0]))
        dense = nn.Linear(layer.in_features, layer.out_features)
        one = torch.randn(1, TOKENS, layer.in_features)
        many = torch.randn(BATCH, TOKENS, layer.in_features, requires_grad=True)
        infer = interleaved({"dense": _infer(dense, one), "factored": _infer(layer, one)}, 60)
        train = interleaved({"dense": _step(dense, many), "factored": _step(layer, many)}, 12)
        print(f"{name:<16}{_row(infer, 10)}{_row(train, 12)}")


def _row(seconds: dict[str, float], width: int) -> str:
    dense, factored = seconds["dense"], seconds["factored"]
    return f"{dense * 1e3:>{width}.2f}{factored * 1e3:>10.2f}{dense / factored:>7.2f}x"


def _infer(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    def call() -> Tensor:
        with torch.inference_mode():
            out: Tensor = layer(x)
            return out

    return call


def _step(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    def call() -> None:
        layer.zero_grad()
        layer(x).sum().backward()

    return call
