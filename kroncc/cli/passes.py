"""`kroncc passes`: what is installed, explained from docstrings and fields."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer


def passes(
    name: Annotated[
        str | None, typer.Argument(help="the pass to explain; without it, all are listed")
    ] = None,
) -> None:
    """List the installed passes, or explain one: what it does, and its options."""
    from kroncc.rewrite.registry import get_pass, pass_names, pass_schema

    if name is None:
        rows = [(one, _summary(pass_schema(one)), entry.owner) for one, entry in sorted(pass_names().items())]
        width = max((len(one) for one, _, _ in rows), default=0)
        for one, summary, owner in rows:
            typer.echo(f"{one:<{width}}  {summary}  [{owner}]")
        return
    schema = pass_schema(name)
    owner = entry.owner if (entry := pass_names().get(name)) else get_pass(name).__module__
    typer.echo(f"{name}  [{owner}]\n\n{inspect.cleandoc(schema.get('description', ''))}\n\nOptions")
    typer.echo(_options(schema))


def _summary(schema: Mapping[str, Any]) -> str:
    text = " ".join(schema.get("description", "").split("\n\n")[0].split())
    return text.split(". ")[0].removesuffix(".") + "." if text else ""


def _options(schema: Mapping[str, Any]) -> str:
    from kroncc.recipe.schema import Scope
    from kroncc.recipe.shape import describe

    scope = Scope.model_json_schema()
    rows = []
    for root in (schema, scope):
        required = root.get("required", ())
        for key, part in root.get("properties", {}).items():
            default = json.dumps(part["default"]) if "default" in part else "none"
            rest = "required" if key in required else f"default {default}"
            rows.append((key, f"{describe(part, root)}; {rest}", part.get("description", "")))
    width = max(len(key) for key, _, _ in rows)
    lines = []
    for key, kind, note in rows:
        lines.append(f"  {key:<{width}}  {kind}")
        if note:
            lines.append(f"  {'':<{width}}  {note}")
    return "\n".join(lines)
