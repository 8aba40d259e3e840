import pytest

from kroncc.errors import PlanError
from kroncc.plan.saved import check_fresh, differences, read_plan
from kroncc.plan.stages import Flops, ModelReport, Plan, Stage


def plan(**changes: object) -> Plan:
    report = ModelReport(params=6, bytes=24, flops=Flops(linear=12, total=12))
    fields: dict[str, object] = {
        "name": "x",
        "recipe": {"steps": {"t": {"epochs": 1}}},
        "length": 8,
        "versions": {"kroncc": "1"},
        "sources": {"data.a": "11"},
        "stages": (Stage(name="t", kind="train", needs=(), options={}, hash="1"),),
        "models": {"base": report},
    }
    return Plan.model_validate(fields | changes)


def test_a_plan_survives_the_file(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(plan().to_json())
    assert read_plan(path) == plan()


def test_steps_and_models_keep_their_order(tmp_path):
    report = plan().models["base"]
    made = plan(models={"base": report, "small": report, "a": report}, expectations={"z": None, "b": True})
    path = tmp_path / "plan.json"
    path.write_text(made.to_json())
    assert list(read_plan(path).models) == ["base", "small", "a"]
    assert list(read_plan(path).expectations) == ["z", "b"]


def test_the_same_plan_gives_the_same_bytes():
    assert plan().to_json() == plan().to_json()


@pytest.mark.parametrize(
    ("text", "code"), [("{", "K720"), ("[]", "K721"), ('{"kroncc": 2}', "K721"), ('{"kroncc": 1}', "K722")]
)
def test_what_is_no_plan_is_refused(tmp_path, text, code):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(PlanError) as caught:
        read_plan(path)
    assert caught.value.problems[0].code == code


def test_differences_name_the_place():
    assert list(differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "c": 2})) == ["a.b: 1 -> 3"]


def test_a_stale_plan_says_what_changed():
    check_fresh(plan(), plan())
    with pytest.raises(PlanError, match=r"sources\.data\.a: \"11\" -> \"22\""):
        check_fresh(plan(), plan(sources={"data.a": "22"}))
    with pytest.raises(PlanError, match=r"recipe\.steps\.t\.epochs: 1 -> 2"):
        check_fresh(plan(), plan(recipe={"steps": {"t": {"epochs": 2}}}))
