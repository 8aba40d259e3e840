from pathlib import Path

import pytest

from kroncc.errors import RecipeError
from kroncc.recipe.compose import as_mapping, merge, override, parse_override, read_extended
from kroncc.recipe.reader import read_file, read_yaml


def node(text: str):
    return read_yaml(text, "r.yaml")


def extended(path: Path):
    return read_extended(as_mapping(read_yaml(read_file(path), str(path))), path, str(path))


def test_merge_joins_mappings_and_replaces_the_rest():
    found = merge(node("{a: {b: 1, c: [1, 2]}, d: 1}"), node("{a: {c: [3], e: 4}, d: {f: 5}}"))
    assert found.plain() == {"a": {"b": 1, "c": [3], "e": 4}, "d": {"f": 5}}


def test_extends_is_relative_and_keeps_places(tmp_path: Path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "top.yaml").write_text("name: top\ndata: {a: {x: 1}}\n")
    (tmp_path / "base" / "mid.yaml").write_text("extends: top.yaml\nname: mid\n")
    (tmp_path / "r.yaml").write_text("extends: base/mid.yaml\ndata: {b: 2}\n")
    root = extended(tmp_path / "r.yaml")
    assert root.plain() == {"name": "mid", "data": {"a": {"x": 1}, "b": 2}}
    assert str(root.children["name"].place).endswith("base/mid.yaml:2:7")
    assert str(root.children["data"].children["a"].key).endswith("base/top.yaml:2:8")
    assert str(root.children["data"].children["b"].key).endswith("r.yaml:2:8")


@pytest.mark.parametrize(
    ("files", "code", "place"),
    [
        ({"r.yaml": "extends: r.yaml"}, "K121", "r.yaml:1:10"),
        ({"r.yaml": "extends: a.yaml", "a.yaml": "x: 1\nextends: r.yaml"}, "K121", "a.yaml:2:10"),
        ({"r.yaml": "extends: missing.yaml"}, "K101", "r.yaml:1:10"),
        ({"r.yaml": "extends: [a.yaml]"}, "K120", "r.yaml:1:10"),
        ({"r.yaml": "extends: 3"}, "K120", "r.yaml:1:10"),
        ({"r.yaml": "extends: a.yaml", "a.yaml": "- 1"}, "K107", "a.yaml:1:1"),
        ({"r.yaml": "extends: a.yaml", "a.yaml": "b: ["}, "K104", "a.yaml:2:1"),
    ],
)
def test_bad_extends(tmp_path: Path, files: dict[str, str], code: str, place: str):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(RecipeError) as caught:
        extended(tmp_path / "r.yaml")
    assert caught.value.problems[0].code == code
    assert str(caught.value.problems[0].place).endswith(place)


def test_a_long_chain_is_refused(tmp_path: Path):
    for number in range(30):
        (tmp_path / f"{number}.yaml").write_text(f"extends: {number + 1}.yaml")
    with pytest.raises(RecipeError, match="too deep"):
        extended(tmp_path / "0.yaml")


RECIPE = """
steps: {task: {distill: {epochs: 5, losses: [{mse: {at: hidden}}]}}, v-1: {x: 1}}
expect: {task.params: "<= 1"}
"""


@pytest.mark.parametrize(
    ("text", "read_back"),
    [
        ("steps.task.distill.epochs=1", lambda r: r["steps"]["task"]["distill"]["epochs"] == 1),
        ("steps.task.distill.epochs = 1e-1", lambda r: r["steps"]["task"]["distill"]["epochs"] == 0.1),
        ("steps.task.distill.clip=null", lambda r: r["steps"]["task"]["distill"]["clip"] is None),
        ("steps.task.distill.losses[0].mse.at=logits", lambda r: _losses(r) == [{"mse": {"at": "logits"}}]),
        ("steps.task.distill.losses[0]={kl: {}}", lambda r: _losses(r) == [{"kl": {}}]),
        ("steps.task.distill.losses=[a, b]", lambda r: _losses(r) == ["a", "b"]),
        ("steps.v-1.x=a=b", lambda r: r["steps"]["v-1"]["x"] == "a=b"),
        ("expect.task.params='>= 2'", lambda r: r["expect"] == {"task.params": ">= 2"}),
        ("expect.new.params='>= 2'", lambda r: r["expect"]["new.params"] == ">= 2"),
        ("name=x", lambda r: r["name"] == "x"),
        ("name=", lambda r: r["name"] == ""),
    ],
)
def test_override(text: str, read_back):
    path, value = parse_override(text)
    assert read_back(override(node(RECIPE), path, value).plain())


def _losses(recipe):
    return recipe["steps"]["task"]["distill"]["losses"]


@pytest.mark.parametrize(
    ("text", "code", "fragment"),
    [
        ("steps.task", "K122", "--set steps.task.distill.epochs=1"),
        ("=3", "K122", "--set"),
        ("steps.tsk.distill.epochs=1", "K123", "did you mean 'task'?"),
        ("step.task.distill.epochs=1", "K123", "did you mean 'steps'?"),
        ("steps.task.distil.epochs=1", "K123", "did you mean 'distill'?"),
        ("steps.task.distill.losses[3].mse.at=x", "K123", "a list of 1"),
        ("steps.task.distill.losses[x]=1", "K123", "a list of 1"),
        ("steps.task.distill.epochs.x=1", "K123", "a whole number"),
        ("steps.task.distill.losses.mse=1", "K123", "a list"),
        ("steps.task[0]=1", "K123", "a mapping"),
        ("steps..task=1", "K123", "there is no ''"),
        ("name=[1", "K104", "not YAML"),
        ("name=@x", "K104", "quotes"),
    ],
)
def test_bad_override(text: str, code: str, fragment: str):
    with pytest.raises(RecipeError) as caught:
        override(node(RECIPE), *parse_override(text))
    assert caught.value.problems[0].code == code
    assert fragment in str(caught.value)
    assert str(caught.value.problems[0].place) == f"--set {text}"
