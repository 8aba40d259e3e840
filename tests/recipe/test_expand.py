import pytest

from kroncc.recipe.expand import expand_steps
from kroncc.recipe.reader import read_yaml


def expand(text: str):
    return expand_steps(read_yaml(text, "r.yaml"))


def steps(text: str):
    found = expand(text)
    assert not found.problems
    return found.root.plain()["steps"]


def test_names_text_and_keys_are_filled():
    found = steps(
        "steps: {a: {x: 1}, 't-${v}': {for_each: {v: [p, q]}, k: {'${v}': ['${v}.x', 3]}}, z: {x: 2}}"
    )
    assert found == {
        "a": {"x": 1},
        "t-p": {"k": {"p": ["p.x", 3]}},
        "t-q": {"k": {"q": ["q.x", 3]}},
        "z": {"x": 2},
    }
    assert list(found) == ["a", "t-p", "t-q", "z"]


def test_several_variables_make_all_combinations():
    found = steps("steps: {'s-${a}-${b}': {for_each: {a: [1, 2], b: [x, y]}, k: '${a}${b}'}}")
    assert found == {f"s-{a}-{b}": {"k": f"{a}{b}"} for a in (1, 2) for b in "xy"}


def test_a_variable_alone_keeps_its_type():
    found = steps("steps: {'s-${n}': {for_each: {n: [1, 0.5, true]}, k: '${n}', t: 'n=${n}'}}")
    assert [(type(step["k"]), step["t"]) for step in found.values()] == [
        (int, "n=1"),
        (float, "n=0.5"),
        (bool, "n=true"),
    ]


def test_copies_know_their_template_and_place():
    found = expand("steps:\n  's-${v}':\n    for_each: {v: [p, q]}\n    k: 1\n")
    assert found.templates == {"s-p": "s-${v}", "s-q": "s-${v}"}
    assert str(found.root.children["steps"].children["s-q"].children["k"].place) == "r.yaml:4:8"


@pytest.mark.parametrize(
    ("text", "code", "place"),
    [
        ("steps: {s: {for_each: {v: [a, b]}}}", "K126", "1:13"),
        ("steps: {s: {for_each: {v: [a]}}}", "K126", "1:13"),
        ("steps: {'s-${v}': {for_each: {v: [a], w: [b]}}}", "K126", "1:20"),
        ("steps: {'s-${v}': {for_each: [a]}}", "K125", "1:20"),
        ("steps: {'s-${v}': {for_each: {}}}", "K125", "1:20"),
        ("steps: {'s-${v}': {for_each: {v: a}}}", "K125", "1:34"),
        ("steps: {'s-${v}': {for_each: {v: []}}}", "K125", "1:31"),
        ("steps: {'s-${v}': {for_each: {v: [{a: 1}]}}}", "K125", "1:31"),
        ("steps: {'s-${v}': {for_each: {v: [null]}}}", "K125", "1:31"),
        ("steps: {'s-${1}': {for_each: {'1': [a]}}}", "K125", "1:31"),
        ("steps: {'s-${v}': {x: 1}}", "K127", "1:9"),
        ("steps: {'s-${v}': {for_each: {v: [a]}, k: '${w}'}}", "K127", "1:43"),
        ("steps: {s: {k: ['${v}']}}", "K127", "1:17"),
        ("steps: {s: {'${v}': 1}}", "K127", "1:13"),
        ("data: {d: {files: '${HOME}/x'}}", "K127", "1:19"),
        ("steps: {s-a: {}, 's-${v}': {for_each: {v: [a]}}}", "K128", "1:18"),
        ("steps: {'s-${v}': {for_each: {v: [a, a]}}}", "K128", "1:9"),
        ("steps: {'s-${v}': {for_each: {v: [a]}, '${v}': 1, a: 2}}", "K108", "1:9"),
    ],
)
def test_problems(text: str, code: str, place: str):
    found = expand(text).problems
    assert [problem.code for problem in found] == [code]
    assert str(found[0].place) == f"r.yaml:{place}"


def test_unknown_variable_names_the_nearest():
    problem = expand("steps: {'s-${task}': {for_each: {task: [a]}, k: '${tsk}'}}").problems[0]
    assert problem.remedy == "did you mean 'task'?"
    assert problem.path == "steps.s-${task}.k"


def test_copies_are_bounded():
    values = ", ".join(map(str, range(40)))
    found = expand(f"steps: {{'s-${{a}}-${{b}}': {{for_each: {{a: [{values}], b: [{values}]}}}}}}")
    assert [problem.code for problem in found.problems] == ["K129"]


def test_copies_of_a_large_step_are_bounded():
    values, body = ", ".join(map(str, range(900))), "x" * 100_000
    found = expand(f"steps: {{'s-${{a}}': {{for_each: {{a: [{values}]}}, k: '{body}'}}}}")
    assert [problem.code for problem in found.problems] == ["K129"]


def test_other_shapes_are_left_for_the_check_of_shapes():
    for text in ("steps: 3", "steps: [a]", "{}", "steps: {a: 3, b: null}"):
        assert not expand(text).problems
