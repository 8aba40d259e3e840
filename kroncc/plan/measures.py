"""Which metrics an evaluate step may ask for, task by task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kroncc.errors import DataError, PlanError, did_you_mean
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


def fidelity_parts(task: str, head: int) -> tuple[str, ...]:
    """Return the figures of fidelity that a task gives; `head` counts the outputs of a classifier."""
    if task == "feature-extraction":
        return ("cosine", "rank_correlation")
    return ("rank_correlation",) if task.endswith("classification") and head == 1 else ("agreement", "kl")


def check_kind(metrics: Sequence[str], regression: bool, head: int) -> None:
    """Raise `DataError` K623 for a metric of classes on labels that are numbers, or the other way round."""
    wrong = [metric for metric in metrics if metric in (CLASSES if regression else NUMBERS)]
    if wrong and (regression or head > 1):
        kind = "numbers with a fraction" if regression else "classes"
        raise DataError(
            f"{wrong[0]} does not fit labels that are {kind}",
            code="K623",
            path="metrics",
            expected=", ".join(NUMBERS if regression else CLASSES),
        )


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
