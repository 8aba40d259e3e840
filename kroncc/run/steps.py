"""The arithmetic of a training stage: how many steps, which rows in each, at which learning rate.

All of it is a pure function of the step number, so a resumed run needs no other position.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from kroncc.recipe.schema import Training

Batch = Mapping[str, torch.Tensor]


class BatchSource(Protocol):
    """Rows in batches. The same epoch always gives the same batches, in every process."""

    def epoch(self, number: int) -> Sequence[Sequence[int]]:
        """Return the batches of an epoch (counted from 0), each a list of row numbers."""

    def collate(self, rows: Sequence[int], epoch: int = 0) -> Batch:
        """Return the tensors of these rows as `epoch` shows them, padded to the longest, on the CPU."""


class Rows(NamedTuple):
    """The rows of one batch, and the epoch that it belongs to."""

    epoch: int
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Work:
    """One optimiser step: its number from 1, and its batches."""

    step: int
    batches: tuple[Rows, ...]

    @property
    def rows(self) -> int:
        """Rows that count for the step."""
        return sum(len(batch.rows) for batch in self.batches)


def batch_count(source: BatchSource, options: Training) -> int:
    """Return how many batches the stage takes in all."""
    if options.max_steps is not None:
        return options.max_steps * options.accumulate
    assert options.epochs is not None  # the schema demands one of the two
    return max(1, math.ceil(options.epochs * len(source.epoch(0)) - 1e-9))


def step_count(source: BatchSource, options: Training) -> int:
    """Return how many optimiser steps the stage takes; the last may hold fewer batches."""
    return math.ceil(batch_count(source, options) / options.accumulate)


def work(source: BatchSource, options: Training, done: int = 0) -> Iterator[Work]:
    """Yield the optimiser steps that follow step `done`, in order."""
    total = batch_count(source, options)
    group: list[Rows] = []
    for position, batch in enumerate(_stream(source, total), start=1):
        group.append(batch)
        if len(group) < options.accumulate and position < total:
            continue
        step = math.ceil(position / options.accumulate)
        if step > done:
            yield Work(step, tuple(group))
        group = []


def _stream(source: BatchSource, total: int) -> Iterator[Rows]:
    epoch = given = 0
    while given < total:
        batches = source.epoch(epoch)[: total - given]
        yield from (Rows(epoch, tuple(batch)) for batch in batches)
        given += len(batches)
        epoch += 1


def shard(rows: Sequence[int], rank: int, world: int) -> tuple[list[int], int]:
    """Return the rows that one process takes of a batch, and how many of them count.

    Every process gets at least one row, so that all of them run the same number of forward and backward
    passes; where a batch has fewer rows than there are processes, the filler counts 0.
    """
    mine = list(rows[rank::world])
    return (mine, len(mine)) if mine else ([rows[0]], 0)


def learning_rate(options: Training, step: int, total: int) -> float:
    """Return the learning rate of optimiser step `step` (from 1) of `total`.

    It rises in a straight line over the warm-up share, then stays (`constant`), falls in a straight line to
    zero (`linear`) or along half a cosine (`cosine`); the step after the last would have rate zero.
    """
    warmup = math.ceil(options.warmup * total)
    if step <= warmup:
        return options.learning_rate * step / (warmup + 1)
    if options.schedule == "constant":
        return options.learning_rate
    done = (step - 1 - warmup) / max(1, total - warmup)
    if options.schedule == "linear":
        return options.learning_rate * (1.0 - done)
    return options.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))
