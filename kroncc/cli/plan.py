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
    """
    from kroncc.quiet import quiet_libraries

    with quiet_libraries():
        from kroncc.compiler import compile_recipe
        from kroncc.recipe.loader import load_recipe
        from kroncc.rewrite.registry import schemas

        loaded = load_recipe(recipe, overrides=tuple(overrides or ()), passes=schemas())
        compiled = compile_recipe(loaded, offline=dry_run)
    _show(compiled, format_)
    if dry_run:
        return
    target = output or Path("runs") / compiled.name / "plan.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    saved = compiled.saved_in(target.parent, recipe, tuple(overrides or ()))
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.write_text(saved.to_json(), encoding="utf-8")
    temporary.replace(target)
    typer.echo(f"plan saved: {target}", err=True)


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
