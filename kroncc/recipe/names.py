"""The words a recipe may use: roles, taps, metrics, tasks, data sources. Plain constants, no torch."""

from __future__ import annotations

BASE = "base"

ROLES: tuple[str, ...] = (
    "embedding.word",
    "embedding.position",
    "embedding.type",
    "attention.q",
    "attention.k",
    "attention.v",
    "attention.qkv",
    "attention.out",
    "ffn.up",
    "ffn.gate",
    "ffn.down",
    "norm",
    "pooler",
    "head",
)

TAPS: tuple[str, ...] = (
    "embeddings",
    "hidden",
    "ffn.output",
    "attention.scores",
    "attention.probs",
    "attention.queries",
    "attention.keys",
    "attention.values",
    "logits",
    "sentence",
)

METRICS: tuple[str, ...] = (
    "accuracy",
    "f1",
    "mcc",
    "pearson",
    "spearman",
    "perplexity",
    "latency",
    "fidelity",
)
"""What an evaluate step can measure.

`latency` is in ms at batch 1; `fidelity` needs a reference model and gives `FIDELITY_PARTS`.
"""

FIDELITY_PARTS: tuple[str, ...] = ("agreement", "kl", "cosine", "rank_correlation")

COSTS: tuple[str, ...] = ("params", "bytes", "disk", "flops", "flops.linear", "flops.total")
"""What is known of every model without running it."""

TASKS: tuple[str, ...] = (
    "feature-extraction",
    "fill-mask",
    "image-classification",
    "question-answering",
    "text-classification",
    "text-generation",
    "text2text-generation",
    "token-classification",
)

FILE_SOURCES: tuple[str, ...] = ("text", "csv", "json", "parquet")
BUILTIN_SOURCES: tuple[str, ...] = ("builtin:python-docs",)
