"""Taps: named values of a graph as extra outputs, for losses that read inside a model.

| tap | value | entries |
|---|---|---|
| embeddings | what enters the first layer, before its dropout `[B, L, d]` | one a stack |
| hidden | what leaves a layer; of a stack's last layer, its last hidden state `[B, L, d]` | one a layer |
| ffn.output | what the map down of a feed-forward pair gives `[B, L, d]` | one a pair |
| attention.scores | q k^T scale, before biases and masks `[B, H, L, S]` | one an attention |
| attention.probs | probabilities, before dropout `[B, H, L, S]` | one an attention |
| attention.queries, .keys, .values | what an attention multiplies `[B, H, L, d]` | one an attention |
| logits | the output of that name | one |
| sentence | mean of the last hidden state (the encoder's, of two) over `attention_mask` `[B, d]` | one |
| an FQN | what that module gives | one a call |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import sympy
import torch
from torch import fx, nn

from kroncc.graph.draft import NAMED, Draft
from kroncc.graph.model_graph import ModelGraph
from kroncc.graph.ops import value_of
from kroncc.graph.symbolic import symbols

Shape = tuple[int | str, ...]


class TapOutput(NamedTuple):
    """What a tapped model gives: its own outputs by name, and for each tap its values in order."""

    outputs: dict[str, torch.Tensor]
    taps: dict[str, list[torch.Tensor]]


class Tapped(nn.Module):
    """A model with taps. Its sub-modules are those of the model graph it was made from, not copies.

    A module that is swapped in the graph afterwards is not seen here: tap again.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__()
        self.module = module
        self.inputs = frozenset(str(node.target) for node in module.graph.find_nodes(op="placeholder"))
        self.training = module.training

    def forward(self, **inputs: torch.Tensor) -> TapOutput:
        """Take the model's inputs by name; what the model has no input for is left out."""
        outputs, taps = self.module(**{name: inputs[name] for name in inputs if name in self.inputs})
        return TapOutput(dict(outputs), {name: list(values) for name, values in taps.items()})


def with_taps(mg: ModelGraph, taps: Sequence[str], *, outputs: bool = True) -> Tapped:
    """Return the model of `mg` with the values of `taps` as extra outputs.

    Without `outputs` the model's own outputs are dropped. What neither they nor a tap needs is not run.
    Raises `PlanError` K710 (no such tap), K711 (the model has no such value).
    """
    draft = Draft(mg)
    # Attention first: reading it replaces the fused node, which another tap may name.
    values = {
        tap: draft.read(tap) for tap in sorted(set(taps), key=lambda tap: not tap.startswith("attention."))
    }
    return Tapped(draft.close({tap: values[tap] for tap in taps}, outputs))


def tap_names(mg: ModelGraph) -> list[str]:
    """Return the named taps that the model has. Every FQN of the model is a tap too."""
    draft = Draft(mg)
    return [name for name in NAMED if draft.has(name)]


def tap_shapes(mg: ModelGraph, tap: str) -> list[Shape]:
    """Return the shape of each entry of a tap without running: numbers, and text for `batch`, `length`.

    Raises `PlanError` as `with_taps` does.
    """
    names = {symbol: sympy.Symbol(name) for name, symbol in symbols(mg.graph).items()}
    values = [value_of(node) for node in Draft(mg).read(tap)]
    return [tuple(_size(size, names) for size in value.shape) for value in values if value is not None]


def _size(size: int | torch.SymInt, names: Mapping[sympy.Symbol, sympy.Symbol]) -> int | str:
    return size if isinstance(size, int) else str(size.node.expr.xreplace(names))
