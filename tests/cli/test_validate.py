import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kroncc.cli import VERBS, app_for, main

ROOT = Path(__file__).parents[2]
RECIPES = sorted(str(file) for file in (ROOT / "recipes").glob("*.yaml"))
BAD = """\
kroncc: 1
name: bad
model: {source: x, tsk: text-classification}
steps:
  small: {compress: {model: bse, passes: [{kronecker: {targets: "@ffn.upp", ratoi: 4}}]}}
"""


@pytest.fixture
def bad(tmp_path: Path) -> str:
    file = tmp_path / "bad, very: 100%.yaml"
    file.write_text(BAD)
    return str(file)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "import sys; from kroncc.cli import main; sys.exit(main())", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_valid(capsys):
    assert main(["validate", *RECIPES]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out == [f"{file}: ok" for file in RECIPES]
    assert len(out) >= 5


def test_text(bad: str, capsys):
    assert main(["validate", RECIPES[0], bad]) == 2
    out = capsys.readouterr().out
    assert f"{RECIPES[0]}: ok" in out
    assert f"{bad}:3:20: K130: unknown key 'tsk' (at model.tsk)" in out
    assert "did you mean 'task'" in out
    assert f"{bad}:5:29: K160: no step is called 'bse' (at steps.small.compress.model)" in out
    assert f"{bad}: 4 problems" in out


def test_json(bad: str, capsys):
    assert main(["validate", "--format", "json", bad, RECIPES[0]]) == 2
    report = json.loads(capsys.readouterr().out)
    first, second = report["files"]
    assert (first["valid"], second["valid"]) == (False, True)
    assert [problem["code"] for problem in first["problems"]] == ["K130", "K160", "K202", "K130"]
    assert first["problems"][0] == {
        "code": "K130",
        "message": "unknown key 'tsk'",
        "file": bad,
        "line": 3,
        "column": 20,
        "path": "model.tsk",
        "expected": "source, config, task, labels, revision, trust_remote_code",
        "remedy": "did you mean 'task'?",
    }


def test_github(bad: str, capsys):
    assert main(["validate", "--format", "github", bad]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    escaped = bad.replace("%", "%25").replace(":", "%3A").replace(",", "%2C")
    assert lines[0].startswith(
        f"::error file={escaped},line=3,col=20,title=K130::unknown key 'tsk' (at model.tsk)%0A"
    )


def test_sarif(bad: str, capsys):
    assert main(["validate", "--format", "sarif", bad]) == 2
    log = json.loads(capsys.readouterr().out)
    assert log["version"] == "2.1.0"
    (one,) = log["runs"]
    rules = one["tool"]["driver"]["rules"]
    assert len({rule["id"] for rule in rules}) == len(rules)
    for result in one["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        assert rules[result["ruleIndex"]]["shortDescription"]["text"]
        assert result["message"]["text"]
    place = one["results"][0]["locations"][0]["physicalLocation"]
    assert place["region"] == {"startLine": 3, "startColumn": 20}
    assert " " not in place["artifactLocation"]["uri"]


def test_nothing_to_say_is_valid_in_every_format(capsys):
    for format_ in ("json", "github", "sarif"):
        assert main(["validate", "--format", format_, RECIPES[0]]) == 0
    assert '"results": []' in capsys.readouterr().out


def test_overrides(capsys):
    assert main(["validate", RECIPES[0], "--set", "name=x"]) == 0
    assert main(["validate", RECIPES[0], "--set", "nme=x"]) == 2
    assert "--set nme=x: K130" in capsys.readouterr().out


def test_missing_file(capsys):
    assert main(["validate", "nowhere.yaml"]) == 2
    assert "nowhere.yaml: K101: the recipe cannot be read: No such file" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["validate"], ["validate", "--format", "xml", "a"], ["valdate", "a"], ["--nothing"]]
)
def test_wrong_usage(arguments: list[str], capsys):
    assert main(arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_help_names_every_verb_and_imports_none(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for verb, (_, summary) in VERBS.items():
        assert f"{verb} " in out
        assert summary in out
    done = run("--help")
    assert done.returncode == 0
    code = "import sys; from kroncc.cli import main; main(['--help']); print('torch' in sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "False"


def test_every_verb_can_be_loaded():
    for verb in VERBS:
        assert app_for([verb])


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("kroncc ")


def test_no_torch_and_quick():
    run("validate", RECIPES[0])  # fills the cache of schemas, should it be cold
    code = (
        "import sys; from kroncc.cli import main; main(['validate', *sys.argv[1:]]);"
        "print({'torch', 'transformers', 'datasets', 'jsonschema', 'networkx', 'numpy'} & set(sys.modules))"
    )
    spent = []
    for _ in range(4):  # the least of a few: what shares the core with it slows it too
        before = _cpu_of_children()
        done = subprocess.run(
            [sys.executable, "-c", code, RECIPES[0]], capture_output=True, text=True, check=True, cwd=ROOT
        )
        assert done.stdout.splitlines()[-1] == "set()"
        spent.append(_cpu_of_children() - before)
    assert min(spent) < 0.5


def _cpu_of_children() -> float:
    """Seconds of CPU, not of the clock: other work on the machine does not count."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def test_a_hundred_files(capsys):
    main(["validate", RECIPES[0]])
    start = time.process_time()
    assert main(["validate", *[RECIPES[0]] * 100]) == 0
    assert time.process_time() - start < 2.0


def test_schema_is_json(capsys):
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "kroncc recipe"


def test_passes(capsys):
    assert main(["passes"]) == 0
    assert any(
        line.startswith("kronecker  ") and line.endswith("[kroncc]")
        for line in capsys.readouterr().out.splitlines()
    )
    assert main(["passes", "kronecker"]) == 0
    out = capsys.readouterr().out
    assert "Kronecker products" in out
    assert "a number above 1; default none" in out
    assert "targets" in out
    assert main(["passes", "kroneker"]) == 2
    assert "did you mean 'kronecker'?" in capsys.readouterr().err


def test_a_saved_plan_is_told_apart(tmp_path: Path, capsys):
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"stages": [], "models": {}, "versions": {}, "name": "x" * 2_000_000}))
    assert main(["validate", str(plan)]) == 2
    out = capsys.readouterr().out
    assert f"{plan}: K115: this is a saved plan, not a recipe" in out
    assert f"kroncc apply {plan}" in out
    (tmp_path / "recipe.json").write_text('{"kroncc": 1}')  # JSON is YAML
    assert main(["validate", str(tmp_path / "recipe.json")]) == 2
    assert "K131" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("ratoi: 4", "ratio: 4, params: 9", "K135"),
        ("tsk: text-classification", "task: translation", "K157"),
        ("steps:", "data: {d: {source: text, files: x, text: [a, b, c]}}\nsteps:", "K609"),
    ],
)
def test_what_needs_no_torch_is_seen(tmp_path: Path, capsys, old: str, new: str, code: str):
    file = tmp_path / "bad.yaml"
    file.write_text(BAD.replace(old, new))
    assert main(["validate", str(file)]) == 2
    assert f" {code}: " in capsys.readouterr().out
