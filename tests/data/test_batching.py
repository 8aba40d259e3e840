"""Batches: every row once, the same for the same seed, little padding; and the tensors of a batch."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from kroncc.data.batching import (
    IGNORED,
    Batches,
    Masking,
    Padding,
    collate,
    masked_rows,
    next_token_labels,
    padding_of,
    plan_batches,
)
from kroncc.data.tokens import Tokenised
from kroncc.errors import DataError

LENGTHS = np.random.default_rng(0).integers(3, 128, 3000)


def tokenizer_of(*special: str) -> PreTrainedTokenizerFast:
    vocabulary = {f"w{at}": at for at in range(95)} | {token: 95 + at for at, token in enumerate(special)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    names = {token.strip("[]").lower() + "_token": token for token in special}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def tokenised(rows: list[list[int]], labels: list[int] | None = None) -> Tokenised:
    columns: dict[str, list[object]] = {"input_ids": list(rows), "length": [len(row) for row in rows]}
    if labels is not None:
        columns["labels"] = list(labels)
    lengths = np.array([len(row) for row in rows], dtype=np.int32)
    return Tokenised(datasets.Dataset.from_dict(columns), lengths, None, "key")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 500), max_size=400),
    st.integers(1, 9),
    st.integers(0, 2**32 - 1),
    st.integers(0, 5),
    st.booleans(),
    st.booleans(),
)
def test_every_row_once(
    lengths: list[int], size: int, seed: int, epoch: int, shuffle: bool, longest_first: bool
) -> None:
    batches = plan_batches(lengths, size, seed, epoch, shuffle, longest_first)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert len(batches) == -(-len(lengths) // size)
    assert sum(len(batch) < size for batch in batches) <= 1
    assert batches == plan_batches(lengths, size, seed, epoch, shuffle, longest_first)


def test_seed_and_epoch_change_the_batches() -> None:
    seen = {str(plan_batches(LENGTHS, 32, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(seen) == 4


def test_little_padding() -> None:
    def padded(batches: list[list[int]]) -> int:
        return sum(int(LENGTHS[batch].max()) * len(batch) for batch in batches)

    shuffled = [batch.tolist() for batch in np.array_split(np.random.default_rng(1).permutation(3000), 94)]
    assert padded(plan_batches(LENGTHS, 32)) < 1.1 * LENGTHS.sum()
    assert padded(plan_batches(LENGTHS, 32, shuffle=False)) < 1.03 * LENGTHS.sum()
    assert padded(shuffled) > 1.5 * LENGTHS.sum()


def test_shuffled_batches_come_in_no_order_of_length() -> None:
    means = [LENGTHS[batch].mean() for batch in plan_batches(LENGTHS, 32)]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.4


def test_longest_first() -> None:
    batches = plan_batches(LENGTHS, 32, longest_first=True)
    assert LENGTHS[batches[0]].max() == LENGTHS.max()


def test_collate_pads_to_the_longest() -> None:
    columns = {"input_ids": [[5, 6, 7], [8]], "token_type_ids": [[0, 1, 1], [1]], "labels": [2, 0]}
    batch = collate(columns, Padding({"input_ids": 9}))
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["token_type_ids"].tolist() == [[0, 1, 1], [1, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [2, 0]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_collate_pads_to_a_multiple() -> None:
    batch = collate({"input_ids": [[5] * 9, [6]]}, Padding(multiple_of=8))
    assert batch["input_ids"].shape == (2, 16)
    assert batch["attention_mask"].sum(1).tolist() == [9, 1]


def test_numbers_are_float_labels() -> None:
    batch = collate({"input_ids": [[1], [2]], "labels": [2.0, 0.5]}, Padding())
    assert batch["labels"].dtype == torch.float32


def test_padding_token_falls_back_to_the_end_token() -> None:
    assert padding_of(tokenizer_of("[PAD]", "[EOS]")).ids["input_ids"] == 95
    assert padding_of(tokenizer_of("[EOS]")).ids["input_ids"] == 95
    assert padding_of(tokenizer_of()).ids["input_ids"] == 0


def test_next_token_labels_ignore_padding_even_where_it_looks_like_a_token() -> None:
    batch = collate({"input_ids": [[5, 95, 95], [6]]}, Padding({"input_ids": 95}))
    assert next_token_labels(batch).tolist() == [[5, 95, 95], [6, IGNORED, IGNORED]]


def test_masking_follows_berts_shares() -> None:
    masking = Masking(mask=99, vocabulary=90, special=frozenset({0, 1}))
    ids = [[0, *range(10, 90), 1]] * 500
    masked, labels = masked_rows(ids, masking, [(0, 0, row) for row in range(500)])
    before, after, wanted = np.array(ids), np.array(masked), np.array(labels)
    chosen = wanted != IGNORED
    assert (wanted[chosen] == before[chosen]).all()
    assert (after[~chosen] == before[~chosen]).all()
    assert not chosen[:, [0, -1]].any()
    assert chosen[:, 1:-1].mean() == pytest.approx(0.15, abs=0.01)
    assert (after[chosen] == 99).mean() == pytest.approx(0.8, abs=0.02)
    assert (after[chosen] == before[chosen]).mean() == pytest.approx(0.1, abs=0.02)


def test_masks_depend_on_seed_epoch_and_row_not_on_the_batch() -> None:
    data = tokenised([list(range(1, 60)) for _ in range(8)])
    tokenizer = tokenizer_of("[PAD]", "[MASK]")

    def shown(seed: int, rows: list[int], epoch: int) -> list[list[int]]:
        batch = Batches(data, tokenizer, "fill-mask", 4, seed=seed).collate(rows, epoch)
        found: list[list[int]] = batch["input_ids"].tolist()
        return found

    assert shown(0, [3, 5], 1)[1] == shown(0, [5, 6, 7], 1)[0]
    assert len({str(shown(*key)) for key in [(0, [3], 0), (0, [3], 1), (1, [3], 0), (0, [4], 0)]}) == 4


def test_fill_mask_needs_a_mask_token() -> None:
    with pytest.raises(DataError, match="K622"):
        Batches(tokenised([[1]]), tokenizer_of("[PAD]"), "fill-mask", 4)


def test_batches_of_a_causal_model() -> None:
    batches = Batches(tokenised([[1, 2], [3]]), tokenizer_of("[EOS]"), "text-generation", 2)
    batch = batches.collate([0, 1])
    assert batch["labels"].tolist() == [[1, 2], [3, IGNORED]]


def test_batches_cover_the_split_and_keep_its_labels() -> None:
    data = tokenised([[at % 90] * (1 + at % 7) for at in range(50)], labels=list(range(50)))
    batches = Batches(data, tokenizer_of("[PAD]"), "text-classification", 8, seed=3)
    seen = [batches.collate(rows, 2) for rows in batches.epoch(2)]
    assert sorted(label for batch in seen for label in batch["labels"].tolist()) == list(range(50))
    for batch in seen:
        assert (batch["input_ids"][:, 0] == batch["labels"] % 90).all()
        assert batch["attention_mask"].sum(1).tolist() == [
            1 + label % 7 for label in batch["labels"].tolist()
        ]


def test_no_file_is_written_by_reading_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Batches(tokenised([[1, 2]]), tokenizer_of("[PAD]"), "feature-extraction", 2).collate([0])
    assert not list(tmp_path.iterdir())
