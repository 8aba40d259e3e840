"""Which metrics an evaluate step may ask for, task by task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kroncc.errors import PlanError, did_you_mean
from kroncc.recipe.names import METRICS

LATENCY = "latency"  # of any task; measured apart from the outputs
LANGUAGE = ("fill-mask", "text-generation")
CLASSES = ("accuracy", "f1", "mcc")  # of class ids
NUMBERS = ("pearson", "spearman")  # of scores
FITS: Mapping[str, tuple[str, ...]] = {
    "feature-extraction": ("fidelity",),
    "text-classification": (*CLASSES, *NUMBERS, "fidelity"),
    "image-classification": (*CLASSES, *NUMBERS, "fidelity"),
    "fill-mask": ("accuracy", "perplexity", "fidelity"),
    "text-generation": ("accuracy", "perplexity", "fidelity"),
}


def check_metrics(metrics: Sequence[str], task: str) -> None:
    """Raise `PlanError` for a metric that does not exist (K750) or does not fit the task (K751)."""
    if task not in FITS:
        raise PlanError(
            f"evaluating task {task!r} is not supported yet",
            code="K752",
            path="metrics",
            expected=", ".join(FITS),
        )
    for metric in metrics:
        if metric not in METRICS:
            raise PlanError(
                f"there is no metric {metric!r}",
                code="K750",
                path="metrics",
                remedy=did_you_mean(metric, METRICS),
            )
        if metric != LATENCY and metric not in FITS[task]:
            raise PlanError(
                f"metric {metric!r} does not fit task {task!r}",
                code="K751",
                path="metrics",
                expected=", ".join(FITS[task]),
            )
