import json
import textwrap
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kroncc.errors import PassError, RecipeError
from kroncc.recipe.loader import load_recipe
from kroncc.recipe.reader import read_yaml
from kroncc.recipe.schema import Compress, Distill, Evaluate

RECIPES = Path(__file__).parents[2] / "recipes"


class Passes:
    """The schemas of two passes, written by hand as an installed table would give them."""

    known = {  # noqa: RUF012
        "halve": {
            "type": "object",
            "properties": {
                "rank": {"type": "integer", "exclusiveMinimum": 0},
                "init": {"enum": ["nearest", "random"]},
            },
            "required": ["rank"],
            "additionalProperties": False,
        },
        "plain": {"type": "object", "properties": {}, "additionalProperties": False},
    }

    def names(self):
        return sorted(self.known)

    def schema(self, name):
        if name not in self.known:
            raise PassError(
                f"no pass is called {name!r}",
                code="K410",
                expected="an installed pass",
                remedy=f"valid: {', '.join(self.known)}",
            )
        return self.known[name]


BASE = """\
kroncc: 1
name: small
model: {source: org/model, task: text-classification}
data:
  wiki: {source: text, files: wiki.txt}
  sst2: {source: csv, files: {train: a.tsv, validation: b.tsv}, label: label}
steps:
  teacher: {finetune: {model: base, data: sst2, epochs: 3}}
  factored:
    compress:
      model: base
      passes:
        - halve: {targets: "@ffn.up[0:6]", exclude: [classifier], count: 6, rank: 3}
        - plain
        - plain:
  task:
    distill:
      student: factored
      teacher: teacher
      data: wiki
      max_steps: 10
      learning_rate: 1e-3
      losses:
        - mse: {at: attention.scores, weight: [[0, 1], [1, 0.5]], layers: [[0, 1]]}
        - kl: {temperature: 2}
        - task
  report: {evaluate: {models: [teacher, task], data: sst2, metrics: accuracy}}
expect:
  factored.params: "<= 15_000_000"
  task.accuracy: ">= 0.99 * teacher.accuracy"
"""


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        file = tmp_path / "r.yaml"
        file.write_text(textwrap.dedent(text), encoding="utf-8")
        return file

    return write


def problems(file: Path, *overrides: str):
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, overrides=overrides, passes=Passes())
    return caught.value.problems


def test_a_whole_recipe(write):
    loaded = load_recipe(write(BASE), passes=Passes())
    recipe = loaded.recipe
    assert list(recipe.steps) == ["teacher", "factored", "task", "report"]
    compress, distill, report = recipe.steps["factored"], recipe.steps["task"], recipe.steps["report"]
    assert isinstance(compress, Compress)
    assert [(call.name, call.options) for call in compress.passes] == [
        ("halve", {"rank": 3}),
        ("plain", {}),
        ("plain", {}),
    ]
    assert compress.passes[0].scope.targets == ["@ffn.up[0:6]"]
    assert compress.passes[0].scope.count == 6
    assert isinstance(distill, Distill)
    assert distill.learning_rate == 1e-3
    assert distill.losses[0].weight == [(0.0, 1.0), (1.0, 0.5)]
    assert distill.losses[0].layers == [(0, 1)]
    assert [loss.kind for loss in distill.losses] == ["mse", "kl", "task"]
    assert isinstance(report, Evaluate)
    assert report.metrics == ["accuracy"]
    assert recipe.data["sst2"].text == ["text"]
    assert loaded.text == BASE
    assert loaded.path.name == "r.yaml"


def test_places(write):
    places = load_recipe(write(BASE), passes=Passes()).places
    end = {
        "steps.factored.compress.passes[0].halve.rank": ":13:83",
        "steps.factored.compress.passes[0].rank": ":13:83",
        "steps.factored.compress.passes[0].nothing": ":13:11",
        "steps.task.distill.losses[1].temperature": ":25:29",
        "steps.task.distill.losses[7].mse": ":23:7",
        "steps.task": ":16:3",
        "expect.task.accuracy": ":30:18",
        "nothing.at.all": ":1:1",
    }
    for path, place in end.items():
        assert str(places.find(path)).endswith(f"r.yaml{place}"), (path, places.find(path))


def test_frozen(write):
    recipe = load_recipe(write(BASE), passes=Passes()).recipe
    with pytest.raises(ValueError, match="frozen"):
        recipe.name = "other"


def test_without_passes_options_are_taken_as_written(write):
    recipe = load_recipe(write(BASE.replace("rank: 3", "anything: [3]"))).recipe
    assert recipe.steps["factored"].passes[0].options == {"anything": [3]}


def test_ready_made_recipes_load():
    files = sorted(RECIPES.rglob("*.yaml"))
    assert len(files) >= 5
    for file in files:
        load_recipe(file)


# What is replaced in BASE, by what, the codes that must come, where the first is, a word of its text.
BAD = {
    "unknown top key": ("name: small", "nme: small", ["K131", "K130"], "1:1", "'name' is missing"),
    "version missing": ("kroncc: 1", "", ["K131"], "2:1", "kroncc: 1"),
    "version too new": ("kroncc: 1", "kroncc: 2", ["K136"], "1:9", "upgrade"),
    "version is text": ("kroncc: 1", "kroncc: one", ["K136"], "1:9", "kroncc: 1"),
    "name is a number": ("name: small", "name: 3", ["K132"], "2:7", "text"),
    "name with a blank": ("name: small", "name: a b", ["K134"], "2:7", "matching"),
    "no origin": ("source: org/model, ", "", ["K135"], "3:1", "`source`"),
    "unknown model key": ("source: org/model", "sourc: org/model", ["K130"], "3:9", "'source'"),
    "unknown task": (
        "task: text-classification",
        "task: classification",
        ["K157"],
        "3:34",
        "'text-classification'",
    ),
    "trust as text": (
        "source: org/model",
        "source: a, trust_remote_code: yes",
        ["K132"],
        "3:39",
        "true or false",
    ),
    "file source without files": ("source: text, files: wiki.txt", "source: text", ["K601"], "5:3", "files"),
    "unknown file source": ("source: text,", "source: txt,", ["K616"], "5:18", "'text'"),
    "unknown builtin": (
        "source: text, files: wiki.txt",
        "source: builtin:docs",
        ["K615"],
        "5:18",
        "python-docs",
    ),
    "bad data name": ("wiki: {", "w.x: {source: text, files: a}\n  wiki: {", ["K137", "K167"], "5:3", "w.x"),
    "unknown data key": ("label: label", "lable: label", ["K130"], "6:65", "'label'"),
    "negative length": ("label: label", "max_length: -1", ["K134"], "6:77", "above 0"),
    "unused data": ("data: wiki\n", "data: sst2\n", ["K167"], "5:3", "wiki"),
    "unknown data set": ("data: wiki\n", "data: wki\n", ["K164"], "20:13", "'wiki'"),
    "unknown kind": ("{finetune: {model: base", "{finetun: {model: base", ["K140"], "8:13", "'finetune'"),
    "two kinds": ("report: {", "report: {export: {model: task}, ", ["K141"], "27:3", "2 kinds"),
    "no kind": ("  report: {", "  none: {}\n  report: {", ["K141"], "27:3", "no kind"),
    "step is text": ("  report: {", "  none: x\n  report: {", ["K142"], "27:9", "compress"),
    "step is null": ("  report: {", "  none:\n  report: {", ["K142"], "27:8", "compress"),
    "bad step name": ("  report: {", "  re port: {", ["K137"], "27:3", "re port"),
    "reserved step name": ("  report: {", "  base: {", ["K166"], "27:3", "base"),
    "no length of training": (", epochs: 3", "", ["K135"], "8:13", "`epochs`"),
    "two lengths of training": (
        "max_steps: 10",
        "max_steps: 10\n      epochs: 3",
        ["K135"],
        "17:5",
        "max_steps",
    ),
    "on is no boolean": (
        "max_steps: 10",
        "max_steps: 10\n      cache_teacher: on",
        ["K132"],
        "22:22",
        "true or false",
    ),
    "octal trap": ("max_steps: 10", "max_steps: 010", ["K132"], "21:18", "leading zero"),
    "number in quotes": ("max_steps: 10", 'max_steps: "10"', ["K132"], "21:18", "no quotes"),
    "not a number": ("learning_rate: 1e-3", "learning_rate: .nan", ["K134"], "22:22", "above 0"),
    "infinite": ("learning_rate: 1e-3", "learning_rate: .inf", ["K134"], "22:22", "above 0"),
    "seed too large": ("max_steps: 10", "max_steps: 10\n      seed: 4294967296", ["K134"], "22:13", "below"),
    "unknown pass": ("- halve:", "- halv:", ["K410"], "13:11", "halve"),
    "pass without name": ("- plain:\n", "- {}\n", ["K146"], "15:11", "one name"),
    "pass with two names": ("- plain\n", "- {plain: {}, halve: {}}\n", ["K146"], "14:11", "plain, halve"),
    "pass is a number": ("- plain\n", "- 3\n", ["K146"], "14:11", "one name"),
    "pass options are a list": ("- plain\n", "- plain: [a]\n", ["K132"], "14:11", "options"),
    "unknown option": ("rank: 3", "rank: 3, rnk: 3", ["K130"], "13:86", "'rank'"),
    "option missing": (", rank: 3", "", ["K131"], "13:11", "rank: a whole number above 0"),
    "option of wrong type": ("rank: 3", "rank: three", ["K132"], "13:83", "a whole number above 0"),
    "option not allowed": ("rank: 3", "rank: 3, init: nearst", ["K133"], "13:92", "'nearest'"),
    "count is zero": ("count: 6", "count: 0", ["K134"], "13:74", "above 0"),
    "unknown role": ("@ffn.up[0:6]", "@ffn.upp", ["K202"], "13:28", "'ffn.up'"),
    "bad layers": ("@ffn.up[0:6]", "@ffn.up[a]", ["K201"], "13:28", "[0:6]"),
    "bad regular expression": ("[classifier]", "['re:(']", ["K203"], "13:54", "re:("),
    "unknown loss": ("- kl:", "- kll:", ["K150"], "25:11", "'kl'"),
    "loss option of another kind": ("- task\n", "- task: {at: logits}\n", ["K130"], "26:18", "weight"),
    "temperature of mse": ("at: attention.scores", "temperature: 2", ["K130"], "24:17", "weight"),
    "unknown tap": ("at: attention.scores", "at: attention.score", ["K152"], "24:21", "'attention.scores'"),
    "tap resembles": ("at: attention.scores", "at: logit", ["K152"], "24:21", "'logits'"),
    "bad weight points": ("[1, 0.5]]", "[2, 0.5]]", ["K134"], "24:57", "at most 1"),
    "bad target of freeze": (
        "max_steps: 10",
        "max_steps: 10\n      freeze: ['@hed']",
        ["K202"],
        "22:16",
        "'head'",
    ),
    "unknown metric": ("metrics: accuracy", "metrics: [accuracy, acc]", ["K155"], "27:80", "'accuracy'"),
    "fidelity alone": ("metrics: accuracy", "metrics: [accuracy, fidelity]", ["K156"], "27:12", "against"),
    "unknown step": ("student: factored", "student: factord", ["K160"], "18:16", "'factored'"),
    "model of an evaluation": (
        "student: factored",
        "student: report",
        ["K162", "K161"],
        "16:3",
        "task -> report",
    ),
    "takes itself": ("student: factored", "student: task", ["K163"], "18:16", "itself"),
    "a circle": (
        "model: base, data: sst2",
        "model: task, data: sst2",
        ["K162"],
        "8:3",
        "teacher -> task -> teacher",
    ),
    "expectation is a number": ('"<= 15_000_000"', "15_000_000", ["K132"], "29:20", "text"),
    "expectation cannot be read": ('"<= 15_000_000"', '"<= 15M"', ["K170"], "29:20", "character 6"),
    "expectation of no step": ("factored.params", "factord.params", ["K172"], "29:3", "'factored'"),
    "expectation of an evaluation": ("factored.params", "report.params", ["K172"], "29:3", "report"),
    "expectation of nothing known": ("factored.params", "factored.parms", ["K173"], "29:3", "'params'"),
    "expectation nothing measures": ("factored.params", "factored.accuracy", ["K174"], "29:3", "evaluate"),
    "expectation without attribute": ("factored.params", "factored", ["K171"], "29:13", "STEP.attribute"),
    "extends itself": ("name: small", "extends: r.yaml", ["K121"], "2:10", "circle"),
    "duplicate key": ("name: small", "name: small\nname: big", ["K108"], "3:1", "first at"),
    "undefined variable": ("model: base, data", 'model: "${x}", data', ["K127"], "8:31", "for_each"),
    "for_each without a name": (
        "{finetune: {model: base",
        "{for_each: {v: [a]}, finetune: {model: base",
        ["K126"],
        "8:13",
        "teacher-${v}",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_recipe(write, name: str):
    old, new, codes, place, word = BAD[name]
    assert old in BASE
    found = problems(write(BASE.replace(old, new, 1)))
    assert {problem.code for problem in found} == set(codes)  # one mistake, one problem
    first = next(problem for problem in found if problem.code == codes[0])
    assert str(first.place).endswith(f"r.yaml:{place}")
    assert word in str(first)
    assert first.expected


def test_all_problems_at_once_in_order(write):
    text = BASE
    for name in (
        "name is a number",
        "unknown task",
        "unknown pass",
        "unknown role",
        "unknown loss",
        "unknown metric",
    ):
        old, new = BAD[name][:2]
        text = text.replace(old, new, 1)
    found = problems(write(text))
    assert [problem.code for problem in found] == ["K132", "K157", "K410", "K202", "K150", "K155"]
    lines = [problem.place.line for problem in found]
    assert lines == sorted(lines)


def test_a_fault_in_a_step_hides_no_other(write):
    text = BASE.replace("student: factored", "student: factord").replace("max_steps: 10", "max_steps: ten")
    assert [problem.code for problem in problems(write(text))] == ["K160", "K132"]


def test_a_step_that_nothing_uses(write):
    text = BASE.replace("  task:\n", "  lonely: {finetune: {model: base, data: sst2, epochs: 1}}\n  task:\n")
    (problem,) = problems(write(text))
    assert (problem.code, problem.path, problem.place.line) == ("K165", "steps.lonely", 16)


def test_the_last_model_is_the_result(write):
    text = """
        kroncc: 1
        name: a
        model: {source: x}
        data: {d: {source: text, files: x}}
        steps:
          small: {compress: {model: base, passes: [plain]}}
          'task-${t}':
            for_each: {t: [a, b]}
            finetune: {model: small, data: d, epochs: 1}
    """
    assert list(load_recipe(write(text), passes=Passes()).recipe.steps) == ["small", "task-a", "task-b"]


def test_measured_twice(write):
    text = BASE.replace(
        "expect:", "  again: {evaluate: {models: task, data: wiki, metrics: [accuracy]}}\nexpect:"
    )
    (problem,) = problems(write(text))
    assert (problem.code, problem.place.line) == ("K175", 31)
    assert "report, again" in problem.message


def test_long_circle_is_shown(write):
    steps = "\n".join(
        f"  s{n}: {{compress: {{model: s{(n + 1) % 500}, passes: [plain]}}}}" for n in range(500)
    )
    text = f"kroncc: 1\nname: a\nmodel: {{source: x}}\nsteps:\n{steps}\n"
    (problem,) = problems(write(text))
    assert problem.code == "K162"
    assert "s0 -> s1 -> s2" in problem.message


@pytest.mark.parametrize(
    "row",
    [
        "  nam{n}: {{export: {{model: nm{n}}}}}\n",
        "  {n}: {{}}\n",
        "  a: {{}}\n",
        "  nam{n}: {{compress: {{}}}}\n",
    ],
)
def test_a_flood_of_problems_is_cut(write, row: str):
    start = time.process_time()
    rows = "".join(row.format(n=n) for n in range(10_000))
    found = problems(write(f"kroncc: 1\nname: a\nmodel: {{source: x}}\nsteps:\n{rows}"))
    assert 200 <= len(found) <= 202
    assert found[-1].code == "K199"
    assert time.process_time() - start < 10


def test_overrides(write):
    file = write(BASE)
    recipe = load_recipe(
        file, overrides=["steps.task.distill.max_steps=7", "data.wiki.limit=3"], passes=Passes()
    ).recipe
    assert recipe.steps["task"].max_steps == 7
    assert recipe.data["wiki"].limit == 3


@pytest.mark.parametrize(
    ("override", "code", "word"),
    [
        ("steps.tsk.distill.epochs=1", "K123", "'task'"),
        ("steps.task.distill.epocs=1", "K130", "'epochs'"),
        ("steps.task.distill.max_steps=ten", "K132", "a whole number"),
        ("steps.factored.compress.passes[0].halve.rank=0", "K134", "above 0"),
        ("nothing", "K122", "--set"),
        ("steps.task.distill.data=x", "K164", "no data set"),
    ],
)
def test_bad_overrides_say_which(write, override: str, code: str, word: str):
    found = [problem for problem in problems(write(BASE), override) if problem.code == code]
    assert len(found) == 1
    assert str(found[0].place) == f"--set {override}"
    assert word in str(found[0])


def test_override_of_an_expanded_step(write):
    text = BASE.replace("  teacher: {", "  'teach-${n}': {for_each: {n: [er, ed]}, ").replace(
        "teacher: teacher", "teacher: teach-er"
    )
    text = text.replace("[teacher, task]", "[teach-er, teach-ed, task]").replace(
        "teacher.accuracy", "teach-er.accuracy"
    )
    recipe = load_recipe(write(text), overrides=["steps.teach-ed.finetune.epochs=9"], passes=Passes()).recipe
    assert [recipe.steps[name].epochs for name in ("teach-er", "teach-ed")] == [3, 9]


def test_extended_recipe_keeps_the_places_of_both_files(write, tmp_path: Path):
    write(BASE.replace("task: text-classification", "task: classification"))
    top = tmp_path / "top.yaml"
    top.write_text("extends: r.yaml\nname: 3\nsteps: {task: {distill: {epochz: 1}}}\n")
    found = problems(top)
    assert [(problem.code, Path(problem.place.file).name, problem.place.line) for problem in found] == [
        ("K157", "r.yaml", 3),
        ("K132", "top.yaml", 2),
        ("K130", "top.yaml", 3),
    ]


def test_only_recipe_errors_for_other_kinds_of_yaml(write):
    for text in (
        "",
        "3",
        "[]",
        "a",
        "{}",
        "steps: 3",
        "{steps: [], data: 3, model: 3, expect: [], kroncc: []}",
        "\x00",
        "null",
    ):
        assert problems(write(text))


def _check_placed(error: RecipeError) -> None:
    assert all(problem.place and problem.expected for problem in error.problems), str(error)


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["base", "x", "${x}", "@ffn", "re:(", ""]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["a", "at", "for_each", "${x}", ""]), inner, max_size=2)
    ),
    max_leaves=4,
)
PLAIN = yaml.safe_load(BASE)
PATHS = [path for path, _ in read_yaml(BASE, "base").walk() if path]


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(PATHS), JUNK)
def test_any_value_anywhere_loads_or_is_refused(tmp_path: Path, path, junk):
    document = json.loads(json.dumps(PLAIN))
    holder = document
    for part in path[:-1]:
        holder = holder[part]
    holder[path[-1]] = junk
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(document))
    try:
        load_recipe(file, passes=Passes())
    except RecipeError as error:
        _check_placed(error)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, len(BASE)), st.integers(0, 30), st.text("ab:-[]{}&*!|>'\"#@$\n 1.~<", max_size=10))
def test_any_edit_loads_or_is_refused(tmp_path: Path, at: int, cut: int, new: str):
    file = tmp_path / "r.yaml"
    file.write_text(BASE[:at] + new + BASE[at + cut :])
    try:
        load_recipe(file, passes=Passes())
    except RecipeError as error:
        _check_placed(error)
