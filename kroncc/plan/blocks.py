"""Which blocks of a student are fitted to which blocks of its teacher. Shapes only: no weights are read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from kroncc.errors import PlanError
from kroncc.graph.blocks import EMBEDDINGS, HEAD, LAYER, Block, find_blocks, join, shared_spans
from kroncc.graph.model_graph import ModelGraph
from kroncc.graph.ops import value_of
from kroncc.recipe.schema import Reconstruct

REMEDY = "use `distill`, with `layers` to pair what differs"
NOTHING = "nothing to train"


@dataclass(frozen=True)
class Pair:
    """A block of the student, the teacher's that it is fitted to, and what is trained in it.

    `trained` names parameters of the student. `idle` says why the block is left as it is, if it is.
    """

    student: Block
    teacher: Block
    trained: tuple[str, ...]
    idle: str = ""

    @property
    def name(self) -> str:
        """What messages call the block."""
        return self.student.name


def pair_blocks(student: ModelGraph, teacher: ModelGraph) -> list[Pair]:
    """Return the blocks of a student with those of its teacher, in order.

    Layers that are one and the same module called again are one block, fitted to the teacher's value after
    every call: what is trained for one call changes the others. Any other parameter is trained in the first
    block that uses it and fixed from then on (a tied head follows the embeddings). Embeddings as the teacher
    has them, and a head whose outputs the teacher does not have, are left.

    Raises `PlanError`: K760 no layers, K761 another number of them, K762 other widths.
    """
    mine, theirs = find_blocks(student), find_blocks(teacher)
    _check_layers(mine, theirs)
    if [block.kind for block in mine] != [block.kind for block in theirs]:  # one of them has no head
        mine, theirs = ([block for block in blocks if block.kind != HEAD] for blocks in (mine, theirs))
    for one, other in zip(mine, theirs, strict=True):
        if one.kind != HEAD:
            _check_width(one, other)
    pairs, owned = [], set[int]()
    for span in shared_spans(student, mine):
        one, other = (join([blocks[at] for at in span]) for blocks in (mine, theirs))
        parameters = one.segment(student).parameters()
        trained = tuple(name for name, parameter in parameters.items() if id(parameter) not in owned)
        owned |= set(map(id, parameters.values()))
        idle = _idle(one, other, student, teacher) or ("" if trained else NOTHING)
        pairs.append(Pair(one, other, trained, idle))
    return pairs


def fitted_count(student: ModelGraph, teacher: ModelGraph) -> int:
    """Return how many blocks are fitted; `PlanError` as `pair_blocks`, and K814 where there is none."""
    count = sum(not pair.idle for pair in pair_blocks(student, teacher))
    if not count:
        raise PlanError("no block of the student has anything to train", code="K814", path="student")
    return count


def batch_count(action: Reconstruct, rows: int) -> int:
    """Return how many batches a reconstruct step takes of data with `rows` rows."""
    return math.ceil(min(rows, action.rows) / action.batch_size)


def block_steps(action: Reconstruct, batches: int) -> int:
    """Return the optimiser steps that fitting one block takes."""
    return max(1, math.ceil(action.epochs * batches - 1e-9))


def _check_layers(student: Sequence[Block], teacher: Sequence[Block]) -> None:
    for side, blocks in (("student", student), ("teacher", teacher)):
        if not blocks:
            raise PlanError(
                f"no layer was found in the {side}, so there are no blocks to fit",
                code="K760",
                path=side,
                expected="a model of layers with attention or feed-forward pairs",
                remedy="use `distill`",
            )
    for kind, what in ((LAYER, "layers"), (EMBEDDINGS, "stacks of layers")):
        counts = [sum(block.kind == kind for block in blocks) for blocks in (student, teacher)]
        if counts[0] != counts[1]:
            raise PlanError(
                f"the student has {counts[0]} {what} and the teacher {counts[1]}: blocks do not pair up",
                code="K761",
                path="student",
                expected=f"a student and a teacher with as many {what}",
                remedy=REMEDY,
            )


def _check_width(student: Block, teacher: Block) -> None:
    widths = [_width(block.ends[0]) for block in (student, teacher)]
    if widths[0] != widths[1]:
        raise PlanError(
            f"the student's {student.name} gives {widths[0]} values a position, the teacher's {widths[1]}",
            code="K762",
            path="student",
            expected="the same width after every block",
            remedy=REMEDY,
        )


def _width(node: fx.Node) -> str:
    value = value_of(node)
    return "no" if value is None else str(value.shape[-1])


def _idle(one: Block, other: Block, student: ModelGraph, teacher: ModelGraph) -> str:
    """Say why a block has no need to be fitted, or no target; '' if it has both."""
    if one.kind == EMBEDDINGS and one.segment(student).layout() == other.segment(teacher).layout():
        return "not rewritten"
    if one.kind == HEAD and _outputs(student, one) != _outputs(teacher, other):
        return "the teacher has other outputs"
    return ""


def _outputs(graph: ModelGraph, head: Block) -> list[tuple[str, int, str]]:
    """Return name, number of dimensions and width of each output that the head gives, in the head's order."""
    named = {node: name for name, node in graph.outputs.items()}
    values = [value_of(end) for end in head.ends]
    return [
        (named[end], value.dim(), str(value.shape[-1]))
        for end, value in zip(head.ends, values, strict=True)
        if value is not None
    ]
