"""The command line: a table of verbs, each imported only when it is asked for."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from kroncc.errors import KronccError

INTERRUPTED = 130  # exit code of Ctrl-C outside of a stage
VERBS: dict[str, tuple[str, str]] = {  # verb -> ("module:function", one line)
    "validate": ("kroncc.cli.validate:validate", "Check recipes: keys, names, options, the graph of steps."),
    "plan": ("kroncc.cli.plan:plan", "Compile a recipe and show what it would do."),
    "apply": ("kroncc.cli.apply:apply", "Run a recipe or a saved plan; goes on where it stopped."),
    "passes": ("kroncc.cli.passes:passes", "List the installed passes, or explain one."),
    "schema": ("kroncc.cli.schema:schema", "Print the JSON Schema of recipes, for editors."),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors of `kroncc.errors` are printed without a traceback."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        app_for(given)(given, prog_name="kroncc")
    except KronccError as error:
        typer.echo(str(error), err=True)
        return error.exit_code
    except SystemExit as leaving:
        if leaving.code == INTERRUPTED:  # typer has caught the KeyboardInterrupt
            return _interrupted()
        return leaving.code if isinstance(leaving.code, int) else 0
    except KeyboardInterrupt:
        return _interrupted()
    except Exception as error:
        return _fault(error)
    return 0


def _interrupted() -> int:
    typer.echo("interrupted; nothing is lost: run the same command again", err=True)
    return INTERRUPTED


def _fault(error: Exception) -> int:
    """Report a fault of kroncc itself: one line, and the traceback in a file to send along."""
    if os.environ.get("KRONCC_DEBUG"):
        raise error
    with tempfile.NamedTemporaryFile("w", prefix="kroncc-", suffix=".log", delete=False) as log:
        traceback.print_exception(error, file=log)
    typer.echo(f"K999: this is a fault of kroncc: {type(error).__name__}: {error}", err=True)
    typer.echo(f"  remedy:   report it with {log.name}", err=True)
    return 1


def app_for(arguments: Sequence[str]) -> typer.Typer:
    """Return the app with the function of the verb in `arguments` loaded, the other verbs as names only."""
    app = typer.Typer(
        name="kroncc",
        help="Compile compression recipes of transformer models.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback()(_options)
    asked = next((word for word in arguments if not word.startswith("-")), None)
    for verb, (target, summary) in VERBS.items():
        if verb == asked:
            app.command(verb)(_load(target))
        else:
            app.command(verb, help=summary)(_not_asked)
    return app


def _load(target: str) -> Callable[..., Any]:
    module, _, name = target.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def _not_asked() -> None:
    """Stand in for a verb that this call does not ask for."""


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kroncc {importlib.metadata.version('kroncc')}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Compile compression recipes of transformer models."""
