"""The one training loop. What is trained, and on what, is data: a `TrainJob`.

It runs on accelerate: one process or many, CPU or GPU, in any of the precisions. `batch_size` counts the rows
of all processes together, so that the same recipe trains the same model on one process and on many (to
rounding, and as far as a loss is a mean over rows; a mean over tokens is taken within each process).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from kroncc.errors import RunError
from kroncc.recipe.schema import Training
from kroncc.run import live
from kroncc.run.accelerators import make_accelerator
from kroncc.run.checkpoint import Checkpoints, Position
from kroncc.run.interrupt import Interrupt
from kroncc.run.progress import NullReporter, Reporter, Step, peak_memory
from kroncc.run.steps import Batch, BatchSource, Rows, Work, learning_rate, shard, step_count, work

Teacher = Callable[[Sequence[int] | None, Batch], Any]
Losses = tuple[torch.Tensor, dict[str, torch.Tensor]]
CURVE_POINTS = 200


@dataclass(frozen=True)
class TrainJob:
    """What to train.

    `objective(batch, taught, progress)` returns the scalar loss, a mean over the rows of the batch, and the
    values of its terms by name; it holds everything that trains: the student and whatever its losses need.
    `teacher(accelerator)` makes the function that says what the objective gets as `taught`, from the row
    numbers (None for rows of `validation`) and the batch; it runs without gradients. The modules of
    `objective` are told of progress, those of the model `tree` are asked to `finalise`. `validation` gives
    the rows of `evaluate_every`.
    """

    stage: str
    hash: str
    objective: nn.Module
    tree: nn.Module
    source: BatchSource
    options: Training
    checkpoints: Path
    seed: int = 0
    teacher: Callable[[Accelerator], Teacher] | None = None
    validation: BatchSource | None = None


@dataclass(frozen=True)
class TrainResult:
    """What training did: optimiser steps, seconds, last losses' mean, memory, curve, resumption."""

    steps: int
    seconds: float
    loss: float
    peak_bytes: int
    curve: list[dict[str, Any]] = field(default_factory=list)
    resumed_from: int = 0


def train(job: TrainJob, reporter: Reporter | None = None) -> TrainResult:
    """Train `job.objective` in place, resuming from a checkpoint where there is one.

    Raises `RunError`: K810 interrupted, K811 loss not finite, K812 gradient not finite, K814 nothing to
    train, K815 precision not to be had here, K816 checkpoint that does not load.
    """
    accelerator = make_accelerator(job.options.precision)
    heard = reporter if reporter is not None and accelerator.is_main_process else NullReporter()
    set_seed(job.seed, device_specific=True)
    loop = _Loop(job, accelerator, heard)
    with Interrupt() as interrupt:
        result = loop.run(interrupt)
    live.finalise(job.tree)
    accelerator.free_memory()
    return result


class _Penalised(nn.Module):
    """The objective plus, while it trains, the penalties of its modules: all that DDP has to see."""

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, batch: Batch, taught: Any, progress: float) -> Losses:
        loss, terms = self.objective(batch, taught, progress)
        extra = live.penalty(self.objective) if self.training else None
        if extra is None:
            return loss, terms
        return loss + extra, {**terms, "penalty": extra.detach()}


class _Loop:
    def __init__(self, job: TrainJob, accelerator: Accelerator, reporter: Reporter) -> None:
        self.job = job
        self.options = job.options
        self.accelerator = accelerator
        self.reporter = reporter
        self.total = step_count(job.source, job.options)
        optimizer = torch.optim.AdamW(_groups(job.objective, self.options), lr=self.options.learning_rate)
        self.objective, self.optimizer = accelerator.prepare(_Penalised(job.objective), optimizer)
        self.teacher = job.teacher(accelerator) if job.teacher else None
        self.checkpoints = Checkpoints(job.checkpoints, job.hash, accelerator, reporter)
        self.curve: list[dict[str, Any]] = []
        self.recent: list[float] = []
        self.spent = 0.0

    def run(self, interrupt: Interrupt) -> TrainResult:
        resumed = self._resume()
        started, rows = time.monotonic() - self.spent, 0
        begun = time.monotonic()
        for item in work(self.job.source, self.options, resumed):
            losses, rate, stop = self._step(item, interrupt.wanted)
            rows += item.rows
            self._report(item, losses, rate, rows / max(time.monotonic() - begun, 1e-9))
            self._validate(item.step)
            self.spent = time.monotonic() - started
            due = item.step % self.options.checkpoint_every == 0 and item.step < self.total
            if due or stop:
                self.checkpoints.save(self._position(item.step))
            if stop:
                raise self._interrupted(item.step)
        mean = sum(self.recent) / len(self.recent) if self.recent else math.nan
        return TrainResult(self.total, self.spent, mean, self._peak(), self.curve, resumed)

    def _peak(self) -> int:
        """Return the largest memory so far, of the GPU where training runs on one; bytes."""
        if self.accelerator.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.accelerator.device))
        return peak_memory()

    def _resume(self) -> int:
        position = self.checkpoints.restore()
        if position is None:
            return 0
        self.spent = position.seconds
        self.curve, self.recent = list(position.curve), list(position.recent)
        self.reporter.message(f"{self.job.stage}: resuming after step {position.step} of {self.total}")
        return position.step

    def _position(self, step: int) -> Position:
        return Position(
            hash=self.job.hash,
            step=step,
            world=self.accelerator.num_processes,
            seconds=self.spent,
            curve=self.curve,
            recent=self.recent,
        )

    def _step(self, item: Work, wanted: bool) -> tuple[dict[str, float], float, bool]:
        """Do one optimiser step; return its loss and terms, its learning rate, and whether to stop."""
        rate = learning_rate(self.options, item.step, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        self.objective.train()
        live.set_progress(self.job.objective, (item.step - 1) / self.total)
        shares = []
        for batch, last in _mark_last(item.batches):
            with nullcontext() if last else self.accelerator.no_sync(self.objective):
                shares.append(self._accumulate(batch, item))
        losses, stop = self._agree(shares, wanted)
        if not math.isfinite(losses["loss"]):
            raise self._not_finite("K811", f"the loss is {losses['loss']}", item.step, rate)
        norm = self.accelerator.clip_grad_norm_(self.objective.parameters(), self.options.clip or math.inf)
        if self.accelerator.scaler is None and norm is not None and not math.isfinite(float(norm)):
            raise self._not_finite("K812", "the gradient is not finite", item.step, rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return losses, rate, stop

    def _accumulate(self, batch: Rows, item: Work) -> dict[str, torch.Tensor]:
        """Add the gradients of one batch; return its share of the step's losses, times the processes."""
        world = self.accelerator.num_processes
        mine, counted = shard(batch.rows, self.accelerator.process_index, world)
        weight = counted * world / item.rows
        progress = (item.step - 1) / self.total
        loss, terms = self._losses(self.job.source, Rows(batch.epoch, tuple(mine)), progress)
        self.accelerator.backward(loss * weight)
        return {name: value.detach() * weight for name, value in {"loss": loss, **terms}.items()}

    def _losses(self, source: BatchSource, rows: Rows, progress: float) -> Losses:
        collated = source.collate(rows.rows, rows.epoch)
        batch = {name: tensor.to(self.accelerator.device) for name, tensor in collated.items()}
        taught = None
        if self.teacher is not None:
            with torch.no_grad(), self.accelerator.autocast():
                taught = self.teacher(rows.rows if source is self.job.source else None, batch)
        losses: Losses = self.objective(batch, taught, progress)
        return losses

    def _agree(
        self, shares: Sequence[dict[str, torch.Tensor]], wanted: bool
    ) -> tuple[dict[str, float], bool]:
        """Return the losses of the step over all processes, and whether any process wants to stop."""
        names = list(shares[0])
        sums = [torch.stack([share[name].double() for share in shares]).sum() for name in names]
        told = torch.stack([*sums, torch.full_like(sums[0], float(wanted))])
        *means, stop = self.accelerator.reduce(told, reduction="mean").tolist()
        return dict(zip(names, means, strict=True)), stop > 0

    def _report(self, item: Work, losses: dict[str, float], rate: float, speed: float) -> None:
        step, loss = item.step, losses["loss"]
        self.recent = [*self.recent[-19:], loss]
        every = max(1, self.total // CURVE_POINTS)
        if step % every == 0 or step in (1, self.total):
            self.curve.append({"step": step, **losses, "learning_rate": rate})
        left = (self.total - step) * item.rows / speed
        self.reporter.step(self.job.stage, Step(step, self.total, loss, rate, speed, left, self._peak()))

    def _validate(self, step: int) -> None:
        every, source = self.options.evaluate_every, self.job.validation
        if every is None or source is None or (step % every and step != self.total):
            return
        loss = self._validation_loss(source, step)
        self.curve.append({"step": step, "validation_loss": loss})
        self.reporter.message(f"{self.job.stage}: step {step}: loss {loss:.4f} on the validation split")

    @torch.no_grad()
    def _validation_loss(self, source: BatchSource, step: int) -> float:
        self.objective.eval()
        sums = torch.zeros(2, dtype=torch.double, device=self.accelerator.device)
        for batch in source.epoch(0):
            mine, counted = shard(batch, self.accelerator.process_index, self.accelerator.num_processes)
            loss, _ = self._losses(source, Rows(0, tuple(mine)), step / self.total)
            sums[0] += loss.double() * counted
            sums[1] += counted
        total, rows = self.accelerator.reduce(sums, reduction="sum").tolist()
        return float(total / rows)

    def _interrupted(self, step: int) -> RunError:
        return RunError(
            f"interrupted in step {self.job.stage!r} after {step} of {self.total} optimiser steps",
            code="K810",
            remedy="run the same command again to go on from here; nothing is lost",
        )

    def _not_finite(self, code: str, what: str, step: int, rate: float) -> RunError:
        latest = self.checkpoints.latest()
        kept = f"the last good checkpoint is kept: {latest}" if latest else "no checkpoint was written yet"
        return RunError(
            f"{what} at optimiser step {step} of {self.total} in step {self.job.stage!r} "
            f"(learning rate {rate:.3g}); {kept}",
            code=code,
            expected="finite numbers",
            remedy="lower learning_rate, raise warmup, set clip, or train in fp32",
        )


def _mark_last(batches: Sequence[Rows]) -> Iterator[tuple[Rows, bool]]:
    return ((batch, index == len(batches) - 1) for index, batch in enumerate(batches))


def _groups(objective: nn.Module, options: Training) -> list[dict[str, Any]]:
    """Split what trains into matrices, which decay, and vectors (biases, norms, scalars), which do not.

    A Parameter with an attribute `learning_rate` trains at that rate, times the step's schedule, and does not
    decay.
    """
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    if not trained:
        raise RunError("no parameter is left to train", code="K814", remedy="freeze less")
    usual = [parameter for parameter in trained if not hasattr(parameter, "learning_rate")]
    groups = [
        {"params": [p for p in usual if p.ndim >= 2], "weight_decay": options.weight_decay, "scale": 1.0},
        {"params": [p for p in usual if p.ndim < 2], "weight_decay": 0.0, "scale": 1.0},
    ]
    for own in sorted({p.learning_rate for p in trained if hasattr(p, "learning_rate")}):
        mine = [p for p in trained if getattr(p, "learning_rate", None) == own]
        groups.append({"params": mine, "weight_decay": 0.0, "scale": own / options.learning_rate})
    return [group for group in groups if group["params"]]
