"""What `kroncc apply` shows while it runs: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn

from kroncc.run.progress import Step

LINE_SECONDS = 10.0


class ConsoleReporter:
    """Shows stages, steps and messages on a console (standard output by default)."""

    def __init__(self, console: Console | None = None, line_seconds: float = LINE_SECONDS) -> None:
        self.console = console or Console(soft_wrap=True, highlight=False)
        self._line_seconds = line_seconds
        self._last_line = 0.0
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def stage_started(self, stage: str, kind: str, total: int | None) -> None:
        """Announce a stage."""
        steps = f", {total:,} steps" if total else ""
        self._say(f"{stage}: {kind}{steps}")
        self._last_line = 0.0
        if self.console.is_terminal:
            self._open_bar(total)

    def stage_skipped(self, stage: str, reason: str) -> None:
        """Say that a stage need not run, and why."""
        self._say(f"{stage}: skipped, {reason}")

    def step(self, stage: str, step: Step) -> None:
        """Move the bar, or print a line every few seconds and after the last step."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step.step, total=step.total, description=describe(step))
            return
        now = time.monotonic()
        if now - self._last_line >= self._line_seconds or step.step == step.total:
            self._last_line = now
            self._say(f"{stage}: step {step.step:,}/{step.total:,}  {describe(step)}")

    def stage_finished(self, stage: str, values: Mapping[str, float], seconds: float) -> None:
        """Close the bar and show what the stage measured."""
        self.close()
        shown = "".join(f"\n  {name} = {_number(value)}" for name, value in values.items())
        self._say(f"{stage}: done in {duration(seconds)}{shown}")

    def message(self, text: str) -> None:
        """Print a message above the bar."""
        self._say(text)

    def close(self) -> None:
        """Take the bar off the screen; the console is as it was."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    def _open_bar(self, total: int | None) -> None:
        self.close()
        columns = (SpinnerColumn(), BarColumn(), TextColumn("{task.completed}/{task.total}")) if total else ()
        self._bar = Progress(
            *(columns or (SpinnerColumn(),)),
            TextColumn("{task.description}", markup=False),
            console=self.console,
            transient=True,
        )
        self._task = self._bar.add_task("", total=total)
        self._bar.start()


def describe(step: Step) -> str:
    """Return the figures of a step in one line."""
    return (
        f"loss {step.loss:.4g}  lr {step.learning_rate:.2e}  {step.rows_per_second:,.1f} rows/s  "
        f"{duration(step.seconds_left)} left  peak {step.peak_bytes / 2**20:,.0f} MiB"
    )


def duration(seconds: float) -> str:
    """Return a time as people say it: 8.2 s, 3:05 min, 2:10 h."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d} min"
    return f"{minutes // 60}:{minutes % 60:02d} h"


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) >= 100 else f"{value:.4f}"
