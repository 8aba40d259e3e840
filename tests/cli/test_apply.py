"""`kroncc apply` as a process: what it prints, and how it ends when it is interrupted."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "bad", "film"]
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
SMALL = {
    "compress": {"model": "base", "passes": [{"kronecker": {"targets": "@ffn.up", "a": [8, 4], "b": [4, 4]}}]}
}
TAUGHT = {
    "distill": {
        "student": "small",
        "teacher": "base",
        "data": "d",
        "max_steps": 2,
        "batch_size": 2,
        "losses": [{"mse": {"at": "hidden"}}],
    }
}


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ground")
    (root / "model").mkdir()
    (root / "model" / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=24, **SIZES)
    transformers.BertModel(config).save_pretrained(root / "model")
    transformers.BertTokenizerFast(vocab=str(root / "model" / "vocab.txt")).save_pretrained(root / "model")
    (root / "train.txt").write_text("a good film\na bad film\n")
    return root


def recipe(root: Path, name: str, steps: dict[str, Any], **parts: Any) -> str:
    data = {"d": {"source": "text", "files": "train.txt", "max_length": 16}}
    whole = {"kroncc": 1, "name": name, "model": {"source": "model"}, "steps": steps, **parts}
    if "distill" in str(steps):
        whole["data"] = data
    (root / f"{name}.yaml").write_text(yaml.safe_dump(whole, sort_keys=False))
    return f"{name}.yaml"


def start(root: Path, *arguments: str, python: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, *python, "-m", "kroncc", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=root, env=environment, text=True, **pipes)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Return exit code, output and errors; the lines of Python's import log left out."""
    out, errors = process.communicate(timeout=300)
    said = "\n".join(line for line in errors.splitlines() if not line.startswith("import time:"))
    return process.returncode, out, said


def until_seen(process: subprocess.Popen[str], stream: Any, words: str) -> None:
    for line in stream:
        if words in line:
            return
    raise AssertionError(f"{words!r} was never said; exit code {process.wait()}")


@pytest.mark.long
def test_an_unmet_expectation_still_shows_the_table(ground: Path) -> None:
    file = recipe(ground, "unmet", {"small": SMALL}, expect={"small.disk": "< 1"})
    code, out, errors = ended(start(ground, "apply", file))
    assert code == 1
    assert "unmet: result (24 tokens, batch 1)" in out
    assert "results: runs/unmet" in out
    assert errors.startswith("K820: expectation unmet: small.disk")


@pytest.mark.long
def test_a_step_that_skips_all_is_noted(ground: Path) -> None:
    large = {"compress": {"model": "base", "passes": [{"low-rank": {"targets": "@ffn.up", "rank": 16}}]}}
    file = recipe(ground, "nothing", {"small": large})
    code, out, errors = ended(start(ground, "apply", file))
    assert (code, errors) == (0, "")
    note = "note: step 'small' changes nothing: all 1 modules it matched are skipped"
    assert out.startswith(note)
    assert out.count(note) == 2


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_while_compiling(ground: Path, number: signal.Signals) -> None:
    file = recipe(ground, "early", {"small": SMALL})
    process = start(ground, "apply", file, python=("-X", "importtime"))
    until_seen(process, process.stderr, "kroncc.compiler")
    process.send_signal(number)
    code, out, errors = ended(process)
    assert code in (130, -signal.SIGINT)  # a shell shows 130 for both
    assert (out, errors) == ("", "interrupted; nothing is lost: run the same command again")


@pytest.mark.long
def test_sigterm_in_training_writes_a_checkpoint(ground: Path) -> None:
    steps = {"small": SMALL, "taught": TAUGHT}
    file = recipe(ground, "term", steps)
    more = "steps.taught.distill.max_steps=100000"
    process = start(ground, "apply", file, "--set", more)
    until_seen(process, process.stdout, "taught: step 1/")
    process.send_signal(signal.SIGTERM)
    code, _, errors = ended(process)
    assert code == 1
    assert errors.startswith("K810: interrupted in step 'taught' after")
    (checkpoint,) = (ground / "runs" / "term" / "checkpoints" / "taught").iterdir()
    assert (checkpoint / "position.json").is_file()
