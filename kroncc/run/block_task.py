"""How far a block of the student is from the same block of its teacher, on the rows of two wavefronts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from kroncc.graph.blocks import HEAD
from kroncc.graph.model_graph import ModelGraph
from kroncc.graph.ops import value_of
from kroncc.graph.segment import Segment
from kroncc.graph.wavefront import Wavefront, evaluating
from kroncc.plan.blocks import Pair

MASKS = ("attention_mask", "decoder_attention_mask")
TINY = torch.finfo(torch.float32).tiny


class BlockTask:
    """The loss of one block: inputs from the student's wavefront, targets from the teacher's.

    Neither wavefront may be past the block. The student's is moved to its start, the teacher's to its end;
    the values there are held until `close`. The values of a head may be large (a vocabulary a position): the
    teacher's are made whenever they are asked for.
    """

    def __init__(
        self, pair: Pair, student: Wavefront, teacher: Wavefront, graphs: tuple[ModelGraph, ModelGraph]
    ) -> None:
        self.pair, self.student, self.teacher = pair, student, teacher
        self.segment = pair.student.segment(graphs[0])
        student.advance(pair.student.start)
        self._target = self._made(graphs[1]) if pair.student.kind == HEAD else self._held()
        self._masks = [_mask_of(graphs[0], end) for end in pair.student.ends]
        self._scales = [1.0 for _ in pair.student.ends]

    def loss(self, index: int) -> Tensor:
        """Return the loss of one batch: its squared error over the mean square of all targets, mean of ends.

        The mean square is 1 until `error` has found it.
        """
        parts = zip(self._squares(index), self._scales, strict=True)
        return torch.stack([error / (count * scale) for (error, _, count), scale in parts]).mean()

    @torch.no_grad()
    def error(self) -> float:
        """Return the squared error of all batches, relative to the squared size of the targets."""
        sums = torch.zeros(len(self._scales), 3, dtype=torch.double)
        for index in range(len(self.student.batches)):
            sums += torch.stack([torch.stack(part).double().cpu() for part in self._squares(index)])
        error, size, count = sums.clamp(min=TINY).unbind(1)
        self._scales = (size / count).tolist()
        return float((error / size).mean())

    def close(self) -> None:
        """Let go of the teacher's values."""
        if self.pair.student.kind != HEAD:
            for end in self.pair.teacher.ends:
                self.teacher.release(end)

    def _held(self) -> Callable[[int], list[Tensor]]:
        ends = self.pair.teacher.ends
        for end in ends:
            self.teacher.hold(end)
        self.teacher.advance(ends[-1].next)
        return lambda index: [self.teacher.value(end, index) for end in ends]

    def _made(self, graph: ModelGraph) -> Callable[[int], list[Tensor]]:
        block = self.pair.teacher
        segment = block.segment(graph)
        self.teacher.advance(block.start)

        def made(index: int) -> list[Tensor]:
            with torch.no_grad(), evaluating(segment.module):
                return _run(segment, self.teacher, index)

        return made

    def _squares(self, index: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return for each end: squared error, squared size of the target, how many values were summed."""
        given, wanted = _run(self.segment, self.student, index), self._target(index)
        masks = [self._mask(name, index) for name in self._masks]
        return [_sums(one, other, mask) for one, other, mask in zip(given, wanted, masks, strict=True)]

    def _mask(self, name: str | None, index: int) -> Tensor | None:
        batch = self.student.batches[index]
        return batch[name] if name is not None and name in batch else None


def _run(segment: Segment, wave: Wavefront, index: int) -> list[Tensor]:
    return segment([wave.value(node, index) for node in segment.inputs])


def _sums(given: Tensor, wanted: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    given, wanted = given.float(), wanted.float()
    error, size = (given - wanted).square(), wanted.square()
    if mask is None:
        return error.sum(), size.sum(), error.new_tensor(float(error.numel()))
    keep = (
        (mask != 0)
        .to(error.device, error.dtype)
        .reshape(*mask.shape, *(1 for _ in error.shape[mask.dim() :]))
    )
    return (error * keep).sum(), (size * keep).sum(), keep.sum() * (error.numel() / keep.numel())


def _mask_of(graph: ModelGraph, end: fx.Node) -> str | None:
    """Return the input that says which positions of a value are padding; None where no position can be."""
    value = value_of(end)
    for node in graph.graph.find_nodes(op="placeholder"):
        mask = value_of(node)
        if node.target not in MASKS or mask is None or value is None or value.dim() <= mask.dim():
            continue
        if [str(size) for size in value.shape[: mask.dim()]] == [str(size) for size in mask.shape]:
            return str(node.target)
    return None
