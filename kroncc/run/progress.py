"""What a run tells the outside while it works. Nothing here prints; `kroncc.cli` brings what does."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Protocol

import psutil

from kroncc.run.journal import Journal

JOURNAL_SECONDS = 10.0


@dataclass(frozen=True)
class Step:
    """Where a training stage stands after one optimiser step.

    `rows_per_second` counts training rows of all processes; `seconds_left` is an estimate;
    `peak_bytes` is the largest memory of this process so far (of the GPU, where it trains on one).
    """

    step: int
    total: int
    loss: float
    learning_rate: float
    rows_per_second: float
    seconds_left: float
    peak_bytes: int


class Reporter(Protocol):
    """Receives the events of a run, in order, from the main process only."""

    def stage_started(self, stage: str, kind: str, total: int | None) -> None:
        """A stage begins; `total` counts its optimiser steps, where it trains."""

    def stage_skipped(self, stage: str, reason: str) -> None:
        """A stage need not run."""

    def step(self, stage: str, step: Step) -> None:
        """One optimiser step is done."""

    def stage_finished(self, stage: str, values: Mapping[str, float], seconds: float) -> None:
        """A stage is done and stored."""

    def message(self, text: str) -> None:
        """Something the user should know."""

    def close(self) -> None:
        """The run is over, well or not."""


class NullReporter:
    """Says nothing."""

    def stage_started(self, stage: str, kind: str, total: int | None) -> None:
        """Say nothing."""

    def stage_skipped(self, stage: str, reason: str) -> None:
        """Say nothing."""

    def step(self, stage: str, step: Step) -> None:
        """Say nothing."""

    def stage_finished(self, stage: str, values: Mapping[str, float], seconds: float) -> None:
        """Say nothing."""

    def message(self, text: str) -> None:
        """Say nothing."""

    def close(self) -> None:
        """Say nothing."""


class JournalReporter:
    """Writes every event to the journal, steps at most every 10 seconds, and passes all of them on."""

    def __init__(self, inner: Reporter, journal: Journal) -> None:
        self._inner = inner
        self._journal = journal
        self._written = 0.0

    def stage_started(self, stage: str, kind: str, total: int | None) -> None:
        """Record and pass on."""
        self._journal.write("stage_started", stage, kind=kind, total=total)
        self._written = 0.0
        self._inner.stage_started(stage, kind, total)

    def stage_skipped(self, stage: str, reason: str) -> None:
        """Record and pass on."""
        self._journal.write("stage_skipped", stage, reason=reason)
        self._inner.stage_skipped(stage, reason)

    def step(self, stage: str, step: Step) -> None:
        """Record now and then, and pass on."""
        now = time.monotonic()
        if now - self._written >= JOURNAL_SECONDS or step.step == step.total:
            self._written = now
            self._journal.write("step", stage, **asdict(step))
        self._inner.step(stage, step)

    def stage_finished(self, stage: str, values: Mapping[str, float], seconds: float) -> None:
        """Record and pass on."""
        self._journal.write("stage_finished", stage, values=dict(values), seconds=round(seconds, 3))
        self._inner.stage_finished(stage, values, seconds)

    def message(self, text: str) -> None:
        """Record and pass on."""
        self._journal.write("message", text=text)
        self._inner.message(text)

    def close(self) -> None:
        """Pass on."""
        self._inner.close()


def peak_memory() -> int:
    """Return the largest resident memory of this process so far, bytes."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
