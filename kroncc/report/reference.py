"""What a pass says of itself, from docstring and fields: for the terminal and for the reference pages."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kroncc.recipe.schema import Scope
from kroncc.recipe.shape import describe

Schema = Mapping[str, Any]


@dataclass(frozen=True)
class Option:
    """One option of a pass: its type, what it is without one, and what it does."""

    name: str
    type: str
    default: str  # JSON; "required" or "none" where there is no default
    note: str


def summary(schema: Schema) -> str:
    """Return the first sentence of a pass's docstring."""
    text = " ".join(schema.get("description", "").split("\n\n")[0].split())
    return text.split(". ")[0].removesuffix(".") + "." if text else ""


def options(schema: Schema) -> list[Option]:
    """Return the options of a pass, its own first, then the targets that every pass takes."""
    found = []
    for root in (schema, Scope.model_json_schema()):
        required = root.get("required", ())
        for key, part in root.get("properties", {}).items():
            usual = json.dumps(part["default"]) if part.get("default") is not None else "none"
            default = "required" if key in required else usual
            found.append(Option(key, describe(part, root), default, part.get("description", "")))
    return found


def text_page(name: str, owner: str, schema: Schema) -> str:
    """Return the page of a pass for a terminal."""
    rows = options(schema)
    width = max(len(row.name) for row in rows)
    lines = []
    for row in rows:
        rest = row.default if row.default == "required" else f"default {row.default}"
        lines.append(f"  {row.name:<{width}}  {row.type}; {rest}")
        lines += [f"  {'':<{width}}  {row.note}"] if row.note else []
    said = inspect.cleandoc(schema.get("description", ""))
    return f"{name}  [{owner}]\n\n{said}\n\nOptions\n" + "\n".join(lines)


def markdown_page(name: str, schema: Schema) -> str:
    """Return the reference page of a pass in Markdown."""
    lines = [f"# {name}", "", inspect.cleandoc(schema.get("description", "")), "", "## Options", ""]
    lines += ["| option | type | default | |", "|---|---|---|---|"]
    lines += [
        f"| `{row.name}` | {_cell(row.type)} | {_cell(row.default)} | {_cell(row.note)} |"
        for row in options(schema)
    ]
    return "\n".join(lines) + "\n"


def markdown_index(schemas: Mapping[str, Schema]) -> str:
    """Return the page that lists all passes, each with its first sentence and a link to its page."""
    lines = [
        "# Passes",
        "",
        "Made from the docstrings and fields of the passes; `kroncc passes NAME` shows the same.",
        "",
    ]
    lines += ["| pass | |", "|---|---|"]
    lines += [
        f"| [`{name}`]({name}.md) | {_cell(summary(schema))} |" for name, schema in sorted(schemas.items())
    ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
