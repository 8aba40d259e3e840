"""`kroncc plan` as a process: output, memory, what it writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"
MEASURED = """
import resource, sys
from kroncc.cli import main
try:
    main()
finally:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""


def kroncc(*args: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "160"}
    command = [sys.executable, "-c", MEASURED, *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.long
def test_dry_run_of_bert_base_shows_all_and_writes_nothing(tmp_path):
    done = kroncc("plan", RECIPES / "kroneckerbert-8.yaml", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for text in ("14,655,754", "5.49 G", "attention.q", "768x3072", "task-sst2", "not read: model"):
        assert text in done.stdout
    assert list(tmp_path.iterdir()) == []
    kilobytes = int(done.stderr.split()[-1])
    assert kilobytes < 1.2e6
    assert done.stderr.split() == [str(kilobytes)], "library noise on stderr"


@pytest.mark.long
def test_json_and_mermaid_are_for_machines(tmp_path):
    arguments = ("plan", RECIPES / "krony-gpt2.yaml", "--dry-run", "--format")
    plan = json.loads(kroncc(*arguments, "json", cwd=tmp_path).stdout)
    assert plan["kroncc"] == 1
    assert plan["stages"][0]["name"] == "factored"
    assert {"fqn", "role", "pass", "before", "after"} <= set(plan["models"]["factored"]["modules"][0])
    assert kroncc(*arguments, "mermaid", cwd=tmp_path).stdout.startswith("flowchart LR")
