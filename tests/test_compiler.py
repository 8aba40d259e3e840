"""The recipes that ship, planned offline, against the figures of the literature."""

from pathlib import Path

import pytest

from kroncc.compiler import compile_recipe
from kroncc.errors import KronccError
from kroncc.plan.stages import Plan
from kroncc.recipe.loader import load_recipe

RECIPES = Path(__file__).parents[1] / "recipes"
LINEAR_MAPS_DENSE = 12 * (4 * 2 * 768 * 768 + 2 * 2 * 768 * 3072) * 128


def planned(name: str) -> Plan:
    return compile_recipe(load_recipe(RECIPES / name), offline=True)


def layer_params(plan: Plan, layer: int) -> int:
    rows = plan.models["factored"].modules
    return sum(row.after.params for row in rows if f".layer.{layer}." in row.fqn)


@pytest.mark.long
@pytest.mark.parametrize(
    ("recipe", "params", "layer", "giga"),
    [
        ("kroneckerbert-8.yaml", 14_655_754, 894_768, 5.492),
        ("kroneckerbert-21.yaml", 5_229_810, 231_360, 1.416),
    ],
)
def test_kroneckerbert_has_the_sizes_of_the_paper(recipe, params, layer, giga):
    plan = planned(recipe)
    base, factored = plan.models["base"], plan.models["factored"]
    assert base.params == 109_483_778
    assert base.flops.linear == LINEAR_MAPS_DENSE
    assert factored.params == params
    assert [layer_params(plan, index) for index in range(12)] == [layer] * 12
    assert round(factored.flops.linear / 1e9, 3) == giga
    assert all(plan.expectations.values())
    assert factored.skipped == ()
    assert len([s for s in plan.stages if s.kind == "train"]) == 1 + 2 * 6
    assert plan.sources["model"] is None


@pytest.mark.long
def test_krony_gpt2_factors_both_ffn_maps_of_every_layer():
    plan = planned("krony-gpt2.yaml")
    base, factored = plan.models["base"], plan.models["factored"]
    assert base.params == 124_439_808
    changed = [row for row in factored.modules if row.passes]
    assert len(changed) == 24
    assert {row.role for row in changed} == {"ffn.up", "ffn.down"}
    saved = 12 * 2 * (768 * 3072 - (768 * 1536 + 2))
    assert factored.params == base.params - saved


@pytest.mark.long
def test_the_same_recipe_gives_the_same_plan_byte_for_byte():
    assert planned("krony-gpt2.yaml").to_json() == planned("krony-gpt2.yaml").to_json()


@pytest.mark.parametrize(
    ("change", "code", "path"),
    [
        ("model.source=no/such/place", "K501", "model.source"),
        ("model.source=.", "K501", "model.source"),  # a directory without a model
        ("model.source=package:no_such_package/x", "K502", "model.source"),
        ("model.config.model_type=whisper", "K513", "model.task"),
    ],
)
def test_an_error_that_an_override_made_says_so(tmp_path, change, code, path):
    (tmp_path / "recipe.yaml").write_text(
        "kroncc: 1\nname: x\nmodel: {config: {model_type: bert}, source: null, task: text-classification}\n"
        "steps: {out: {export: {model: base}}}\n"
    )
    task = ["model.task=fill-mask"] if code == "K513" else ["model.config=null"]
    loaded = load_recipe(tmp_path / "recipe.yaml", overrides=[*task, change])
    with pytest.raises(KronccError) as caught:
        compile_recipe(loaded, offline=True)
    (problem,) = caught.value.problems
    assert (problem.code, problem.path) == (code, path)
    assert problem.place is not None
    assert problem.place.file == f"--set {task[0] if code == 'K513' else change}"
