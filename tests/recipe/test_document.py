import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from kroncc.errors import RecipeError
from kroncc.recipe.codes import CODES
from kroncc.recipe.document import recipe_schema
from kroncc.recipe.loader import load_recipe
from kroncc.rewrite.registry import schemas

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def validator():
    schema = recipe_schema(schemas())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_ready_made_recipes_fit(validator):
    files = sorted((ROOT / "recipes").rglob("*.yaml"))
    assert len(files) >= 5
    for file in files:
        validator.validate(yaml.safe_load(file.read_text()))


RECIPE = """
kroncc: 1
name: a
model: {source: x}
data: {d: {source: text, files: x}}
steps:
  small: {compress: {model: base, passes: [{kronecker: {targets: "@ffn", ratio: 4}}]}}
  "task-${t}":
    for_each: {t: [a, b]}
    distill: {student: small, teacher: base, data: d, epochs: 1, losses: [task, {kl: }, {mse: {at: hidden}}]}
"""


def test_short_forms_fit(validator, tmp_path: Path):
    validator.validate(yaml.safe_load(RECIPE))
    validator.validate({"extends": "other.yaml"})


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("name: a", "nme: a"),
        ("kroncc: 1", "kroncc: 2"),
        ("kroncc: 1", ""),
        ("source: x", "sorce: x"),
        ("{d: {", "{d.e: {"),
        ("source: text", "kind: text"),
        ("compress:", "compres:"),
        ("kronecker:", "kroneker:"),
        ("ratio: 4", "ratio: four"),
        ("ratio: 4", "ration: 4"),
        ('targets: "@ffn"', "targets: 3"),
        ("[a, b]", "a"),
        ("epochs: 1", "epochs: one"),
        ("task, {", "tsk, {"),
        ("at: hidden", "at: 3"),
        ("mse: {at", "mse: {temperature"),
    ],
)
def test_what_an_editor_refuses_so_does_the_loader(validator, tmp_path: Path, old: str, new: str):
    text = RECIPE.replace(old, new, 1)
    assert text != RECIPE
    assert not validator.is_valid(yaml.safe_load(text))
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError):
        load_recipe(file, passes=schemas())


def test_every_code_is_described():
    sources = [*(ROOT / "kroncc" / "recipe").glob("*.py"), ROOT / "kroncc" / "rewrite" / "registry.py"]
    assert len(sources) > 10
    used = {code for file in sources for code in re.findall(r'"(K\d\d\d)"', file.read_text())}
    assert used - {"K100"} == set(CODES)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("ratio: 4", 'ratio: "${t}"'),
        ("epochs: 1", 'epochs: "${t}"'),
        ("task, {", '{kl: {temperature: "${t}"}}, {'),
        ("losses", 'precision: "${t}", learning_rate: "${t}", cache_teacher: "${t}", losses'),
        ("task, {", '"${t}", {'),
    ],
)
def test_variables_stand_for_numbers_and_words(validator, old: str, new: str):
    validator.validate(yaml.safe_load(RECIPE.replace(old, new, 1)))


@pytest.mark.parametrize(
    ("old", "new"), [("ratio: 4", 'ratio: "${t}0"'), ("max_length: 8", 'max_length: "${t}"')]
)
def test_variables_only_where_they_mean_something(validator, old: str, new: str):
    text = RECIPE.replace("files: x", "files: x, max_length: 8")
    validator.validate(yaml.safe_load(text))
    assert not validator.is_valid(yaml.safe_load(text.replace(old, new, 1)))


def test_options_that_exclude_each_other(validator):
    for options in ("ratio: 4, params: 9", "", "a: null"):
        given = yaml.safe_load(RECIPE.replace("ratio: 4", options, 1))
        assert not validator.is_valid(given), options
    validator.validate(yaml.safe_load(RECIPE.replace("ratio: 4", "ratio: 4, a: null", 1)))


def test_every_reference_is_defined(validator):
    text = json.dumps(validator.schema)
    assert set(re.findall(r'"#/\$defs/([^"]+)"', text)) <= validator.schema["$defs"].keys()


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("passes: [", "passes: [3, "),
        ("model: base, ", "model: base, calibrate: {data: d, row: 4}, "),
        ("student: small, ", "student: small, during: [{kroneker: }], "),
    ],
)
def test_what_lies_deeper_is_checked(validator, good: str, bad: str):
    assert not validator.is_valid(yaml.safe_load(RECIPE.replace(good, bad, 1)))
    fine = RECIPE.replace("model: base, ", "model: base, calibrate: {data: d, rows: 4}, ", 1)
    fine = fine.replace("student: small, ", "student: small, during: [{kronecker: {ratio: 4}}], ", 1)
    validator.validate(yaml.safe_load(fine))
