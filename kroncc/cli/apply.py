"""`kroncc apply`: compile a recipe or take a saved plan, and run it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kroncc.cli.plan import Overrides

if TYPE_CHECKING:
    from kroncc.cli.reporter import ConsoleReporter
    from kroncc.plan.stages import Plan
    from kroncc.run.executor import RunResult


def apply(
    recipe: Annotated[Path, typer.Argument(help="recipe file, or a plan saved by `kroncc plan`")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="run directory, default runs/NAME")
    ] = None,
    until: Annotated[str | None, typer.Option(help="stop after this step")] = None,
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="run finished stages again")] = False,
) -> None:
    """Run a recipe stage by stage. Finished stages are skipped; an interrupted one goes on where it was.

    Ctrl-C and SIGTERM write a checkpoint in training. Exit codes: 0 done; 1 a stage failed or was
    interrupted, or an expectation is unmet; 2 the recipe is wrong; 130 interrupted outside of a stage.
    """
    from kroncc.quiet import quiet_libraries
    from kroncc.run.interrupt import terminable

    with quiet_libraries(), terminable():
        from kroncc.cli.reporter import ConsoleReporter
        from kroncc.run.executor import Unmet, execute

        plan, root = _plan(recipe, tuple(overrides or ()), output)
        directory = _directory(output, plan.name)
        if recipe.suffix != ".json":
            plan = plan.saved_in(directory, recipe, tuple(overrides or ()))
        reporter = ConsoleReporter()
        _say_notes(plan, reporter)
        try:
            result = execute(plan, directory, root, until=until, fresh=fresh, reporter=reporter)
        except Unmet as error:
            _show(plan, error.result, directory)
            raise
        _show(plan, result, directory)


def _say_notes(plan: Plan, reporter: ConsoleReporter) -> None:
    from kroncc.plan.notes import notes
    from kroncc.run.accelerators import is_main_process

    for note in notes(plan) if is_main_process() else ():
        reporter.message(f"note: {note}")


def _show(plan: Plan, result: RunResult, directory: Path) -> None:
    """Print the closing table and where the results are, in one process, where a stage gave any."""
    from kroncc.cli.console import console
    from kroncc.plan.notes import notes
    from kroncc.report.tables import closing_table
    from kroncc.run.accelerators import is_main_process

    if not is_main_process() or not (result.finished or result.skipped):
        return
    out = console()
    out.print(closing_table(plan, result.values))
    for note in notes(plan):
        out.print(f"note: {note}", markup=False)
    out.print(f"results: {directory}", markup=False)


def _directory(output: Path | None, name: str) -> Path:
    return output or Path("runs") / name


def _plan(path: Path, overrides: tuple[str, ...], output: Path | None) -> tuple[Plan, Path]:
    """Return the plan to run and the directory that data files are relative to."""
    from kroncc.compiler import compile_recipe
    from kroncc.errors import PlanError
    from kroncc.plan.saved import check_fresh, read_plan
    from kroncc.recipe.loader import load_recipe
    from kroncc.rewrite.registry import schemas

    if path.suffix != ".json":
        loaded = load_recipe(path, overrides=overrides, passes=schemas())
        directory = _directory(output, loaded.recipe.name)
        return compile_recipe(loaded, directory=directory), loaded.path.parent
    if overrides:
        raise PlanError(
            "a saved plan takes no --set", code="K724", remedy="apply the recipe, or plan it again"
        )
    saved = read_plan(path)
    recipe = path.parent / saved.file if saved.file else None
    if recipe is None or not recipe.exists():
        raise PlanError(
            f"the recipe of this plan is gone: {saved.file}",
            code="K725",
            remedy="a plan is checked against its recipe before it runs; put it back or plan again",
        )
    loaded = load_recipe(recipe, overrides=saved.overrides, passes=schemas())
    check_fresh(saved, compile_recipe(loaded, directory=_directory(output, saved.name)))
    return saved, loaded.path.parent
