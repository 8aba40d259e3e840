"""The resolved recipe, written out, reads as the same recipe."""

from pathlib import Path

import pytest
import yaml

from kroncc.recipe.loader import load_recipe
from kroncc.recipe.written import as_written
from kroncc.rewrite.registry import schemas

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_round_trip(path: Path, tmp_path: Path):
    recipe = load_recipe(path, passes=schemas()).recipe
    copy = tmp_path / "copy.yaml"
    copy.write_text(yaml.safe_dump(as_written(recipe), sort_keys=False))
    assert load_recipe(copy, passes=schemas()).recipe == recipe


def test_there_are_recipes():
    assert len(RECIPES) >= 5
