"""What a stage that runs models costs, before it runs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from kroncc.graph.cost import model_cost
from kroncc.hashing import content_hash
from kroncc.plan.models import Models
from kroncc.recipe.schema import Action, Distill, Reconstruct, Training


@dataclass
class Effort:
    """Counts the FLOPs of training stages, each at the `max_length` of its own data."""

    models: Models
    _known: dict[str, int] = field(default_factory=dict)

    def training_flops(self, name: str, action: Action, steps: int | None, length: int) -> int | None:
        """Return an upper bound of the FLOPs of step `name`; None for one that does not train.

        Every row counts as `length` tokens, and a backward pass as two forward passes.
        """
        if isinstance(action, Reconstruct):
            return self._fitting_flops(name, action, steps, length)
        if steps is None or not isinstance(action, Training):
            return None
        one = 3 * self._forward(name, length)
        if isinstance(action, Distill):
            one += self._forward(action.teacher, length)
        return steps * action.batch_size * action.accumulate * one

    def measuring_flops(self, name: str, rows: int | None, length: int, backward: bool) -> int | None:
        """Return an upper bound of the FLOPs of measuring model `name` on `rows` rows of `length` tokens."""
        if rows is None:
            return None
        return rows * (3 if backward else 1) * self._forward(name, length)

    def _fitting_flops(self, name: str, action: Reconstruct, steps: int | None, length: int) -> int | None:
        """Count every row once through the teacher, three times through the student, and its training.

        Blocks that are not fitted are counted as if they were.
        """
        if not steps:
            return None
        student, teacher = self._forward(name, length), self._forward(action.teacher, length)
        batches = steps // self.models.blocks[name] * action.batch_size  # rows that train a block
        return 3 * student * batches + (3 * student + teacher) * math.ceil(batches / action.epochs)

    def _forward(self, name: str, length: int) -> int:
        """Return the FLOPs of one sequence of `length` tokens through a model."""
        report = self.models.reports[name]
        if length == self.models.length:
            return report.flops.total
        key = content_hash([report.structure.model_dump(), report.labels, length])
        if key not in self._known:
            graph = self.models.rebuilt(report.structure, report.labels)
            self._known[key] = model_cost(graph).flops(1, length).total
        return self._known[key]
