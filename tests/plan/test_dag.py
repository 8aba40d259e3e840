import pytest

from kroncc.errors import PlanError
from kroncc.plan.dag import order, until
from kroncc.plan.stages import Stage


def stage(name: str, *needs: str) -> Stage:
    return Stage(name=name, kind="train", needs=needs, options={}, hash=name)


def test_order_puts_needs_first_and_keeps_the_given_order_else():
    assert order({"c": ["a"], "b": [], "a": []}) == ["b", "a", "c"]


def test_a_cycle_is_shown():
    with pytest.raises(PlanError, match=r"a -> b -> a|b -> a -> b"):
        order({"a": ["b"], "b": ["a"]})


def test_until_keeps_ancestors_only():
    stages = (stage("t"), stage("f"), stage("g", "f", "t"), stage("x", "g"), stage("other"))
    assert [s.name for s in until(stages, "g")] == ["t", "f", "g"]
    assert until(stages, None) == stages


def test_until_an_unknown_step_names_the_nearest():
    with pytest.raises(PlanError, match="did you mean 'general'"):
        until((stage("general"),), "genral")
