"""What would fail when a stage runs is refused by the plan, on a real (tiny) model and real files."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from kroncc.compiler import compile_recipe
from kroncc.errors import KronccError, PlanError, Problem
from kroncc.plan.measures import fidelity_parts
from kroncc.plan.stages import Plan
from kroncc.recipe.loader import load_recipe

TRAIN = {"data": "d", "max_steps": 2, "batch_size": 2}
SMALL = {"small": {"compress": {"model": "base", "passes": [{"low-rank": {"targets": "@ffn.*", "rank": 2}}]}}}
HIDDEN = {"student": "small", "teacher": "base", **TRAIN, "losses": [{"mse": {"at": "hidden"}}]}


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ground")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "bad", "film"]
    (root / "model").mkdir()
    (root / "model" / "vocab.txt").write_text("\n".join(words) + "\n")
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=24,
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(root / "model")
    tokenizer = transformers.BertTokenizerFast(vocab=str(root / "model" / "vocab.txt"))
    tokenizer.save_pretrained(root / "model")
    (root / "train.csv").write_text("text,label,score\na good film,1,0.5\na bad film,0,0.25\n")
    return root


@pytest.fixture
def root(ground: Path, tmp_path: Path) -> Path:
    shutil.copytree(ground, tmp_path, dirs_exist_ok=True)
    return tmp_path


def write(root: Path, steps: dict[str, Any], task: str = "feature-extraction", **parts: Any) -> Path:
    data = {"source": "csv", "files": "train.csv", "label": "label", "max_length": 16}
    reads = any("data" in body for step in steps.values() for body in step.values())
    recipe = {
        "kroncc": 1,
        "name": "x",
        "model": {"source": "model", "task": task},
        "data": {"d": {**data, **parts.pop("data", {})}} if reads else {},
        "steps": steps,
        **parts,
    }
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def planned(root: Path, steps: dict[str, Any], task: str = "feature-extraction", **parts: Any) -> Plan:
    options = {key: parts.pop(key) for key in ("offline", "directory") if key in parts}
    return compile_recipe(load_recipe(write(root, steps, task, **parts)), **options)


def refused(root: Path, steps: dict[str, Any], task: str = "feature-extraction", **parts: Any) -> Problem:
    with pytest.raises(KronccError) as caught:
        planned(root, steps, task, **parts)
    assert caught.value.exit_code == 2
    (problem,) = caught.value.problems
    assert problem.place is not None
    return problem


# --- the tokenizer


def without_tokenizer(root: Path) -> None:
    for file in [*(root / "model").glob("*token*"), root / "model" / "vocab.txt"]:
        file.unlink(missing_ok=True)


@pytest.mark.parametrize("offline", [False, True])
def test_a_source_without_tokenizer(root: Path, offline: bool) -> None:
    without_tokenizer(root)
    problem = refused(root, {**SMALL, "taught": {"distill": HIDDEN}}, offline=offline)
    assert (problem.code, problem.path) == ("K515", "model.source")
    assert "model: {" not in str(problem.place)


def test_no_tokenizer_is_needed_where_no_text_is_read(root: Path) -> None:
    without_tokenizer(root)
    assert planned(root, {**SMALL, "out": {"export": {"model": "small"}}})


def test_a_config_alone_has_no_tokenizer_and_plans(root: Path) -> None:
    path = write(root, {**SMALL, "taught": {"distill": HIDDEN}})
    whole = yaml.safe_load(path.read_text())
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    whole["model"] = {"config": {"model_type": "bert", **sizes}}
    path.write_text(yaml.safe_dump(whole, sort_keys=False))
    assert compile_recipe(load_recipe(path), offline=True).sources["model"] is None


# --- precision


def test_fp16_without_a_gpu(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    steps = {**SMALL, "taught": {"distill": {**HIDDEN, "precision": "fp16"}}}
    problem = refused(root, steps)
    assert (problem.code, problem.path) == ("K815", "steps.taught.distill.precision")
    steps["taught"]["distill"]["precision"] = "bf16"
    assert planned(root, steps)


# --- freeze


def test_freeze_that_leaves_nothing(root: Path) -> None:
    everything = ["embeddings.**", "encoder.**"]  # the pooler is left, but no loss reaches it
    problem = refused(root, {**SMALL, "taught": {"distill": {**HIDDEN, "freeze": everything}}})
    assert (problem.code, problem.path) == ("K814", "steps.taught.distill.freeze")
    assert planned(root, {**SMALL, "taught": {"distill": {**HIDDEN, "freeze": ["embeddings.**"]}}})


def test_freeze_of_a_finetune_is_looked_up(root: Path) -> None:
    steps = {"t": {"finetune": {"model": "base", **TRAIN, "freeze": ["**"]}}}
    assert refused(root, steps, "text-classification").code == "K814"
    steps["t"]["finetune"]["freeze"] = ["no.such"]
    assert refused(root, steps, "text-classification").code == "K204"
    steps["t"]["finetune"]["freeze"] = ["bert.**"]
    assert planned(root, steps, "text-classification")


# --- data


def test_splits_are_there(root: Path) -> None:
    steps = {"t": {"finetune": {"model": "base", **TRAIN, "evaluate_every": 1}}}
    problem = refused(root, steps, "text-classification")
    assert (problem.code, problem.path) == ("K607", "steps.t.finetune.evaluate_every")
    assert planned(root, steps, "text-classification", data={"validation_fraction": 0.5})


def test_metrics_fit_the_labels(root: Path) -> None:
    evaluate = {"models": ["base"], "data": "d", "split": "train"}
    steps = {"r": {"evaluate": {**evaluate, "metrics": ["pearson"]}}}
    assert refused(root, steps, "text-classification").code == "K623"
    steps = {"r": {"evaluate": {**evaluate, "metrics": ["accuracy"]}}}
    assert planned(root, steps, "text-classification")
    one = {"source": "model", "task": "text-classification", "labels": 1}
    problem = refused(root, steps, model=one, data={"label": "score"})
    assert (problem.code, problem.path) == ("K623", "steps.r.evaluate.metrics")


def test_a_task_whose_data_cannot_be_read(root: Path) -> None:
    steps = {"t": {"finetune": {"model": "base", **TRAIN}}}
    assert refused(root, steps, "token-classification").code == "K610"


# --- expectations


def test_a_figure_of_fidelity_that_the_task_does_not_give(root: Path) -> None:
    report = {"evaluate": {"models": ["small"], "data": "d", "split": "train", "metrics": ["fidelity"]}}
    report["evaluate"]["against"] = "base"
    steps = {**SMALL, "report": report}
    problem = refused(root, steps, expect={"small.fidelity.agreement": "> 0.5"})
    assert (problem.code, problem.path) == ("K821", "expect.small.fidelity.agreement")
    assert problem.expected == "small.fidelity.cosine, small.fidelity.rank_correlation"
    assert problem.place is not None
    assert "agreement" in (root / "recipe.yaml").read_text().splitlines()[problem.place.line - 1]
    assert planned(root, steps, expect={"small.fidelity.cosine": "> 0.5"})
    classifier = {"expect": {"small.fidelity.agreement": "> 0.5"}}
    assert planned(root, steps, "text-classification", **classifier)
    one = {"source": "model", "task": "text-classification", "labels": 1}
    assert refused(root, steps, model=one, **classifier).expected == "small.fidelity.rank_correlation"


def test_the_figures_are_those_that_are_measured() -> None:
    from kroncc.run.metrics import Evaluation

    mask = torch.ones(3, 2)
    given = {
        ("feature-extraction", 0): {"last_hidden_state": torch.randn(3, 2, 4)},
        ("text-classification", 2): {"logits": torch.randn(3, 2)},
        ("text-classification", 1): {"logits": torch.randn(3, 1)},
        ("fill-mask", 2): {"logits": torch.randn(3, 2, 9)},
        ("text-generation", 1): {"logits": torch.randn(3, 2, 9)},
    }
    for (task, head), outputs in given.items():
        measured = Evaluation(["fidelity"], task)
        measured.update(outputs, {"attention_mask": mask}, outputs)
        assert {f"fidelity.{part}" for part in fidelity_parts(task, head)} == measured.result().keys()


# --- exports


def exports(*places: str) -> dict[str, Any]:
    return {f"out{index}": {"export": {"model": "base", "to": to}} for index, to in enumerate(places)}


@pytest.mark.parametrize(
    ("places", "said"),
    [
        (("given", "given"), "overlaps the export 'out0'"),
        (("given", "given/inside"), "overlaps the export 'out0'"),
        (("model",), "is the source model"),
        (("model/inside",), "overlaps the source model"),
        (("runs/x/steps/y",), "overlaps the run directory"),
        (("runs",), "overlaps the run directory"),
        (("train.csv",), "is a file"),
        (("mine",), "is not empty and was not written by an export"),
    ],
)
def test_exports_that_would_overwrite(root: Path, places: tuple[str, ...], said: str) -> None:
    (root / "mine").mkdir()
    (root / "mine" / "thesis.txt").write_text("mine")
    problem = refused(root, exports(*places), directory=root / "runs" / "x")
    assert problem.code == "K827"
    assert said in problem.message
    assert problem.path == f"steps.out{len(places) - 1}.export.to"


def test_exports_side_by_side_leave_nothing_while_planning(root: Path) -> None:
    before = sorted(root.rglob("*"))
    assert planned(root, exports("new/one", "new/two"), directory=root / "runs" / "x")
    assert sorted(root.rglob("*")) == sorted([*before, root / "recipe.yaml"])


def test_an_export_below_a_file(root: Path) -> None:
    for offline in (False, True):
        problem = refused(root, exports("train.csv/below"), offline=offline)
        assert (problem.code, problem.path) == ("K802", "steps.out0.export.to")


@pytest.mark.skipif(sys.platform != "linux", reason="a file system without room for new directories")
def test_an_export_where_the_system_makes_no_directory(root: Path) -> None:
    assert refused(root, exports("/proc/kroncc/out")).code in ("K802", "K804")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_export_without_permission(root: Path) -> None:
    (root / "closed").mkdir(mode=0o500)
    assert refused(root, exports("closed/out"), offline=True).code == "K802"


# --- the command


def test_apply_refuses_before_anything_is_written(root: Path) -> None:
    path = write(root, exports("runs/x/steps/y"))
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    for verb in (["plan"], ["apply"]):
        command = [sys.executable, "-m", "kroncc", *verb, path.name]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "recipe.yaml:" in done.stderr
        assert "K827" in done.stderr
        assert not (root / "runs").exists()


def test_the_errors_are_plan_errors(root: Path) -> None:
    with pytest.raises(PlanError, match="K827"):
        planned(root, exports("model"))
