import json
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

from kroncc.compiler import compile_recipe
from kroncc.errors import KronccError, PlanError, RunError
from kroncc.model.load import load
from kroncc.plan.stages import Plan
from kroncc.recipe.loader import load_recipe
from kroncc.rewrite.registry import schemas
from kroncc.run.executor import RunResult, Unmet, execute
from kroncc.run.journal import read_journal
from kroncc.run.progress import NullReporter, Step

WORDS = [
    "good",
    "fine",
    "great",
    "nice",
    "bad",
    "awful",
    "poor",
    "sad",
    "film",
    "plot",
    "cast",
    "music",
    "a",
    "the",
]


def make_model(directory: Path) -> None:
    """A tiny random BERT with its tokenizer."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    directory.mkdir(parents=True)
    (directory / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    tokenizer = transformers.BertTokenizerFast(vocab=str(directory / "vocab.txt"))
    config = transformers.BertConfig(
        vocab_size=len(vocabulary) + 1,  # even, so that an embedding can be factored
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=24,
        initializer_range=0.2,  # large enough to learn from in a few steps
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def make_rows(path: Path, count: int, seed: int) -> None:
    """Sentences whose label is whether their adjective is a kind one."""
    generator = torch.Generator().manual_seed(seed)
    lines = ["sentence,label"]
    for _ in range(count):
        adjective = int(torch.randint(8, (), generator=generator))
        nouns = torch.randint(
            8, 14, (int(torch.randint(1, 7, (), generator=generator)),), generator=generator
        )
        words = [WORDS[adjective], *(WORDS[int(noun)] for noun in nouns)]
        lines.append(f"{' '.join(words)},{int(adjective < 4)}")
    path.write_text("\n".join(lines) + "\n")


KRONECKER = [
    {"kronecker": {"targets": ["@attention.*"], "a": [16, 16], "b": [2, 2]}},
    {"kronecker": {"targets": ["@ffn.up"], "a": [8, 2], "b": [8, 16]}},
]


def make_recipe(root: Path, **changes: Any) -> Path:
    training = {"data": "tones", "batch_size": 16, "learning_rate": 3e-3}
    steps: dict[str, Any] = {
        "teacher": {"finetune": {"model": "base", "epochs": 6, **training, "evaluate_every": 20}},
        "factored": {"compress": {"model": "teacher", "passes": KRONECKER}},
        "task": {
            "distill": {
                "student": "factored",
                "teacher": "teacher",
                "epochs": 2,
                **training,
                "losses": [
                    {"mse": {"at": "embeddings"}},
                    {"mse": {"at": "attention.scores"}},
                    {"mse": {"at": "ffn.output"}},
                    {"kl": {"at": "logits", "temperature": 2.0}},
                    {"task": {}},
                ],
            }
        },
        "report": {
            "evaluate": {
                "models": ["teacher", "task"],
                "data": "tones",
                "metrics": ["accuracy", "fidelity"],
                "against": "teacher",
            }
        },
        "out": {"export": {"model": "task", "dtype": "bf16"}},
    }  # fmt: skip
    recipe = {
        "kroncc": 1,
        "name": "tiny",
        "model": {"source": "model", "task": "text-classification", "labels": 2},
        "data": {
            "tones": {
                "source": "csv",
                "files": {"train": "train.csv", "validation": "dev.csv"},
                "text": ["sentence"],
                "label": "label",
                "max_length": 16,
            }
        },
        "steps": steps,
        "expect": {"task.accuracy": ">= 0.5 * teacher.accuracy", "factored.params": "< teacher.params"},
    }
    for key, value in changes.items():
        recipe[key] = {**recipe[key], **value} if isinstance(value, dict) else value
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and data, made once."""
    root = tmp_path_factory.mktemp("ground")
    make_model(root / "model")
    make_rows(root / "train.csv", 160, 1)
    make_rows(root / "dev.csv", 48, 2)
    return root


@pytest.fixture
def root(ground: Path, tmp_path: Path) -> Path:
    """A folder of its own for one test's recipe."""
    for name in ("model", "train.csv", "dev.csv"):
        (tmp_path / name).symlink_to(ground / name)
    return tmp_path


class Heard(NullReporter):
    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self.messages: list[str] = []
        self.steps: list[Step] = []

    def stage_started(self, stage: str, kind: str, total: int | None) -> None:
        self.events.append(("started", stage))

    def stage_skipped(self, stage: str, reason: str) -> None:
        self.events.append(("skipped", stage))

    def step(self, stage: str, step: Step) -> None:
        self.steps.append(step)

    def stage_finished(self, stage: str, values: Any, seconds: float) -> None:
        self.events.append(("finished", stage))

    def message(self, text: str) -> None:
        self.messages.append(text)


def plan(root: Path, **changes: Any) -> Plan:
    return compile_recipe(load_recipe(make_recipe(root, **changes)))


def run(
    root: Path, made: Plan, reporter: Heard | None = None, name: str = "run", **options: Any
) -> RunResult:
    return execute(made, root / name, root, reporter=reporter or Heard(), **options)


@pytest.fixture(scope="module")
def done(ground: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan, RunResult, Heard]:
    """The whole recipe, run once."""
    root = tmp_path_factory.mktemp("done")
    for name in ("model", "train.csv", "dev.csv"):
        (root / name).symlink_to(ground / name)
    heard = Heard()
    made = plan(root)
    return root, made, run(root, made, heard), heard


def test_the_whole_recipe_runs_in_order(done) -> None:
    root, _, result, heard = done
    order = ["teacher", "factored", "task", "report", "out"]
    assert result.finished == tuple(order)
    assert heard.events == [event for name in order for event in (("started", name), ("finished", name))]
    assert result.values["teacher.accuracy"] >= 0.9
    assert result.values["task.accuracy"] >= 0.8
    assert result.values["report.task.accuracy"] == result.values["task.accuracy"]
    assert result.values["teacher.fidelity.agreement"] == 1.0
    assert result.values["factored.params"] < result.values["base.params"]
    assert sorted(path.name for path in (root / "run").iterdir()) == [
        ".lock", "data", "journal.jsonl", "plan.json", "steps",
    ]  # fmt: skip
    assert not [path for path in (root / "run" / "steps").iterdir() if path.name.startswith(".")]


def test_every_model_step_is_a_complete_directory(done) -> None:
    root, made, _, _ = done
    for name in ("teacher", "factored", "task", "out"):
        step = root / "run" / "steps" / name
        files = {path.name for path in step.iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json", "recipe.yaml", "report.json"} <= files
        again = load_recipe(step / "recipe.yaml", passes=schemas()).recipe
        assert again.model_dump(mode="json", exclude_defaults=True) == made.recipe
        report = json.loads((step / "report.json").read_text())
        model = load(step)
        assert report["params"] == sum(parameter.numel() for parameter in model.parameters())
    report = json.loads((root / "run" / "steps" / "task" / "report.json").read_text())
    assert report["curve"][0]["loss"] > report["curve"][-1]["loss"]
    assert {"mse(embeddings)", "kl(logits)", "task"} <= report["curve"][0].keys()
    teacher = json.loads((root / "run" / "steps" / "teacher" / "report.json").read_text())
    assert [point["step"] for point in teacher["curve"] if "validation_loss" in point] == [20, 40, 60]


def test_the_measured_accuracy_is_that_of_the_reloaded_model(done) -> None:
    root, _, result, _ = done
    step = root / "run" / "steps" / "task"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(step).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(step)
    rows = [line.split(",") for line in (root / "dev.csv").read_text().splitlines()[1:]]
    with torch.no_grad():
        logits = model(**tokenizer([row[0] for row in rows], padding=True, return_tensors="pt")).logits
    right = (logits.argmax(-1) == torch.tensor([int(row[1]) for row in rows])).float().mean().item()
    assert result.values["task.accuracy"] == pytest.approx(right)
    exported = transformers.AutoModelForSequenceClassification.from_pretrained(
        root / "run" / "steps" / "out", dtype="auto"
    )
    assert exported.dtype == torch.bfloat16


def test_running_again_skips_everything_and_says_so(done) -> None:
    root, made, result, _ = done
    before = {path: path.stat().st_mtime_ns for path in (root / "run" / "steps").rglob("*")}
    heard = Heard()
    again = run(root, made, heard)
    assert again.finished == ()
    assert heard.events == [("skipped", name) for name in result.finished]
    assert again.values == result.values
    assert before == {path: path.stat().st_mtime_ns for path in (root / "run" / "steps").rglob("*")}
    events = [event["event"] for event in read_journal(root / "run" / "journal.jsonl")]
    assert events.count("stage_finished") == 5
    assert events.count("stage_skipped") == 5
    assert events[-1] == "run_finished"


def test_the_same_recipe_gives_the_same_bits(done, root: Path) -> None:
    first = done[0]
    again = run(root, plan(root), until="task")
    assert again.finished == ("teacher", "factored", "task")
    for name in again.finished:
        one, two = (load(place / "run" / "steps" / name).state_dict() for place in (first, root))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert "task.accuracy" not in again.values


def test_a_changed_step_runs_again_with_those_after_it_and_no_others(root: Path) -> None:
    short = {"max_steps": 2, "data": "tones", "batch_size": 8}
    steps = {
        "teacher": {"finetune": {"model": "base", **short}},
        "small": {"compress": {"model": "teacher", "passes": KRONECKER[:1]}},
        "out": {"export": {"model": "small"}},
        "other": {"export": {"model": "base"}},
    }

    def recipe(**change: Any) -> Plan:
        path = make_recipe(root, expect={})
        whole = yaml.safe_load(path.read_text())
        whole["steps"] = {**steps, "teacher": {"finetune": {"model": "base", **short, **change}}}
        whole["expect"] = {}
        path.write_text(yaml.safe_dump(whole, sort_keys=False))
        return compile_recipe(load_recipe(path))

    run(root, recipe())
    assert run(root, recipe(learning_rate=1e-4)).finished == ("teacher", "small", "out")
    assert run(root, recipe(learning_rate=1e-4), fresh=True).skipped == ()


def test_a_step_whose_file_is_gone_runs_again(done) -> None:
    root, made, _, _ = done
    (root / "run" / "steps" / "out" / "model.safetensors").unlink()
    again = run(root, made)
    assert again.finished == ("out",)


def test_a_step_whose_file_was_changed_runs_again(done) -> None:
    root, made, _, _ = done
    weights = root / "run" / "steps" / "out" / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    heard = Heard()
    assert run(root, made, heard).finished == ("out",)
    assert heard.messages == [f"out: {weights} was changed afterwards; the step runs again"]


def test_how_often_to_look_is_no_part_of_the_result(done) -> None:
    root, made, result, _ = done
    steps = yaml.safe_load((root / "recipe.yaml").read_text())["steps"]
    steps["teacher"]["finetune"].update(checkpoint_every=7, evaluate_every=9)
    again = run(root, plan(root, steps=steps))
    assert again.skipped == result.finished
    steps["teacher"]["finetune"].update(weight_decay=0.02)
    hashes = [stage.hash for stage in plan(root, steps=steps).stages]
    assert hashes[0] != made.stages[0].hash


def test_export_to_a_folder_of_its_own(root: Path) -> None:
    steps = {"out": {"export": {"model": "base", "to": "given/model"}}}
    path = make_recipe(root)
    whole = yaml.safe_load(path.read_text())
    whole.update(steps=steps, data={}, expect={})
    path.write_text(yaml.safe_dump(whole))
    made = compile_recipe(load_recipe(path))
    assert run(root, made).finished == ("out",)
    assert (root / "given" / "model" / "model.safetensors").is_file()
    assert (root / "given" / "model" / "tokenizer.json").is_file()
    assert run(root, made).skipped == ("out",)
    (root / "given" / "model" / "config.json").unlink()
    (root / "given" / "model" / "precious.txt").write_text("mine")
    with pytest.raises(RunError, match="K805"):
        run(root, made)
    assert (root / "given" / "model" / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize("to", ["webapp", "model", "run/steps/x", "."])
def test_export_spares_what_it_did_not_write(root: Path, to: str) -> None:
    (root / "webapp/src").mkdir(parents=True)
    (root / "webapp/config.json").write_text("{}")
    (root / "webapp/src/thesis.txt").write_text("mine")
    path = make_recipe(root)
    whole = yaml.safe_load(path.read_text())
    source = root / whole["model"]["source"]
    target = str(source) if to == "model" else to
    whole.update(steps={"out": {"export": {"model": "base", "to": target}}}, data={}, expect={})
    path.write_text(yaml.safe_dump(whole))
    before = sorted(file for file in source.rglob("*"))
    with pytest.raises(KronccError, match="K827"):  # while planning; where only a run knows, then
        run(root, compile_recipe(load_recipe(path)))
    assert (root / "webapp/src/thesis.txt").read_text() == "mine"
    assert sorted(file for file in source.rglob("*")) == before


def test_an_unmet_expectation_stops_early_with_numbers(root: Path) -> None:
    steps = yaml.safe_load(make_recipe(root).read_text())["steps"]
    steps["teacher"]["finetune"]["epochs"] = 1
    steps["early"] = {"evaluate": {"models": ["teacher"], "data": "tones", "metrics": ["accuracy"]}}
    order = {name: steps[name] for name in ("teacher", "early", "factored", "out")}
    order["out"]["export"]["model"] = "factored"
    whole = yaml.safe_load((root / "recipe.yaml").read_text())
    whole.update(steps=order, expect={"teacher.accuracy": "> 1.5"})
    (root / "recipe.yaml").write_text(yaml.safe_dump(whole, sort_keys=False))
    heard = Heard()
    with pytest.raises(Unmet) as caught:
        run(root, compile_recipe(load_recipe(root / "recipe.yaml")), heard)
    assert caught.value.exit_code == 1
    assert caught.value.result.finished == ("teacher", "early")
    assert caught.value.result.values["teacher.accuracy"] <= 1.0
    assert "K820" in str(caught.value)
    assert "wanted > 1.5" in str(caught.value)
    assert heard.events[-1] == ("finished", "early")
    with pytest.raises(RunError, match="K820"):  # known at once the next time
        run(root, compile_recipe(load_recipe(root / "recipe.yaml")))


def test_until_names_a_step(root: Path) -> None:
    with pytest.raises(PlanError, match="did you mean"):
        run(root, plan(root), until="teachr")
    assert not (root / "run").exists()


def test_feature_extraction_distils_with_a_cached_teacher(root: Path) -> None:
    def recipe(cached: bool) -> Plan:
        distill = {
            "student": "small", "teacher": "base", "data": "plain", "epochs": 3, "batch_size": 16,
            "learning_rate": 1e-3, "cache_teacher": cached,
            "losses": [{"cosine": {"at": "sentence"}}, {"mse": {"at": "hidden"}}],
        }  # fmt: skip
        whole = {
            "kroncc": 1,
            "name": "sentences",
            "model": {"source": "model"},
            "data": {"plain": {"source": "csv", "files": {"train": "train.csv", "validation": "dev.csv"},
                               "text": ["sentence"], "max_length": 16}},
            "steps": {
                "small": {"compress": {"model": "base", "passes": KRONECKER}},
                "followed": {"distill": distill},
                "report": {"evaluate": {"models": ["small", "followed"], "data": "plain", "against": "base",
                                        "metrics": ["fidelity"]}},
            },
        }  # fmt: skip
        (root / "recipe.yaml").write_text(yaml.safe_dump(whole, sort_keys=False))
        return compile_recipe(load_recipe(root / "recipe.yaml"))

    heard = Heard()
    values = run(root, recipe(True), heard, "cached").values
    assert not heard.messages
    assert values["followed.fidelity.cosine"] > values["small.fidelity.cosine"]
    assert not (root / "cached" / "cache" / "followed").exists()
    plain = run(root, recipe(False), name="plain").values
    assert values["followed.fidelity.cosine"] == pytest.approx(plain["followed.fidelity.cosine"], abs=1e-5)


# --- what goes wrong


def test_nan_names_the_stage(root: Path) -> None:
    steps = yaml.safe_load(make_recipe(root).read_text())["steps"]
    steps["teacher"]["finetune"].update(learning_rate=1e30, clip=None, schedule="constant", weight_decay=0.0)
    whole = yaml.safe_load((root / "recipe.yaml").read_text())
    whole.update(steps={"teacher": steps["teacher"]}, expect={})
    (root / "recipe.yaml").write_text(yaml.safe_dump(whole, sort_keys=False))
    with pytest.raises(RunError, match=r"K81[12].*at optimiser step \d+ of 60 in step 'teacher'"):
        run(root, compile_recipe(load_recipe(root / "recipe.yaml")))
    assert list((root / "run" / "steps").iterdir()) == []
    events = read_journal(root / "run" / "journal.jsonl")
    assert events[-1]["event"] == "run_failed"


def tiny_plan(root: Path, **finetune: Any) -> Plan:
    whole = yaml.safe_load(make_recipe(root).read_text())
    options = {"model": "base", "data": "tones", "batch_size": 8, "max_steps": 3, **finetune}
    whole.update(steps={"teacher": {"finetune": options}}, expect={})
    (root / "recipe.yaml").write_text(yaml.safe_dump(whole, sort_keys=False))
    return compile_recipe(load_recipe(root / "recipe.yaml"))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_out_of_memory_says_what_to_lower(root: Path, error: Exception) -> None:
    class Greedy(Heard):
        def step(self, stage: str, step: Step) -> None:
            raise error

    with pytest.raises(RunError) as caught:
        run(root, tiny_plan(root), Greedy())
    text = str(caught.value)
    assert "K813" in text
    assert "'teacher'" in text
    assert "batch_size (now 8)" in text
    assert "max_length" in text
    assert list((root / "run" / "steps").iterdir()) == []


def test_really_out_of_memory(root: Path) -> None:
    class Greedy(Heard):
        def step(self, stage: str, step: Step) -> None:
            torch.empty(2**60, dtype=torch.uint8)

    with pytest.raises(RunError, match="K813"):
        run(root, tiny_plan(root), Greedy())


def test_ctrl_c_outside_training_is_a_plain_error(root: Path) -> None:
    class Impatient(Heard):
        def stage_started(self, stage: str, kind: str, total: int | None) -> None:
            super().stage_started(stage, kind, total)

        def step(self, stage: str, step: Step) -> None:
            raise KeyboardInterrupt

    with pytest.raises(RunError, match="K810"):
        run(root, tiny_plan(root), Impatient())


def test_ctrl_c_in_training_goes_on_to_the_same_bits(root: Path) -> None:
    class Impatient(Heard):
        def step(self, stage: str, step: Step) -> None:
            if step.step == 4:
                os.kill(os.getpid(), signal.SIGINT)

    made = tiny_plan(root, max_steps=10)
    run(root, made, name="straight")
    with pytest.raises(RunError, match="K810"):
        run(root, made, Impatient())
    heard = Heard()
    run(root, made, heard)
    assert "resuming after step 5 of 10" in heard.messages[0]
    assert heard.steps[0].step == 6
    one, two = (load(root / name / "steps" / "teacher").state_dict() for name in ("straight", "run"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not (root / "run" / "checkpoints" / "teacher").exists()


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small disk")
def test_a_full_disk_leaves_nothing_half_written(root: Path) -> None:
    made = tiny_plan(root)
    small = root / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(small)], check=False)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(RunError, match="K803"):
            execute(made, small / "run", root, reporter=Heard())
        assert list((small / "run" / "steps").iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_missing_model_file_is_a_plain_error(root: Path) -> None:
    made = tiny_plan(root)
    run(root, made, until="teacher")
    weights = root / "run" / "steps" / "teacher" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    assert run(root, made).finished == ("teacher",)  # a truncated step is made again


def test_labels_that_do_not_fit_the_head(root: Path) -> None:
    lines = (root / "train.csv").read_text().splitlines()
    (root / "train.csv").unlink()
    (root / "train.csv").write_text("\n".join([*lines, "good film,7"]) + "\n")
    with pytest.raises(KronccError, match="K611"):
        run(root, tiny_plan(root))


SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
from pathlib import Path
import test_executor as t
root = Path(sys.argv[1])
class Slow(t.Heard):
    def step(self, stage, step):
        print(step.step, flush=True)
        import time; time.sleep(float(sys.argv[3]))
made = t.compile_recipe(t.load_recipe(root / "recipe.yaml"))
t.run(root, made, Slow(), sys.argv[2])
"""


def write_script(root: Path) -> Path:
    script = root / "script.py"
    script.write_text(SCRIPT.format(folder=str(Path(__file__).parent)))
    return script


def start(root: Path, name: str, pause: float) -> subprocess.Popen[str]:
    script = write_script(root)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script), str(root), name, str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.long
def test_a_killed_run_goes_on_to_the_same_bits_and_the_lock_is_free(root: Path) -> None:
    made = tiny_plan(root, max_steps=12, checkpoint_every=3)
    first = start(root, "run", 0.1)
    assert first.stdout is not None
    for line in first.stdout:
        if int(line) == 8:
            break
    with pytest.raises(RunError, match="K801"):
        run(root, made)
    first.kill()
    first.communicate(timeout=60)
    heard = Heard()
    run(root, made, heard)
    assert "resuming after step 6 of 12" in heard.messages[0]
    run(root, made, name="straight")
    one, two = (load(root / name / "steps" / "teacher").state_dict() for name in ("straight", "run"))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.long
def test_two_processes_run_the_same_recipe(root: Path) -> None:
    path = make_recipe(root)
    whole = yaml.safe_load(path.read_text())
    for name, kind in (("teacher", "finetune"), ("task", "distill")):
        whole["steps"][name][kind].update(epochs=1)
    config = json.loads((root / "model" / "config.json").read_text())
    still = root / "still"
    still.mkdir()
    for file in (root / "model").iterdir():
        (still / file.name).symlink_to(file.resolve())
    (still / "config.json").unlink()
    config.update(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    (still / "config.json").write_text(json.dumps(config))
    whole["model"]["source"] = "still"
    whole["expect"] = {}
    whole["steps"]["task"]["distill"]["losses"] = [{"kl": {"at": "logits"}}, {"task": {}}]
    path.write_text(yaml.safe_dump(whole, sort_keys=False))
    run(root, compile_recipe(load_recipe(path)), name="one")
    script = write_script(root)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += [
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    finished = subprocess.run(
        [*launch, str(script), str(root), "two", "0"],
        env={**environment, "ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True, timeout=500,
        check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    for name in ("teacher", "factored", "task"):
        one, two = (load(root / place / "steps" / name).state_dict() for place in ("one", "two"))
        for key in one:
            # softmax does not feel a key's bias: its gradient is rounding noise, which Adam blows up
            if not key.endswith("self.key.bias"):
                assert torch.allclose(one[key], two[key], atol=1e-5), (name, key)
    assert (root / "two" / "steps" / "report" / "report.json").is_file()
