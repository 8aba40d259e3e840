"""Fit a compressed model to its teacher block after block, with no pass through the whole model.

A block gets its inputs from the student's blocks before it, already fitted, and the teacher's values after
the same block as targets, on the same rows. The loss is the squared error over the positions that are not
padding, relative to the squared size of the targets, in float32; Adam, with a learning rate that falls in a
straight line to zero. Dropout is off. A block whose error did not fall keeps the weights that it had, and one
whose error is rounding is left alone. (The layer-wise reconstruction of post-training quantisation, Li et al.
2021, BRECQ, with a teacher of its own.)

Memory: one block with its gradients and optimiser, and for every row the values between two blocks of student
and teacher; above `KEPT` bytes these lie in memory-mapped files.

It runs in one process; under `accelerate launch` the others wait.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from kroncc.errors import RunError
from kroncc.graph.capture import default_inputs
from kroncc.graph.model_graph import ModelGraph
from kroncc.graph.wavefront import Batch, Wavefront, evaluating
from kroncc.plan.blocks import Pair, block_steps, pair_blocks
from kroncc.plan.stages import Stage
from kroncc.recipe.schema import Reconstruct
from kroncc.run.accelerators import state
from kroncc.run.block_files import BlockFiles, Fitted
from kroncc.run.block_task import BlockTask
from kroncc.run.context import Context
from kroncc.run.interrupt import Interrupt
from kroncc.run.progress import Reporter, Step, peak_memory

KEPT = 2 * 2**30  # bytes of values that each of the two models may keep in memory
ROUNDING = 1e-9  # relative squared error that is no more than float32's rounding through a block
CURVE_POINTS = 200


@dataclass(frozen=True)
class ReconstructJob:
    """What to fit: the student, in place; to which teacher; on which batches.

    `checkpoints` keeps finished blocks, `scratch` the values that do not fit into memory.
    """

    stage: str
    hash: str
    student: ModelGraph
    teacher: ModelGraph
    batches: Sequence[Batch]
    options: Reconstruct
    checkpoints: Path
    scratch: Path
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True)
class ReconstructResult:
    """What was done: the blocks in order, optimiser steps, seconds, memory, blocks taken from checkpoints."""

    blocks: list[Fitted]
    steps: int
    seconds: float
    peak_bytes: int
    resumed_from: int = 0

    @property
    def curve(self) -> list[dict[str, Any]]:
        """Losses of all blocks, by optimiser step counted through."""
        return [point for block in self.blocks for point in block.curve]


def reconstruct_job(
    context: Context, stage: Stage, action: Reconstruct
) -> tuple[PreTrainedModel, ReconstructJob]:
    """Return the model that a reconstruct step fits, and the job that does it; labels are not read."""
    model = context.load(action.student)
    source = context.batches(action.data, action.split, model, action.student, action.batch_size, action.seed)
    batches = [source.collate(rows) for rows in source.sample(action.rows, action.seed)]
    names = [name for name in default_inputs(model) if name in batches[0]]
    job = ReconstructJob(
        stage=stage.name,
        hash=stage.hash,
        student=context.graph(model, names),
        teacher=context.graph(context.load(action.teacher), names),
        batches=batches,
        options=action,
        checkpoints=context.store.checkpoints(stage.name),
        scratch=context.store.cache(stage.name),
        device=state().device,
    )
    return model, job


def reconstruct(job: ReconstructJob, reporter: Reporter) -> ReconstructResult:
    """Fit the blocks of `job.student` in place, going on after the last block that is finished.

    Raises `RunError`: K810 interrupted, K811 loss not finite, K814 nothing to train; `PlanError` as
    `pair_blocks`.
    """
    job.scratch.mkdir(parents=True, exist_ok=True)
    with Interrupt() as interrupt:
        return _Run(job, reporter, interrupt).run()


class _Run:
    def __init__(self, job: ReconstructJob, reporter: Reporter, interrupt: Interrupt) -> None:
        self.job = job
        self.reporter = reporter
        self.interrupt = interrupt
        self.pairs = pair_blocks(job.student, job.teacher)
        self.files = BlockFiles(job.checkpoints, job.hash)
        self.waves = [self._wavefront(graph) for graph in (job.student, job.teacher)]
        self.steps = block_steps(job.options, len(job.batches))
        self.total = self.steps * sum(not pair.idle for pair in self.pairs)
        self.done = 0  # optimiser steps, those of blocks that needed none included

    def _wavefront(self, graph: ModelGraph) -> Wavefront:
        graph.to(self.job.device)
        return Wavefront(
            graph, self.job.batches, device=self.job.device, limit=KEPT, directory=self.job.scratch
        )

    def run(self) -> ReconstructResult:
        if not self.total:
            raise RunError(
                f"step {self.job.stage!r}: no block has anything to train",
                code="K814",
                remedy="leave the step out",
            )
        blocks = self._resume()
        resumed = len(blocks)
        for number, pair in enumerate(self.pairs[resumed:], resumed + 1):
            started = time.monotonic()
            fitted = self._fit(number, pair)
            fitted = fitted.model_copy(update={"seconds": time.monotonic() - started})
            self.files.save(number, fitted, self._weights(pair))
            self.reporter.message(f"{self.job.stage}: block {number} of {len(self.pairs)}, {said(fitted)}")
            blocks.append(fitted)
        seconds = sum(block.seconds for block in blocks)
        return ReconstructResult(blocks, self.total, seconds, peak_memory(), resumed)

    def _resume(self) -> list[Fitted]:
        """Load the blocks that are finished and say what fitting them gave; the wavefronts follow later."""
        blocks: list[Fitted] = []
        for number, pair in enumerate(self.pairs, 1):
            fitted = self.files.restore(number, self._weights(pair))
            if fitted is None:
                break
            blocks.append(fitted)
            self.done += 0 if pair.idle else self.steps
        if blocks:
            at = f"block {len(blocks)} of {len(self.pairs)}"
            self.reporter.message(f"{self.job.stage}: resuming after {at}")
        return blocks

    def _weights(self, pair: Pair) -> dict[str, nn.Parameter]:
        named = dict(self.job.student.module.named_parameters(remove_duplicate=False))
        return {} if pair.idle else {name: named[name] for name in pair.trained}

    def _fit(self, number: int, pair: Pair) -> Fitted:
        if pair.idle:
            return Fitted(name=pair.name, idle=pair.idle)
        task = BlockTask(pair, self.waves[0], self.waves[1], (self.job.student, self.job.teacher))
        try:
            with evaluating(task.segment.module):
                return self._improve(number, pair, task)
        finally:
            task.close()

    def _improve(self, number: int, pair: Pair, task: BlockTask) -> Fitted:
        """Train a block, unless there is no need or no way; keep its weights where its error did not fall."""
        before = task.error()
        idle = _no_need(before, task)
        if idle:
            self.done += self.steps
            return Fitted(name=pair.name, before=before, after=before, idle=idle)
        weights = self._weights(pair)
        was = {name: weight.detach().clone() for name, weight in weights.items()}
        curve = self._train(number, pair, task, list(weights.values()))
        after = task.error()
        if not after < before:
            for name, weight in weights.items():
                weight.data.copy_(was[name])
            after = before
        return Fitted(name=pair.name, before=before, after=after, steps=self.steps, curve=curve)

    def _train(
        self, number: int, pair: Pair, task: BlockTask, weights: list[nn.Parameter]
    ) -> list[dict[str, Any]]:
        rate = self.job.options.learning_rate
        adam = torch.optim.Adam(weights, lr=rate)
        curve: list[dict[str, Any]] = []
        started, rows = time.monotonic(), 0
        for step, index in enumerate(self._order(number), 1):
            adam.param_groups[0]["lr"] = now = rate * (1.0 - (step - 1) / self.steps)
            loss = task.loss(index)
            value = loss.item()
            if not math.isfinite(value):
                raise self._not_finite(number, pair, value, step, now)
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient
            adam.step()
            adam.zero_grad()
            self.done += 1
            rows += _rows(self.job.batches[index])
            if self.done % max(1, self.total // CURVE_POINTS) == 0 or step in (1, self.steps):
                curve.append({"step": self.done, "block": pair.name, "loss": value, "learning_rate": now})
            self._report(value, now, rows, step, time.monotonic() - started)
            if self.interrupt.wanted:
                raise self._interrupted(number, pair)
        return curve

    def _order(self, number: int) -> list[int]:
        """Return the batches of a block's steps: every one once an epoch, shuffled by the seed."""
        order: list[int] = []
        for epoch in range(math.ceil(self.steps / len(self.job.batches))):
            random = np.random.default_rng([self.job.options.seed, number, epoch])
            order += random.permutation(len(self.job.batches)).tolist()
        return order[: self.steps]

    def _report(self, loss: float, rate: float, rows: int, step: int, seconds: float) -> None:
        speed = rows / max(seconds, 1e-9)
        left = (self.total - self.done) * (rows / step) / speed
        self.reporter.step(
            self.job.stage, Step(self.done, self.total, loss, rate, speed, left, peak_memory())
        )

    def _interrupted(self, number: int, pair: Pair) -> RunError:
        return RunError(
            f"interrupted in step {self.job.stage!r}, in block {number} of {len(self.pairs)} ({pair.name})",
            code="K810",
            remedy="run the same command again to go on with this block; those before it are kept",
        )

    def _not_finite(self, number: int, pair: Pair, value: float, step: int, rate: float) -> RunError:
        return RunError(
            f"the loss is {value} at step {step} of {self.steps} of block {number} ({pair.name}) in step "
            f"{self.job.stage!r} (learning rate {rate:.3g}); the blocks before it are kept",
            code="K811",
            expected="finite numbers",
            remedy="lower learning_rate",
        )


def said(fitted: Fitted) -> str:
    """Say in words what fitting a block gave: `layer 3: error 0.31 -> 0.12`."""
    if fitted.before is None or fitted.after is None:
        return f"{fitted.name}: left, {fitted.idle}"
    if fitted.idle:
        return f"{fitted.name}: left, {fitted.idle} (error {fitted.before:.3g})"
    kept = "" if fitted.after < fitted.before else ", the weights stay as they were"
    return f"{fitted.name}: error {fitted.before:.4g} -> {fitted.after:.4g}{kept}"


def _no_need(error: float, task: BlockTask) -> str:
    if error <= ROUNDING:
        return "as the teacher's"
    return "" if task.loss(0).requires_grad else "no gradient reaches its parameters"


def _rows(batch: Batch) -> int:
    return len(next(iter(batch.values())))
