"""Rows of text turned into rows of token ids, once, and kept on disk."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from kroncc.data.labels import Labels
from kroncc.data.loading import cached_map
from kroncc.data.splits import Split
from kroncc.errors import DataError
from kroncc.hashing import content_hash
from kroncc.recipe.schema import DataSpec

VERSION = 1  # of the rows that this file makes; part of every key
TASKS = ("feature-extraction", "text-classification", "fill-mask", "text-generation")
ROW_LABELS = ("feature-extraction", "text-classification")  # tasks whose label column reaches the model


@dataclass(frozen=True)
class Tokenised:
    """Rows of token ids, not padded.

    Columns of `rows`: what the tokenizer gives but the attention mask, which follows from the lengths, and
    `labels` where the data is labelled. `lengths` [rows] counts tokens.
    """

    rows: datasets.Dataset
    lengths: np.ndarray[Any, np.dtype[np.int32]]
    labels: Labels | None
    key: str

    def __len__(self) -> int:
        return len(self.rows)

    def columns(self, rows: Sequence[int]) -> dict[str, list[Any]]:
        """Return the columns of these rows."""
        found: dict[str, list[Any]] = self.rows[list(rows)]
        return {name: values for name, values in found.items() if name != "length"}


def tokenise(
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    spec: DataSpec,
    cache_dir: Path,
    *,
    task: str = "feature-extraction",
    positions: int | None = None,
) -> Tokenised:
    """Return the tokens of a split, each row (or pair) cut at `max_length` with its special tokens.

    Nothing is concatenated: a row stays a row, in language modelling too. The result is kept in `cache_dir`
    under a hash of rows, tokenizer and options, and read from there the next time. `positions` is the longest
    sequence that the model takes. Rows without any token are left out.

    Raises `DataError`: task not supported (K610), `max_length` above `positions` (K613), nothing left (K605).
    """
    if task not in TASKS:
        raise DataError(
            f"data for task {task!r} is not supported yet", code="K610", expected=", ".join(TASKS)
        )
    longest = _longest(spec, tokenizer, positions)
    names = [name for name in tokenizer.model_input_names if name != "attention_mask"]
    labels = split.labels if task in ROW_LABELS else None
    features: dict[str, Any] = {name: datasets.List(datasets.Value("int32")) for name in names}
    features["length"] = datasets.Value("int32")
    if labels is not None:
        features["labels"] = split.rows.features["label"]
    key = content_hash([VERSION, split.key, tokenizer_hash(tokenizer), names, longest, bool(labels)])
    encode = functools.partial(
        _encode, tokenizer=tokenizer, names=names, longest=longest, labelled=bool(labels)
    )
    cache_dir.mkdir(parents=True, exist_ok=True)
    rows = cached_map(split.rows, encode, features, cache_dir / f"tokens-{key}.arrow", key)
    if not len(rows):
        raise DataError(f"split {split.name!r} has no rows left after tokenising", code="K605")
    lengths = rows.with_format("numpy")["length"][:]
    return Tokenised(rows, np.asarray(lengths, dtype=np.int32), labels, key)


def _longest(spec: DataSpec, tokenizer: PreTrainedTokenizerBase, positions: int | None) -> int:
    """Return how many tokens a row may have."""
    longest: int = min(spec.max_length, tokenizer.model_max_length)
    if positions is not None and longest > positions:
        raise DataError(
            f"max_length is {spec.max_length}, and the model takes {positions} tokens",
            code="K613",
            path="max_length",
            remedy=f"set `max_length: {positions}` or less",
        )
    return longest


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of all that decides which ids a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        inner: Any = sorted(tokenizer.get_vocab().items())
    else:
        inner = json.loads(backend.to_str())
        inner["truncation"] = inner["padding"] = None  # left there by the last call, whoever made it
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return content_hash([type(tokenizer).__name__, inner, special, tokenizer.truncation_side])


def _encode(
    batch: Mapping[str, list[Any]],
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    longest: int,
    labelled: bool,
) -> dict[str, list[Any]]:
    encoded = tokenizer(
        batch["text"],
        batch.get("text_2"),
        truncation=True,
        max_length=longest,
        return_attention_mask=False,
        verbose=False,
    )
    lengths = [len(ids) for ids in encoded["input_ids"]]
    made: dict[str, list[Any]] = {name: encoded[name] for name in names}
    made["length"] = lengths
    if labelled:
        made["labels"] = batch["label"]
    return {
        name: [value for value, length in zip(column, lengths, strict=True) if length]
        for name, column in made.items()
    }
