"""Every error kroncc raises on purpose, each with a code, a place, what was expected and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """A position in a file; line and column count from 1."""

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: what, where, what was expected, what to do."""

    code: str
    message: str
    place: Place | None = None
    path: str = ""  # path inside the recipe: steps.factored.compress.passes[0].targets
    expected: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        where = f"{self.place}: " if self.place else ""
        at = f" (at {self.path})" if self.path else ""
        lines = [f"{where}{self.code}: {self.message}{at}"]
        if self.expected:
            lines.append(f"  expected: {self.expected}")
        if self.remedy:
            lines.append(f"  remedy:   {self.remedy}")
        return "\n".join(lines)


class KronccError(Exception):
    """Base of all errors that a user can cause or mend; shown without a traceback."""

    exit_code = 2
    default_code = "K000"

    def __init__(
        self,
        message: str = "",
        *,
        code: str | None = None,
        place: Place | None = None,
        path: str = "",
        expected: str = "",
        remedy: str = "",
        problems: Sequence[Problem] = (),
    ) -> None:
        single = Problem(code or self.default_code, message, place, path, expected, remedy)
        self.problems: tuple[Problem, ...] = tuple(problems) or (single,)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class RecipeError(KronccError):
    """The recipe is wrong: syntax, names, types, graph of steps (codes K1xx)."""

    default_code = "K100"


class TargetError(KronccError):
    """A target matches nothing, or not as often as `count` demands (codes K2xx)."""

    default_code = "K200"


class CaptureError(KronccError):
    """A model cannot be captured as a graph (codes K3xx)."""

    default_code = "K300"


class PassError(KronccError):
    """A pass is unknown, its options do not fit the site, or its rewrite broke a promise (codes K4xx)."""

    default_code = "K400"


class ModelError(KronccError):
    """A model cannot be found, read, rebuilt or saved (codes K5xx)."""

    default_code = "K500"


class DataError(KronccError):
    """Data is missing, empty, or does not fit the model (codes K6xx)."""

    default_code = "K600"


class PlanError(KronccError):
    """A plan cannot be made, or a saved plan no longer holds (codes K7xx)."""

    default_code = "K700"


class RunError(KronccError):
    """A stage failed while running, or an expectation is unmet (codes K8xx)."""

    exit_code = 1
    default_code = "K800"


_COMPARED = 500


def nearest(name: str, valid: Iterable[str], count: int = 3) -> list[str]:
    """Return up to `count` names of `valid` that resemble `name`, best first."""
    pool = list(valid)
    if len(pool) > _COMPARED:  # comparing is slow; of very many names, those that start alike are enough
        pool = [candidate for candidate in pool if candidate[:1] == name[:1]][:_COMPARED]
    close = difflib.get_close_matches(name, pool, n=count, cutoff=0.5)
    return close or [candidate for candidate in pool if name and name in candidate][:count]


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Say which valid name is nearest, or list what is valid: a remedy sentence."""
    pool = sorted(set(valid))
    close = nearest(name, pool)
    if close:
        return f"did you mean {' or '.join(repr(candidate) for candidate in close)}?"
    shown = ", ".join(pool[:12]) + (", ..." if len(pool) > 12 else "")
    return f"valid: {shown}" if pool else ""
