"""`kroncc schema`: the JSON Schema of recipe files."""

from __future__ import annotations

import json

import typer


def schema() -> None:
    """Print the JSON Schema of recipes, with the options of every installed pass.

    An editor with YAML support then completes and checks recipes: save it as recipe.schema.json and begin a
    recipe with "# yaml-language-server: $schema=recipe.schema.json".
    """
    from kroncc.recipe.document import recipe_schema
    from kroncc.rewrite.registry import schemas

    typer.echo(json.dumps(recipe_schema(schemas()), indent=1))
