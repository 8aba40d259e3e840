"""`kroncc plan`: compile a recipe and show what it would do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a recipe value")
]


def plan(
    recipe: Annotated[Path, typer.Argument(help="recipe file")],
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="write nothing; a model or data out of reach is noted, not refused"),
    ] = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="where the plan is saved")] = None,
    format_: Annotated[Literal["text", "json", "mermaid"], typer.Option("--format")] = "text",
    overrides: Overrides = None,
) -> None:
    """Compile a recipe on meta tensors: shapes, parameters, FLOPs, stages. Reads no weights.

    Without --dry-run the plan is saved (default runs/NAME/plan.json), and `kroncc apply plan.json` runs it.
    Exit codes: 0 done; 1 an expectation is unmet; 2 the recipe is wrong.
    """
    from kroncc.quiet import quiet_libraries

    with quiet_libraries():
        from kroncc.compiler import compile_recipe
        from kroncc.plan.saved import write_plan
        from kroncc.recipe.loader import load_recipe
        from kroncc.rewrite.registry import schemas

        loaded = load_recipe(recipe, overrides=tuple(overrides or ()), passes=schemas())
        run = Path("runs") / loaded.recipe.name
        compiled = compile_recipe(loaded, offline=dry_run, directory=run)
    _show(compiled, format_)
    unmet = False in compiled.expectations.values()
    if dry_run:
        raise typer.Exit(1 if unmet else 0)
    target = output or Path("runs") / compiled.name / "plan.json"
    saved = compiled.saved_in(target.parent, recipe, tuple(overrides or ()))
    write_plan(saved, target)
    typer.echo(f"plan saved: {target}", err=True)
    if unmet:
        raise typer.Exit(1)


def _show(compiled: object, format_: str) -> None:
    from kroncc.cli.console import console
    from kroncc.plan.render import mermaid, render
    from kroncc.plan.stages import Plan

    assert isinstance(compiled, Plan)
    if format_ == "json":
        typer.echo(compiled.to_json(), nl=False)
    elif format_ == "mermaid":
        typer.echo(mermaid(compiled), nl=False)
    else:
        console().print(render(compiled))
