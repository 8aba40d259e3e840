"""`kroncc validate`: check recipes without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from kroncc.errors import Problem, RecipeError

Format = Literal["text", "json", "github", "sarif"]
Report = dict[str, tuple[Problem, ...]]


def validate(
    files: Annotated[list[Path], typer.Argument(help="recipe files", metavar="FILE...")],
    format_: Annotated[Format, typer.Option("--format", help="how problems are written")] = "text",
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a recipe value")
    ] = None,
) -> None:
    """Check recipes: keys, types, names, options of passes, the graph of steps. Imports no torch.

    Reads neither models nor data; `kroncc plan` checks the rest. Exit codes: 0 all are valid, 2 one is not.
    """
    from kroncc.recipe.loader import load_recipe
    from kroncc.rewrite.registry import schemas

    passes = schemas()
    report: Report = {}
    for file in files:
        try:
            load_recipe(file, overrides=tuple(overrides or ()), passes=passes)
        except RecipeError as error:
            report[str(file)] = error.problems
        else:
            report[str(file)] = ()
    typer.echo(_FORMATS[format_](report))
    if any(report.values()):
        raise typer.Exit(2)


def _text(report: Report) -> str:
    parts = []
    for file, problems in report.items():
        parts += [str(problem) for problem in problems]
        count = len(problems)
        parts.append(f"{file}: {count} problem{'s' if count > 1 else ''}" if problems else f"{file}: ok")
    return "\n".join(parts)


def _json(report: Report) -> str:
    files = [
        {"file": file, "valid": not problems, "problems": [_as_data(problem) for problem in problems]}
        for file, problems in report.items()
    ]
    return json.dumps({"kroncc": 1, "files": files}, indent=1)


def _as_data(problem: Problem) -> dict[str, Any]:
    place = problem.place
    return {
        "code": problem.code,
        "message": problem.message,
        "file": place.file if place else None,
        "line": place.line if place else None,
        "column": place.column if place else None,
        "path": problem.path,
        "expected": problem.expected,
        "remedy": problem.remedy,
    }


def _github(report: Report) -> str:
    """Return workflow commands of GitHub Actions, which put each problem on its line."""
    return "\n".join(_annotation(file, problem) for file, problems in report.items() for problem in problems)


def _annotation(file: str, problem: Problem) -> str:
    place = problem.place
    where = {"file": place.file if place else file}
    if place and place.line:
        where |= {"line": str(place.line), "col": str(place.column)}
    where["title"] = problem.code
    properties = ",".join(f"{key}={_escaped(value, ':,')}" for key, value in where.items())
    return f"::error {properties}::{_escaped(_sentence(problem))}"


def _escaped(text: str, also: str = "") -> str:
    for letter in "%\r\n" + also:
        text = text.replace(letter, f"%{ord(letter):02X}")
    return text


def _sentence(problem: Problem) -> str:
    parts = [problem.message + (f" (at {problem.path})" if problem.path else "")]
    parts += [f"expected: {problem.expected}"] if problem.expected else []
    parts += [problem.remedy] if problem.remedy else []
    return "\n".join(parts)


def _sarif(report: Report) -> str:
    """Return SARIF 2.1.0, one rule a code."""
    import importlib.metadata
    from urllib.parse import quote

    from kroncc.recipe.codes import CODES

    codes = sorted({*CODES, *(problem.code for problems in report.values() for problem in problems)})
    results = []
    for file, problems in report.items():
        for problem in problems:
            place = problem.place
            physical: dict[str, Any] = {
                "artifactLocation": {"uri": quote(Path(place.file if place else file).as_posix())}
            }
            if place and place.line:
                physical["region"] = {"startLine": place.line, "startColumn": place.column}
            results.append(
                {
                    "ruleId": problem.code,
                    "ruleIndex": codes.index(problem.code),
                    "level": "error",
                    "message": {"text": _sentence(problem)},
                    "locations": [{"physicalLocation": physical}],
                }
            )
    driver = {
        "name": "kroncc",
        "version": importlib.metadata.version("kroncc"),
        "rules": [{"id": code, "shortDescription": {"text": CODES.get(code, code)}} for code in codes],
    }
    run = {"tool": {"driver": driver}, "columnKind": "unicodeCodePoints", "results": results}
    schema = "https://json.schemastore.org/sarif-2.1.0.json"
    return json.dumps({"$schema": schema, "version": "2.1.0", "runs": [run]}, indent=1)


_FORMATS = {"text": _text, "json": _json, "github": _github, "sarif": _sarif}
