"""Load a recipe: read, compose, expand, check. All that is wrong is reported at once, each with its place."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kroncc.errors import Place, Problem, RecipeError
from kroncc.recipe.build import Draft, PassSchemas, TooManyProblems, build
from kroncc.recipe.check import check
from kroncc.recipe.compose import apply_overrides, as_mapping, override, parse_override, read_extended
from kroncc.recipe.expand import expand_steps
from kroncc.recipe.node import Node, PlaceMap, place_map
from kroncc.recipe.reader import read_file, read_yaml
from kroncc.recipe.schema import Recipe

__all__ = ["Loaded", "PlaceMap", "load_recipe"]


@dataclass(frozen=True)
class Loaded:
    """A checked recipe, the place of each of its values, the file it came from and that file's text."""

    recipe: Recipe
    places: PlaceMap
    path: Path
    text: str


def load_recipe(
    path: str | Path, *, overrides: Sequence[str] = (), passes: PassSchemas | None = None
) -> Loaded:
    """Return the recipe in the file `path`, with `overrides` (`steps.task.distill.epochs=1`) set.

    `passes` (`kroncc.rewrite.registry.schemas()`) lets pass names and options be checked too; without it they
    are taken as written. Raises `RecipeError` with every problem (K1xx; K2xx of targets, K41x of passes, K6xx
    of data sources), in the order of the file.
    """
    file = Path(path)
    refuse_plan(file)
    text = read_file(file)
    root = read_extended(as_mapping(read_yaml(text, str(path))), file, str(path))
    problems: list[Problem] = []
    root, templates = _compose(root, overrides, problems)
    places = place_map(root)
    draft = Draft(places, passes)
    try:
        build(root, draft)
        check(draft, templates)
    except TooManyProblems:
        problems.append(
            Problem("K199", "there are more problems than these", Place(str(path)), expected="fewer")
        )
    problems += draft.problems
    if problems or draft.model is None:
        raise RecipeError(problems=_in_order(problems))
    return Loaded(_recipe(root, draft), places, file, text)


def refuse_plan(file: Path) -> None:
    """Raise `RecipeError` K115 for a plan that `kroncc plan` saved; it may be larger than a recipe."""
    if file.suffix != ".json":
        return
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return  # reading it as a recipe says what is wrong
    if isinstance(value, dict) and {"stages", "models", "versions"} <= value.keys():
        raise RecipeError(
            "this is a saved plan, not a recipe",
            code="K115",
            place=Place(str(file)),
            expected="the recipe that it was made from",
            remedy=f"`kroncc apply {file}` checks and runs a plan",
        )


def _compose(root: Node, overrides: Sequence[str], problems: list[Problem]) -> tuple[Node, Mapping[str, str]]:
    """Apply overrides and `for_each`. An override that finds no path as written may name an expanded step."""
    parsed = []
    for one in overrides:
        try:
            parsed.append(parse_override(one))
        except RecipeError as error:
            problems += error.problems
    root, left = apply_overrides(root, parsed)
    expanded = expand_steps(root)
    problems += expanded.problems
    root = expanded.root
    for path, value in left:
        try:
            root = override(root, path, value)
        except RecipeError as error:
            problems += error.problems
    return root, expanded.templates


def _recipe(root: Node, draft: Draft) -> Recipe:
    fields = {key: root.children[key].value for key in ("kroncc", "name")}
    return Recipe.model_validate(
        {**fields, "model": draft.model, "data": draft.data, "steps": draft.steps, "expect": draft.expect}
    )


def _in_order(problems: Sequence[Problem]) -> list[Problem]:
    def rank(problem: Problem) -> tuple[bool, str, int, int]:
        place = problem.place or Place("")
        return problem.code == "K199", place.file, place.line, place.column

    return sorted(dict.fromkeys(problems), key=rank)
