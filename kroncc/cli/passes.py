"""`kroncc passes`: what is installed, explained from docstrings and fields."""

from __future__ import annotations

from typing import Annotated

import typer


def passes(
    name: Annotated[
        str | None, typer.Argument(help="the pass to explain; without it, all are listed")
    ] = None,
) -> None:
    """List the installed passes, or explain one: what it does, and its options."""
    from kroncc.report.reference import summary, text_page
    from kroncc.rewrite.registry import get_pass, pass_names, pass_schema

    if name is None:
        rows = [(one, summary(pass_schema(one)), entry.owner) for one, entry in sorted(pass_names().items())]
        width = max((len(one) for one, _, _ in rows), default=0)
        for one, about, owner in rows:
            typer.echo(f"{one:<{width}}  {about}  [{owner}]")
        return
    schema = pass_schema(name)
    owner = entry.owner if (entry := pass_names().get(name)) else get_pass(name).__module__
    typer.echo(text_page(name, owner, schema))
