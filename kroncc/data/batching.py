"""Which rows go into a batch, and the tensors of a batch: grouped by length, padded to the longest row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from kroncc.data.tokens import Tokenised
from kroncc.errors import DataError

CHUNK = 50  # batches that are sorted by length together
IGNORED = -100  # label of a position that does not count
MASKED, KEPT = 0.8, 0.1  # of the chosen tokens; the rest become random ones (BERT, section 3.1)

Ints = np.ndarray[Any, np.dtype[np.int64]]


def plan_batches(
    lengths: Sequence[int] | np.ndarray[Any, Any],
    batch_size: int,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
    longest_first: bool = False,
) -> list[list[int]]:
    """Return the batches of an epoch as row numbers: every row once, rows of a batch of like length.

    Shuffled: rows are shuffled, sorted within chunks of 50 batches, and the batches shuffled; the same
    (seed, epoch) gives the same batches. Not shuffled: all rows by falling length. One batch may be short.
    `longest_first` moves the batch with the most padded tokens to the front: a want of memory shows at once.
    """
    counts = np.asarray(lengths)
    if not shuffle:
        return _cut(np.argsort(-counts, kind="stable"), batch_size)
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(counts))
    size = batch_size * CHUNK
    batches: list[list[int]] = []
    for start in range(0, len(order), size):
        chunk = order[start : start + size]
        batches += _cut(chunk[np.argsort(-counts[chunk], kind="stable")], batch_size)
    mixed = [batches[index] for index in random.permutation(len(batches))]
    if longest_first and mixed:
        largest = max(range(len(mixed)), key=lambda at: len(mixed[at]) * int(counts[mixed[at]].max()))
        mixed.insert(0, mixed.pop(largest))
    return mixed


def _cut(order: Ints, size: int) -> list[list[int]]:
    return [order[start : start + size].tolist() for start in range(0, len(order), size)]


@dataclass(frozen=True)
class Masking:
    """Masked language modelling: which share of the tokens is chosen, and what replaces them."""

    mask: int
    vocabulary: int
    special: frozenset[int]
    share: float = 0.15


@dataclass(frozen=True)
class Padding:
    """Ids that fill the short rows of a batch; rows are filled on the right, to a multiple of that."""

    ids: Mapping[str, int] = field(default_factory=dict)
    multiple_of: int = 1


def padding_of(tokenizer: PreTrainedTokenizerBase, multiple_of: int = 1) -> Padding:
    """Return the padding of a tokenizer; one without a padding token uses its end token, or id 0."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    filler = next((token for token in candidates if isinstance(token, int)), 0)
    return Padding({"input_ids": filler, "token_type_ids": tokenizer.pad_token_type_id or 0}, multiple_of)


def masking_of(tokenizer: PreTrainedTokenizerBase) -> Masking:
    """Return the masking of a tokenizer; raises `DataError` for one without a mask token."""
    if not isinstance(tokenizer.mask_token_id, int):
        raise DataError(
            "the tokenizer has no mask token, which task 'fill-mask' needs",
            code="K622",
            remedy="set the model's `task` to what it was trained for",
        )
    return Masking(tokenizer.mask_token_id, len(tokenizer), frozenset(tokenizer.all_special_ids))


def collate(columns: Mapping[str, Sequence[Any]], padding: Padding) -> dict[str, torch.Tensor]:
    """Return the tensors of a batch: token columns [rows, longest], `attention_mask`, and `labels` [rows].

    Labels are int64 for classes and float32 for numbers.
    """
    counts = [len(ids) for ids in columns["input_ids"]]
    width = -(-max(counts) // padding.multiple_of) * padding.multiple_of
    batch: dict[str, torch.Tensor] = {}
    for name, values in columns.items():
        if name != "labels":
            batch[name] = _padded(values, width, padding.ids.get(name, 0))
    batch["attention_mask"] = _padded([[1] * count for count in counts], width, 0)
    if "labels" in columns:
        whole = all(isinstance(label, int) for label in columns["labels"])
        batch["labels"] = torch.tensor(columns["labels"], dtype=torch.int64 if whole else torch.float32)
    return batch


def next_token_labels(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return `labels` for causal language modelling: the ids, padding ignored (the loss shifts)."""
    return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)


def masked_rows(
    ids: Sequence[Sequence[int]], masking: Masking, keys: Sequence[Sequence[int]]
) -> tuple[list[list[int]], list[list[int]]]:
    """Return (ids with masks, labels) of rows; what is chosen in a row depends on its key alone.

    Of the chosen tokens 80 % become the mask, 10 % a random token, 10 % stay (Devlin et al. 2019, 3.1).
    """
    made = [
        _mask_row(np.asarray(row), masking, np.random.default_rng(list(key)))
        for row, key in zip(ids, keys, strict=True)
    ]
    return [row.tolist() for row, _ in made], [labels.tolist() for _, labels in made]


def _mask_row(ids: Ints, masking: Masking, random: np.random.Generator) -> tuple[Ints, Ints]:
    allowed = ~np.isin(ids, list(masking.special))
    chosen = allowed & (random.random(len(ids)) < masking.share)
    fate = random.random(len(ids))
    strangers = random.integers(0, masking.vocabulary, len(ids))
    replaced = np.where(fate < MASKED, masking.mask, np.where(fate < MASKED + KEPT, ids, strangers))
    return np.where(chosen, replaced, ids), np.where(chosen, ids, IGNORED)


def _padded(rows: Sequence[Sequence[int]], width: int, filler: int) -> torch.Tensor:
    padded = np.full((len(rows), width), filler, dtype=np.int64)
    for at, row in enumerate(rows):
        padded[at, : len(row)] = row
    return torch.from_numpy(padded)


class Batches:
    """The batches of a tokenised split: `epoch(n)` gives row numbers, `collate(rows)` the tensors.

    The same (seed, epoch) gives the same batches and the same masks, in every process.
    """

    def __init__(
        self,
        data: Tokenised,
        tokenizer: PreTrainedTokenizerBase,
        task: str,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        multiple_of: int = 1,
    ) -> None:
        self.data, self.task, self.batch_size = data, task, batch_size
        self.seed, self.shuffle = seed, shuffle
        self.padding = padding_of(tokenizer, multiple_of)
        self.masking = masking_of(tokenizer) if task == "fill-mask" else None

    def epoch(self, number: int) -> list[list[int]]:
        """Return the batches of an epoch (counted from 0), each a list of row numbers."""
        return plan_batches(self.data.lengths, self.batch_size, self.seed, number, self.shuffle)

    def sample(self, rows: int, seed: int) -> list[list[int]]:
        """Return the batches of `rows` rows drawn by `seed`, each row once, by falling length.

        Where there are no more than that, all rows.
        """
        random = np.random.default_rng(seed)
        chosen = np.sort(random.permutation(len(self.data.lengths))[:rows])
        planned = plan_batches(self.data.lengths[chosen], self.batch_size, shuffle=False)
        return [chosen[batch].tolist() for batch in planned]

    def collate(self, rows: Sequence[int], epoch: int = 0) -> dict[str, torch.Tensor]:
        """Return the tensors of these rows, padded to the longest of them; `epoch` chooses the masks."""
        columns = self.data.columns(rows)
        labels = None
        if self.masking is not None:
            keys = [(self.seed, epoch, row) for row in rows]
            columns["input_ids"], labels = masked_rows(columns["input_ids"], self.masking, keys)
        batch = collate(columns, self.padding)
        if labels is not None:
            batch["labels"] = _padded(labels, batch["input_ids"].shape[1], IGNORED)
        if self.task == "text-generation":
            batch["labels"] = next_token_labels(batch)
        return batch
