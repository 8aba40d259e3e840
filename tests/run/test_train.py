import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from kroncc.errors import RunError
from kroncc.recipe.schema import Training
from kroncc.run.progress import NullReporter, Step
from kroncc.run.steps import batch_count, learning_rate, shard, step_count, work
from kroncc.run.train import TrainJob, train


class Rows:
    """32 rows of a noisy linear map, in batches of `size` that change with the epoch."""

    def __init__(self, size: int, rows: int = 32, poison: int | None = None) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(rows, 6, generator=generator)
        self.y = self.x @ torch.randn(6, 2, generator=generator)
        if poison is not None:
            self.y[poison] = math.nan
        self.size = size

    def epoch(self, number: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(number)
        order = torch.randperm(len(self.x), generator=generator).tolist()
        return [order[start : start + self.size] for start in range(0, len(order), self.size)]

    def collate(self, rows, epoch=0) -> dict[str, torch.Tensor]:
        return {"x": self.x[list(rows)], "y": self.y[list(rows)]}


class Objective(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(dropout), nn.GELU(), nn.Linear(8, 2))
        self.unused = nn.Linear(2, 2)

    def forward(self, batch, taught, progress):
        target = batch["y"] if taught is None else taught
        loss = (self.net(batch["x"]) - target).square().mean()
        return loss, {"square": loss.detach()}


class Heard(NullReporter):
    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.messages: list[str] = []

    def step(self, stage: str, step: Step) -> None:
        self.steps.append(step)

    def message(self, text: str) -> None:
        self.messages.append(text)


def job(tmp_path: Path, objective: nn.Module, source: Rows | None = None, **options) -> TrainJob:
    extra = {key: options.pop(key) for key in ("teacher", "validation", "seed") if key in options}
    settings = {"data": "d", "max_steps": 12, "batch_size": 8, "learning_rate": 0.05, **options}
    return TrainJob(
        stage="s",
        hash="h",
        objective=objective,
        tree=objective,
        source=source or Rows(settings["batch_size"]),
        options=Training(**settings),
        checkpoints=tmp_path / "checkpoints" / "s",
        **extra,
    )


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# --- the arithmetic of steps


@pytest.mark.parametrize(
    ("options", "batches", "steps"),
    [
        ({"epochs": 2.0}, 8, 8),
        ({"epochs": 0.5}, 2, 2),
        ({"epochs": 1.0, "accumulate": 3}, 4, 2),
        ({"epochs": 0.01}, 1, 1),
        ({"max_steps": 5, "accumulate": 2}, 10, 5),
    ],
)
def test_counts(options, batches: int, steps: int) -> None:
    source, training = Rows(8), Training(data="d", batch_size=8, **options)
    assert batch_count(source, training) == batches
    assert step_count(source, training) == steps
    items = list(work(source, training))
    assert [item.step for item in items] == list(range(1, steps + 1))
    assert sum(len(item.batches) for item in items) == batches


def test_work_goes_on_where_it_stopped() -> None:
    training = Training(data="d", epochs=3, accumulate=2)
    assert list(work(Rows(8), training))[2:] == list(work(Rows(8), training, done=2))


def test_every_epoch_sees_every_row_once() -> None:
    items = list(work(Rows(5), Training(data="d", epochs=2)))
    batches = [batch for item in items for batch in item.batches]
    rows = [row for batch in batches for row in batch.rows]
    assert [batch.epoch for batch in batches] == [0] * 7 + [1] * 7
    assert sorted(rows) == sorted([*range(32), *range(32)])


def test_shards_split_a_batch_and_fill_up() -> None:
    assert shard([4, 5, 6], 0, 2) == ([4, 6], 2)
    assert shard([4, 5, 6], 1, 2) == ([5], 1)
    assert shard([4], 1, 2) == ([4], 0)


def test_learning_rates() -> None:
    def rates(schedule: str, warmup: float) -> list[float]:
        training = Training(data="d", max_steps=4, learning_rate=1.0, schedule=schedule, warmup=warmup)
        return [learning_rate(training, step, 4) for step in range(1, 5)]

    assert rates("linear", 0.0) == [1.0, 0.75, 0.5, 0.25]
    assert rates("constant", 0.0) == [1.0] * 4
    assert rates("linear", 0.5) == pytest.approx([1 / 3, 2 / 3, 1.0, 0.5])
    assert rates("cosine", 0.0) == pytest.approx([0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)])


# --- the loop


def test_loss_falls_and_is_reported(tmp_path: Path) -> None:
    heard = Heard()
    result = train(job(tmp_path, Objective(), max_steps=60), heard)
    assert [step.step for step in heard.steps] == list(range(1, 61))
    assert heard.steps[-1].loss < 0.2 * heard.steps[0].loss
    assert heard.steps[-1].rows_per_second > 0
    assert heard.steps[-1].peak_bytes > 2**20
    assert result.steps == 60
    assert result.curve[-1]["step"] == 60
    assert result.curve[-1]["square"] == result.curve[-1]["loss"] == heard.steps[-1].loss


def test_equals_a_plain_torch_loop(tmp_path: Path) -> None:
    ours = Objective()
    train(job(tmp_path, ours, max_steps=5, clip=0.5, weight_decay=0.1, schedule="linear"))

    plain, source = Objective(), Rows(8)
    decay = [p for p in plain.parameters() if p.ndim > 1]
    rest = [p for p in plain.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    )
    batches = [*source.epoch(0), *source.epoch(1)][:5]
    for step, rows in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - step / 5)
        loss, _ = plain(source.collate(rows), None, 0.0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
    for name, tensor in plain.state_dict().items():
        assert torch.allclose(tensor, ours.state_dict()[name], atol=1e-6), name


def test_accumulated_small_batches_equal_one_large_one(tmp_path: Path) -> None:
    class Same(Rows):
        def epoch(self, number: int) -> list[list[int]]:
            order = list(range(24))
            return [order[start : start + self.size] for start in range(0, 24, self.size)]

    large, small = Objective(), Objective()
    train(job(tmp_path / "a", large, Same(24), max_steps=4))
    train(job(tmp_path / "b", small, Same(8), max_steps=4, accumulate=3))
    for name, tensor in large.state_dict().items():
        assert torch.allclose(tensor, small.state_dict()[name], atol=1e-6), name


def test_same_seed_same_bits_other_seed_other_bits(tmp_path: Path) -> None:
    made = []
    for index, seed in enumerate((3, 3, 4)):
        objective = Objective(dropout=0.5)
        train(job(tmp_path / str(index), objective, seed=seed))
        made.append(weights(objective))
    assert same(made[0], made[1])
    assert not same(made[0], made[2])


def test_teacher_gives_the_target_without_gradients(tmp_path: Path) -> None:
    teacher = nn.Linear(6, 2)
    before = weights(teacher)

    def make(accelerator):
        def taught(rows, batch):
            assert not torch.is_grad_enabled()
            return teacher(batch["x"])

        return taught

    heard = Heard()
    train(job(tmp_path, Objective(), max_steps=60, teacher=make), heard)
    assert heard.steps[-1].loss < 0.2 * heard.steps[0].loss
    assert same(before, weights(teacher))
    assert teacher.weight.grad is None


def test_frozen_parameters_stay(tmp_path: Path) -> None:
    objective = Objective()
    objective.net[0].requires_grad_(False)
    before = weights(objective)
    train(job(tmp_path, objective))
    after = objective.state_dict()
    assert torch.equal(before["net.0.weight"], after["net.0.weight"])
    assert not torch.equal(before["net.3.weight"], after["net.3.weight"])


def test_nothing_to_train(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="K814"):
        train(job(tmp_path, Objective().requires_grad_(False)))


def test_bf16_and_fp32_stages_in_one_process(tmp_path: Path) -> None:
    for precision in ("fp32", "bf16", "fp32"):
        objective = Objective()
        heard = Heard()
        train(job(tmp_path / precision, objective, max_steps=60, precision=precision), heard)
        assert heard.steps[-1].loss < 0.3 * heard.steps[0].loss
        assert objective.net[0].weight.dtype == torch.float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has fp16")
def test_fp16_without_a_gpu_is_a_plain_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="K815"):
        train(job(tmp_path, Objective(), precision="fp16"))


def test_validation_loss_is_on_the_curve_and_leaves_training_alone(tmp_path: Path) -> None:
    plain, watched = Objective(dropout=0.3), Objective(dropout=0.3)
    train(job(tmp_path / "a", plain))
    result = train(job(tmp_path / "b", watched, validation=Rows(7), evaluate_every=5))
    points = [point for point in result.curve if "validation_loss" in point]
    assert [point["step"] for point in points] == [5, 10, 12]
    watched.eval()
    expected = watched(Rows(7).collate(range(32)), None, 1.0)[0].item()
    assert points[-1]["validation_loss"] == pytest.approx(expected, rel=1e-5)
    assert same(weights(plain), weights(watched))


class Shrinking(nn.Module):
    """Counts what the loop tells it, costs something, and turns into a plain Linear at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 2)
        self.heard: list[float] = []

    def set_progress(self, progress: float) -> None:
        self.heard.append(progress)

    def penalty(self) -> torch.Tensor:
        return 10.0 * self.inner.weight.square().sum()

    def finalise(self) -> nn.Module:
        return self.inner

    def forward(self, x):
        return self.inner(x)


def test_live_modules_are_honoured(tmp_path: Path) -> None:
    objective = Objective()
    live = Shrinking()
    objective.net = nn.Sequential(live)
    before = live.inner.weight.detach().norm()
    result = train(job(tmp_path, objective, max_steps=40, accumulate=2))
    assert live.heard == pytest.approx([step / 40 for step in range(40)])
    assert type(objective.net[0]) is nn.Linear
    assert result.curve[0]["penalty"] == pytest.approx(10 * before.item() ** 2, rel=1e-5)
    assert live.inner.weight.norm() < 0.5 * before


# --- stopping and going on


def test_nan_stops_names_the_step_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    class Late(Rows):
        def epoch(self, number: int) -> list[list[int]]:
            return [list(range(8))] * 6 + [[31]]

    objective = Objective()
    with pytest.raises(RunError) as caught:
        train(job(tmp_path, objective, Late(8, poison=31), checkpoint_every=2))
    text = str(caught.value)
    assert "K811" in text
    assert "step 7 of 12" in text
    assert "learning rate" in text
    assert str(tmp_path / "checkpoints" / "s" / "00000006") in text
    assert all(torch.isfinite(tensor).all() for tensor in objective.state_dict().values())


def test_infinite_gradient_stops_before_the_weights_change(tmp_path: Path) -> None:
    class Root(Objective):
        def forward(self, batch, taught, progress):
            loss, terms = super().forward(batch, taught, progress)
            return loss + self.net[0].bias.mul(0.0).sum().abs().sqrt(), terms

    objective = Root()
    before = weights(objective)
    with pytest.raises(RunError, match="K812"):
        train(job(tmp_path, objective))
    assert same(before, weights(objective))


class InterruptAt(Heard):
    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def step(self, stage: str, step: Step) -> None:
        super().step(stage, step)
        if step.step == self.at:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="signals need the main thread"
)
def test_ctrl_c_writes_a_checkpoint_and_the_resumed_run_is_bit_identical(tmp_path: Path) -> None:
    straight = Objective(dropout=0.4)
    whole = train(job(tmp_path / "a", straight, max_steps=30))
    handler = signal.getsignal(signal.SIGINT)

    with pytest.raises(RunError) as caught:
        train(job(tmp_path / "b", Objective(dropout=0.4), max_steps=30), InterruptAt(11))
    assert caught.value.exit_code == 1
    assert "K810" in str(caught.value)
    assert "same command again" in str(caught.value)
    assert signal.getsignal(signal.SIGINT) is handler

    torch.manual_seed(99)  # the process that resumes has drawn other numbers
    resumed, heard = Objective(dropout=0.4), Heard()
    result = train(job(tmp_path / "b", resumed, max_steps=30), heard)
    assert result.resumed_from == 12
    assert "resuming after step 12 of 30" in heard.messages[0]
    assert same(weights(straight), weights(resumed))
    assert result.curve == whole.curve
    assert result.loss == whole.loss


SCRIPT = """
import sys, pathlib, torch
sys.path.insert(0, {folder!r})
import test_train as t
objective = t.Objective(dropout=float(sys.argv[2]))
class Slow(t.Heard):
    def step(self, stage, step):
        print(step.step, flush=True)
        import time; time.sleep(float(sys.argv[3]))
rows = t.Rows(8, rows=30)
result = t.train(t.job(pathlib.Path(sys.argv[1]), objective, rows, max_steps=25, checkpoint_every=4), Slow())
out = pathlib.Path(sys.argv[1]) / f"final-{{t.os.environ.get('RANK', '0')}}.pt"
torch.save([result.resumed_from, t.weights(objective)], out)
"""


def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(folder=str(Path(__file__).parent)))
    return path


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def run_script(path: Path, directory: Path, dropout: float, pause: float = 0.0) -> subprocess.Popen[str]:
    directory.mkdir(exist_ok=True)
    command = [sys.executable, str(path), str(directory), str(dropout), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())


@pytest.mark.long
def test_killed_and_resumed_is_bit_identical_to_uninterrupted(tmp_path: Path) -> None:
    path = script(tmp_path)
    straight = run_script(path, tmp_path / "a", 0.4)
    straight.communicate(timeout=120)
    assert straight.returncode == 0

    killed = run_script(path, tmp_path / "b", 0.4, pause=0.05)
    assert killed.stdout is not None
    for line in killed.stdout:
        if int(line) == 14:
            break
    killed.kill()
    killed.communicate(timeout=60)
    assert not list((tmp_path / "b").glob("final*"))

    resumed = run_script(path, tmp_path / "b", 0.4)
    resumed.communicate(timeout=120)
    assert resumed.returncode == 0
    _, one = torch.load(tmp_path / "a" / "final-0.pt")
    start, two = torch.load(tmp_path / "b" / "final-0.pt")
    assert start == 12
    assert same(one, two)


@pytest.mark.long
def test_two_processes_train_the_same_model_as_one(tmp_path: Path) -> None:
    path = script(tmp_path)
    run_script(path, tmp_path / "one", 0.0).communicate(timeout=120)
    (tmp_path / "two").mkdir()
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
    command = [*launch, str(path), str(tmp_path / "two"), "0.0", "0.0"]
    # `--cpu` would ask for MPI; this way accelerate launches by torchrun, and gloo joins the processes
    settings = {**environment(), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (_, one), (_, first), (_, second) = (
        torch.load(tmp_path / name) for name in ("one/final-0.pt", "two/final-0.pt", "two/final-1.pt")
    )
    assert same(first, second)
    for name in one:
        assert torch.allclose(one[name], first[name], atol=1e-5), name
