"""Walk the plan: skip what is finished, hand the rest to the handlers, judge expectations early."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

from kroncc.errors import Problem, RunError
from kroncc.plan.dag import until as stages_until
from kroncc.plan.stages import Plan, Stage, costs
from kroncc.recipe.expect import parse_expectation
from kroncc.run.accelerators import is_main_process, wait_for_everyone
from kroncc.run.context import Context
from kroncc.run.failures import explained
from kroncc.run.files import writing
from kroncc.run.handlers import HANDLERS, Outcome
from kroncc.run.journal import Journal
from kroncc.run.progress import JournalReporter, NullReporter, Reporter
from kroncc.run.store import RunStore, StageRecord


@dataclass(frozen=True)
class RunResult:
    """What a run gave: every known value (`MODEL.metric`), and the stages that ran or were skipped."""

    values: dict[str, float]
    finished: tuple[str, ...]
    skipped: tuple[str, ...]


class Unmet(RunError):
    """An expectation is unmet or cannot be judged; `result` is what the run gave until then."""

    result: RunResult


def execute(
    plan: Plan,
    directory: Path,
    recipe_root: Path,
    *,
    until: str | None = None,
    fresh: bool = False,
    reporter: Reporter | None = None,
) -> RunResult:
    """Run `plan` in `directory` and return its values.

    `recipe_root` is the folder that the recipe's relative paths start from. `until` names the last step to
    run; `fresh` runs finished stages again, from their start. Under `accelerate launch` every process calls
    this; one of them writes, and training is spread over all.

    Raises `RunError`: K801 directory in use, K802-K804 not writable, K810 interrupted, K813 out of memory,
    and what the stages raise; `Unmet`: K820 an expectation is unmet, K821 one that cannot be judged.
    """
    stages = stages_until(plan.stages, until)
    store = RunStore(directory)
    with _opened(store, plan, reporter or NullReporter()) as heard:
        run = _Run(Context(plan, store, recipe_root, heard), fresh)
        run.judge()
        for stage in stages:
            run.stage(stage)
            run.judge()
        run.judge(last=until is None)
        return run.result()


@contextmanager
def _opened(store: RunStore, plan: Plan, reporter: Reporter) -> Iterator[Reporter]:
    """Lock the directory and open its journal, in the main process; the others wait for that."""
    if not is_main_process():
        wait_for_everyone()
        yield NullReporter()
        return
    with store.locked():
        store.write_plan(plan)
        with writing(store.directory):
            journal = Journal(store.journal)
        journal.write("run_started", plan=plan.name, versions=plan.versions)
        wait_for_everyone()
        try:
            yield JournalReporter(reporter, journal)
            journal.write("run_finished")
        except BaseException as error:
            with suppress(OSError):  # a full disk must not hide what went wrong
                journal.write("run_failed", error=f"{type(error).__name__}: {error}")
            raise
        finally:
            reporter.close()
            with suppress(OSError):
                journal.close()


@dataclass
class _Run:
    context: Context
    fresh: bool
    finished: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    values: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, report in self.context.plan.models.items():
            if report.settled:
                self.values |= costs(name, report)

    def result(self) -> RunResult:
        """Return what the run has given so far."""
        return RunResult(self.values, tuple(self.finished), tuple(self.skipped))

    def stage(self, stage: Stage) -> None:
        """Run one stage, or take over what it left."""
        reporter = self.context.reporter
        record = None if self.fresh else self._left(stage)
        wait_for_everyone()  # nobody may commit before all have looked
        if record is not None:
            reporter.stage_skipped(stage.name, "finished in an earlier run")
            self.skipped.append(stage.name)
        else:
            reporter.stage_started(stage.name, stage.kind, stage.steps)
            record = self._work(stage)
            reporter.stage_finished(stage.name, _short(record), record.seconds)
            self.finished.append(stage.name)
        for name, value in record.values.items():
            # of two evaluations of one model and metric, the first gives the short name
            self.values.setdefault(name, value)

    def _left(self, stage: Stage) -> StageRecord | None:
        """Return what the stage left if it is finished and its files are as it wrote them."""
        record = self.context.store.record(stage)
        changed = self.context.store.changed(record) if record else None
        if changed is None:
            return record
        self.context.reporter.message(f"{stage.name}: {changed} was changed afterwards; the step runs again")
        return None

    def judge(self, last: bool = False) -> None:
        """Raise `Unmet`: K820 for expectations that known values break, K821 at the end for unknown ones."""
        problems = []
        for key, text in self.context.recipe.expect.items():
            expectation = parse_expectation(key, text)
            met = expectation.evaluate(self.values)
            if met is False:
                said = f"expectation unmet: {expectation.describe(self.values)}"
                problems.append(Problem("K820", said, path=f"expect.{key}"))
            elif met is None and last:
                said = f"expectation not judged: {expectation.describe(self.values)}"
                remedy = "add an evaluate step that measures it, or correct its name"
                problems.append(Problem("K821", said, path=f"expect.{key}", remedy=remedy))
        if problems:
            error = Unmet(problems=problems)
            error.result = self.result()
            raise error

    def _work(self, stage: Stage) -> StageRecord:
        store, main = self.context.store, is_main_process()
        if self.fresh and main:
            shutil.rmtree(store.checkpoints(stage.name), ignore_errors=True)
        started = time.monotonic()
        with explained(stage, store), store.staging(stage.name) if main else nullcontext() as path:
            outcome = self._handle(stage, path)
            if path is not None:
                store.commit(path, _record(stage, outcome, time.monotonic() - started))
            wait_for_everyone()
        record = store.record(stage)
        assert record is not None  # it was committed just now
        return record

    def _handle(self, stage: Stage, path: Path | None) -> Outcome:
        handler = HANDLERS.get(stage.kind)
        if handler is None:
            raise RunError(
                f"step {stage.name!r} is of the kind {stage.kind!r}, which this kroncc cannot run",
                code="K822",
                remedy="plan the recipe again with this version",
            )
        return handler(self.context, stage, path)


def _short(record: StageRecord) -> dict[str, float]:
    """Return the values without those that repeat another under the name of an evaluate step."""
    repeats = f"{record.name}." if record.kind == "evaluate" else "\0"
    return {name: value for name, value in record.values.items() if not name.startswith(repeats)}


def _record(stage: Stage, outcome: Outcome, seconds: float) -> StageRecord:
    return StageRecord(
        name=stage.name,
        kind=stage.kind,
        hash=stage.hash,
        seconds=round(seconds, 3),
        values=outcome.values,
        details=outcome.details,
        model=outcome.model,
        model_files=outcome.model_files,
    )
