"""The printed page: stable, and it shows a swap. Regenerate goldens with KRONCC_UPDATE_GOLDENS=1."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kroncc.graph.capture import capture
from kroncc.graph.printer import describe, format_graph
from kroncc.graph.rewriter import Rewriter

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.mark.parametrize(
    ("family", "auto"), [("bert", "AutoModelForSequenceClassification"), ("llama", "AutoModelForCausalLM")]
)
def test_golden(tiny: Any, family: str, auto: str) -> None:
    page = format_graph(capture(tiny(family, auto)))
    path = GOLDEN / f"graph_{family}.txt"
    if os.environ.get("KRONCC_UPDATE_GOLDENS") == "1":
        path.parent.mkdir(exist_ok=True)
        path.write_text(page)
    assert page == path.read_text()


def test_the_page_does_not_depend_on_numbering(tiny: Any) -> None:
    mg = capture(tiny("bert"))
    page = format_graph(mg)
    for index, node in enumerate(mg.graph.nodes):
        node.name = f"n{index * 7}"
    assert format_graph(mg) == page
    assert format_graph(capture(tiny("bert", seed=3))) == page


def test_the_page_shows_a_swap_and_only_it(tiny: Any) -> None:
    mg = capture(tiny("bert"))
    before = format_graph(mg).splitlines()
    Rewriter(mg).swap("pooler.dense", nn.Sequential(nn.Linear(32, 4, bias=False), nn.Linear(4, 32)))
    after = format_graph(mg).splitlines()
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert changed == [
        (
            "  dense = Linear(32->32)(select) -> f32[B, 32]",
            "  dense = Sequential(0=Linear(32->4, no bias), 1=Linear(4->32))(select) -> f32[B, 32]",
        )
    ]


def test_sizes_have_names(tiny: Any) -> None:
    page = format_graph(capture(tiny("t5", "AutoModelForSeq2SeqLM")))
    assert "decoder_input_ids = input -> i64[B, T]" in page
    assert "-> f32[B, L, 32]" in page
    assert "-> f32[B, T, 32]" in page
    assert "sym_size" not in page
    assert "meta" not in page
    assert "s0" not in page


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (nn.Linear(2, 3), "Linear(2->3)"),
        (nn.Dropout(0.5), "Dropout(0.5)"),
        (nn.LayerNorm(4), "LayerNorm(4, eps=1e-05)"),
        (nn.Embedding(5, 2), "Embedding(5, 2)"),
        (nn.Tanh(), "Tanh()"),
    ],
)
def test_describe(module: torch.nn.Module, text: str) -> None:
    assert describe(module) == text
