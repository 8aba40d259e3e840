"""A compressed model follows its teacher block after block; a killed run goes on to the same bits."""

from __future__ import annotations

import copy
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from kroncc.compiler import compile_recipe
from kroncc.errors import PlanError, RunError
from kroncc.graph.capture import capture
from kroncc.graph.model_graph import ModelGraph
from kroncc.graph.wavefront import Wavefront
from kroncc.model.load import load
from kroncc.plan.blocks import pair_blocks
from kroncc.plan.stages import Plan
from kroncc.recipe.loader import load_recipe
from kroncc.recipe.schema import PassCall, Reconstruct, Scope
from kroncc.rewrite.pipeline import compress_graph
from kroncc.run import reconstruct as module
from kroncc.run.block_task import BlockTask
from kroncc.run.executor import execute
from kroncc.run.progress import NullReporter, Step
from kroncc.run.reconstruct import ReconstructJob, ReconstructResult, reconstruct

KRONECKER = [
    PassCall(name="kronecker", scope=Scope(targets=["@attention.*"]), options={"a": [16, 16], "b": [2, 2]}),
    PassCall(name="kronecker", scope=Scope(targets=["@ffn.up"]), options={"a": [8, 2], "b": [8, 16]}),
    PassCall(name="low-rank", scope=Scope(targets=["@embedding.word"]), options={"rank": 6}),
]
OPTIONS = {"student": "s", "teacher": "t", "data": "d", "epochs": 4, "learning_rate": 3e-3}


class Heard(NullReporter):
    def __init__(self, at: int = -1, act: Callable[[], None] = lambda: None) -> None:
        self.at, self.act = at, act
        self.steps: list[Step] = []
        self.messages: list[str] = []

    def step(self, stage: str, step: Step) -> None:
        self.steps.append(step)
        if step.step == self.at:
            self.act()

    def message(self, text: str) -> None:
        self.messages.append(text)


@pytest.fixture(scope="module")
def bert(tiny: Any) -> ModelGraph:
    """A tiny classifier: the teacher."""
    return capture(tiny("bert", "AutoModelForSequenceClassification"))


@pytest.fixture(scope="module")
def batches(bert: ModelGraph, inputs_for: Any) -> list[dict[str, torch.Tensor]]:
    return [inputs_for(bert.inputs, batch=6, length=6 + at, seed=at) for at in range(5)]


def _student(teacher: ModelGraph, calls: list[PassCall] = KRONECKER) -> ModelGraph:
    student = teacher.bind(copy.deepcopy(teacher.model))
    compress_graph(student, calls)
    return student


def _fit(
    path: Path,
    student: ModelGraph,
    teacher: ModelGraph,
    batches: Any,
    heard: Heard | None = None,
    stage_hash: str = "one",
    **options: Any,
) -> ReconstructResult:
    action = Reconstruct(**{**OPTIONS, **options})
    job = ReconstructJob(
        "fit", stage_hash, student, teacher, batches, action, path / "kept", path / "scratch"
    )
    return reconstruct(job, heard or Heard())


def _state(graph: ModelGraph) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in graph.model.state_dict().items()}


def _equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def fitted(
    bert: ModelGraph, batches: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ModelGraph, ReconstructResult, Heard]:
    """A student of `bert`, fitted once without interruption."""
    student, heard = _student(bert), Heard()
    return student, _fit(tmp_path_factory.mktemp("fitted"), student, bert, batches, heard), heard


def test_the_error_of_every_block_falls(bert: ModelGraph, batches: Any, fitted: Any) -> None:
    student, result, heard = fitted
    assert [block.name for block in result.blocks] == ["embeddings", "layer 0", "layer 1", "head"]
    assert all(block.after < 0.9 * block.before for block in result.blocks), result.blocks
    assert all(not block.idle for block in result.blocks)
    assert heard.messages[1] == (
        f"fit: block 2 of 4, layer 0: error {result.blocks[1].before:.4g} -> {result.blocks[1].after:.4g}"
    )
    plain, logits = _student(bert), []
    with torch.no_grad():
        for graph in (bert, plain, student):
            logits.append(torch.cat([graph.module(**batch)["logits"] for batch in batches]))
    assert (logits[2] - logits[0]).square().sum() < 0.5 * (logits[1] - logits[0]).square().sum()


def test_steps_and_rates_are_reported(fitted: Any) -> None:
    _, result, heard = fitted
    assert result.steps == len(heard.steps) == 4 * 4 * 5
    assert [step.step for step in heard.steps] == list(range(1, 81))
    rates = [step.learning_rate for step in heard.steps[:20]]
    assert rates == pytest.approx([3e-3 * (1 - at / 20) for at in range(20)])
    assert heard.steps[20].learning_rate == 3e-3
    assert [point["step"] for point in result.curve] == list(range(1, 81))
    assert result.curve[0]["block"] == "embeddings"
    assert result.curve[0]["loss"] == heard.steps[0].loss


def test_the_teacher_and_the_modes_stay(bert: ModelGraph, batches: Any, tmp_path: Path) -> None:
    before = _state(bert)
    student = _student(bert).train()
    modes = [part.training for part in student.module.modules()]
    _fit(tmp_path, student, bert, batches, epochs=1)
    assert _equal(_state(bert), before)
    assert [part.training for part in student.module.modules()] == modes
    assert all(
        parameter.grad is None for parameter in (*student.model.parameters(), *bert.model.parameters())
    )
    assert all(parameter.requires_grad for parameter in student.model.parameters())


@pytest.mark.parametrize("rank", [None, 32])
def test_a_lossless_student_stays_put(
    bert: ModelGraph, batches: Any, tmp_path: Path, rank: int | None
) -> None:
    """Also where it is equal up to rounding: Adam would make whole steps of that."""
    calls = [PassCall(name="low-rank", scope=Scope(targets=["@attention.*"]), options={"rank": rank})]
    student = _student(bert, calls if rank else [])
    before = _state(student)
    result = _fit(tmp_path, student, bert, batches)
    assert _equal(_state(student), before)
    assert [block.idle for block in result.blocks] == ["not rewritten", *["as the teacher's"] * 3]
    assert result.blocks[1].after <= 1e-9


def test_the_error_is_that_of_the_layer_over_tokens(bert: ModelGraph, batches: Any) -> None:
    """Against the models' own layers, run by hooks; padding is as if it were not there."""
    student = _student(bert)
    waves = [Wavefront(graph, batches) for graph in (student, bert)]
    pair = pair_blocks(student, bert)[1]
    assert pair.name == "layer 0"
    task = BlockTask(pair, waves[0], waves[1], (student, bert))
    error = size = 0.0
    for batch in batches:
        values: list[torch.Tensor] = []
        for graph in (student, bert):
            layer = graph.model.bert.encoder.layer[0]
            hook = layer.register_forward_hook(lambda _m, _a, out, into=values: into.append(out))
            with torch.no_grad():
                graph.model(**batch)
            hook.remove()
        tokens = batch["attention_mask"].bool()
        error += (values[0] - values[1])[tokens].double().square().sum().item()
        size += values[1][tokens].double().square().sum().item()
    assert task.error() == pytest.approx(error / size, rel=1e-5)
    counts = torch.tensor([float(batch["attention_mask"].sum()) for batch in batches])
    losses = torch.tensor([task.loss(index).item() for index in range(len(batches))])
    assert float((losses * counts).sum() / counts.sum()) == pytest.approx(error / size, rel=1e-5)


@pytest.mark.parametrize("at", [7, 20, 47])
def test_a_killed_run_goes_on_to_the_same_bits(
    bert: ModelGraph, batches: Any, fitted: Any, tmp_path: Path, at: int
) -> None:
    def die() -> None:
        raise SystemExit

    with pytest.raises(SystemExit):
        _fit(tmp_path, _student(bert), bert, batches, Heard(at, die))
    student, heard = _student(bert), Heard()
    result = _fit(tmp_path, student, bert, batches, heard)
    assert result.resumed_from == (at - 1) // 20
    assert heard.steps[0].step == result.resumed_from * 20 + 1
    assert _equal(_state(student), _state(fitted[0]))
    done = [block.model_dump(exclude={"seconds"}) for block in result.blocks]
    assert done == [block.model_dump(exclude={"seconds"}) for block in fitted[1].blocks]


def test_ctrl_c_ends_after_the_step_it_is_in(
    bert: ModelGraph, batches: Any, fitted: Any, tmp_path: Path
) -> None:
    heard = Heard(33, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(RunError, match=r"K810: interrupted in step 'fit', in block 2 of 4 \(layer 0\)"):
        _fit(tmp_path, _student(bert), bert, batches, heard)
    assert len(heard.steps) == 33
    student = _student(bert)
    assert _fit(tmp_path, student, bert, batches).resumed_from == 1
    assert _equal(_state(student), _state(fitted[0]))


def test_damaged_and_foreign_blocks_are_fitted_anew(
    bert: ModelGraph, batches: Any, fitted: Any, tmp_path: Path
) -> None:
    _fit(tmp_path, _student(bert), bert, batches)
    weights = tmp_path / "kept" / "0003" / "block.safetensors"
    stored = bytearray(weights.read_bytes())
    stored[-1] ^= 1
    weights.write_bytes(stored)
    student, heard = _student(bert), Heard()
    assert _fit(tmp_path, student, bert, batches, heard).resumed_from == 2
    assert heard.messages[0] == "fit: resuming after block 2 of 4"
    assert _equal(_state(student), _state(fitted[0]))
    assert _fit(tmp_path, _student(bert), bert, batches, stage_hash="two").resumed_from == 0


def test_values_in_files_change_no_bit(
    bert: ModelGraph, batches: Any, fitted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KEPT", 0)
    student = _student(bert)
    _fit(tmp_path, student, bert, batches)
    assert _equal(_state(student), _state(fitted[0]))


def test_another_seed_is_another_order(bert: ModelGraph, batches: Any, fitted: Any, tmp_path: Path) -> None:
    student = _student(bert)
    _fit(tmp_path, student, bert, batches, seed=1)
    assert not _equal(_state(student), _state(fitted[0]))


def test_a_block_that_gets_worse_keeps_its_weights(bert: ModelGraph, batches: Any, tmp_path: Path) -> None:
    student, heard = _student(bert), Heard()
    before = _state(student)
    result = _fit(tmp_path, student, bert, batches, heard, learning_rate=3.0)
    kept = [block for block in result.blocks if block.after == block.before]
    assert kept
    assert (
        f"{kept[0].name}: error {kept[0].before:.4g} -> {kept[0].before:.4g}, the weights stay"
        in " ".join(heard.messages)
    )
    names = next(pair.trained for pair in pair_blocks(student, bert) if pair.name == kept[0].name)
    after = dict(student.module.named_parameters())
    was = dict(_student(bert).module.named_parameters())
    assert all(torch.equal(after[name], was[name]) for name in names)
    assert before.keys() == _state(student).keys()


def test_a_loss_that_is_no_number_is_an_error(bert: ModelGraph, batches: Any, tmp_path: Path) -> None:
    student = _student(bert)
    with torch.no_grad():
        student.model.bert.encoder.layer[1].output.LayerNorm.weight[0] = float("inf")
    with pytest.raises(RunError, match=r"K811: the loss is nan at step 1 of 20 of block 3 \(layer 1\)"):
        _fit(tmp_path, student, bert, batches)
    assert (tmp_path / "kept" / "0002" / "position.json").is_file()


def test_a_model_with_nothing_to_train(bert: ModelGraph, batches: Any, tmp_path: Path) -> None:
    student = _student(bert)
    student.model.requires_grad_(False)
    with pytest.raises(RunError, match="K814"):
        _fit(tmp_path, student, bert, batches)


def test_a_layer_that_is_called_again_is_fitted_once(tiny: Any, inputs_for: Any, tmp_path: Path) -> None:
    teacher = capture(tiny("albert"))
    rows = [inputs_for(teacher.inputs, batch=6, length=6 + at, seed=at) for at in range(3)]
    calls = [PassCall(name="low-rank", scope=Scope(targets=["@ffn.*"]), options={"rank": 6})]
    result = _fit(tmp_path, _student(teacher, calls), teacher, rows, epochs=6)
    assert [block.name for block in result.blocks if block.steps] == ["layers 0-1", "head"]
    assert all(block.after < block.before for block in result.blocks if block.steps)


# --- as a step of a recipe


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, text and a recipe."""
    root = tmp_path_factory.mktemp("root")
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *["a", "the", "good", "bad", "film", "plot", "cast", "is", "was", "very"],
    ]
    (root / "model").mkdir()
    (root / "vocab.txt").write_text("\n".join(words) + "\n")
    config = transformers.BertConfig(
        vocab_size=len(words) + 1,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=24,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(root / "model")
    transformers.BertTokenizerFast(vocab=str(root / "vocab.txt")).save_pretrained(root / "model")
    generator = torch.Generator().manual_seed(0)
    lines = [
        " ".join(words[5 + int(at)] for at in torch.randint(10, (3 + row % 7,), generator=generator))
        for row in range(90)
    ]
    (root / "text.txt").write_text("\n".join(lines) + "\n")
    return root


def _recipe(root: Path, **options: Any) -> Path:
    passes = [
        {"kronecker": {"targets": ["@attention.*"], "a": [16, 16], "b": [2, 2]}},
        {"low-rank": {"targets": ["@ffn.*"], "rank": 8}},
    ]
    step = {"student": "small", "teacher": "base", "data": "d", "rows": 64, "batch_size": 8, "epochs": 2}
    recipe = {
        "kroncc": 1,
        "name": "x",
        "model": {"source": "model"},
        "data": {"d": {"source": "text", "files": "text.txt", "max_length": 16}},
        "steps": {
            "small": {"compress": {"model": "base", "passes": passes}},
            "fitted": {"reconstruct": {**step, "learning_rate": 3e-3, **options}},
            "report": {
                "evaluate": {
                    "models": ["small", "fitted"],
                    "data": "d",
                    "split": "train",
                    "metrics": ["fidelity"],
                    "against": "base",
                }
            },
        },
        "expect": {"fitted.fidelity.cosine": ">= small.fidelity.cosine", "fitted.params": "== small.params"},
    }
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def plan(root: Path) -> Plan:
    return compile_recipe(load_recipe(_recipe(root)))


@pytest.fixture(scope="module")
def done(root: Path, plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Heard]:
    """The run directory of the whole recipe, and what the run told."""
    run, heard = tmp_path_factory.mktemp("done") / "run", Heard()
    assert execute(plan, run, root, reporter=heard).finished == ("small", "fitted", "report")
    return run, heard


def test_the_plan_of_the_step(plan: Plan) -> None:
    stage = plan.stages[1]
    assert (stage.kind, stage.needs, stage.seed) == ("reconstruct", ("small",), 0)
    assert stage.steps == 3 * 2 * 8  # blocks (the embeddings are the teacher's), epochs, batches
    assert stage.flops is not None
    assert plan.models["fitted"] == plan.models["small"]


def test_the_step_runs_and_is_stored(root: Path, plan: Plan, done: tuple[Path, Heard]) -> None:
    run, heard = done
    steps = plan.stages[1].steps
    assert len(heard.steps) == steps
    report = json.loads((run / "steps" / "fitted" / "report.json").read_text())
    assert [block["name"] for block in report["blocks"]] == ["embeddings", "layer 0", "layer 1", "head"]
    assert len(report["curve"]) == steps
    record = json.loads((run / "steps" / "fitted" / "stage.json").read_text())
    assert "curve" not in record["details"]
    assert record["details"]["blocks"] == report["blocks"]
    small, fitted = (load(run / "steps" / name) for name in ("small", "fitted"))
    assert small.config.quantization_config.to_dict() == fitted.config.quantization_config.to_dict()
    assert small.state_dict().keys() == fitted.state_dict().keys()
    assert not (run / "checkpoints").exists()
    assert not (run / "cache").exists()
    assert execute(plan, run, root).skipped == ("small", "fitted", "report")


def test_an_interrupted_apply_goes_on_to_the_same_bits(
    root: Path, plan: Plan, done: tuple[Path, Heard], tmp_path: Path
) -> None:
    heard = Heard(25, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(RunError, match="K810"):
        execute(plan, tmp_path / "run", root, reporter=heard)
    assert (tmp_path / "run" / "checkpoints" / "fitted" / "0002").is_dir()
    heard = Heard()
    execute(plan, tmp_path / "run", root, reporter=heard, until="fitted")
    assert "fitted: resuming after block 2 of 4" in heard.messages
    whole, again = (load(run / "steps" / "fitted").state_dict() for run in (done[0], tmp_path / "run"))
    assert _equal(whole, again)


def test_a_split_that_is_not_there_is_refused_while_planning(root: Path) -> None:
    with pytest.raises(Exception, match=r"K607: .*steps.fitted.reconstruct.split"):
        compile_recipe(load_recipe(_recipe(root, split="dev")))


def test_layers_that_differ_are_refused_while_planning(root: Path) -> None:
    path = _recipe(root)
    recipe = yaml.safe_load(path.read_text())
    recipe["steps"]["small"]["compress"]["passes"] = [{"drop-layers": {"keep": 1}}]
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    with pytest.raises(PlanError, match="K761: the student has 1 layers and the teacher 2"):
        compile_recipe(load_recipe(path))
