"""What a loss term may compare: layers, weights, widths, heads. Shapes only: nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from kroncc.errors import PlanError, did_you_mean
from kroncc.recipe.schema import LossSpec

Shape = Sequence[int | str]  # text for a dimension that is not fixed
Shapes = Mapping[str, Sequence[Shape]]  # tap -> one shape a layer
PAIRWISE = ("attention.scores", "attention.probs")  # [batch, heads, length, length]
SOFT = ("kl", "soft-ce")  # compare distributions; the only kinds with a temperature
HEADS_REMEDY = (
    "use `relation`, which splits both anew, or compare 'hidden', 'ffn.output' or 'embeddings' "
    "(their widths may differ), or 'logits'"
)


def term_names(specs: Sequence[LossSpec]) -> list[str]:
    """Return a distinct name for each term, as reports show it: `task`, `kl(logits)`, `mse(hidden)#2`."""
    names: list[str] = []
    for spec in specs:
        plain = spec.kind if spec.kind == "task" else f"{spec.kind}({spec.at})"
        twins = sum(name == plain or name.startswith(f"{plain}#") for name in names)
        names.append(f"{plain}#{twins + 1}" if twins else plain)
    return names


def needed_taps(specs: Sequence[LossSpec]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the taps that (student, teacher) must give; logits are outputs already and not among them."""
    taps = tuple(dict.fromkeys(spec.at for spec in specs if spec.kind != "task" and spec.at != "logits"))
    return taps, taps


def all_taps(specs: Sequence[LossSpec]) -> list[str]:
    """Return every tap that a training stage reads of its student, the logits among them."""
    taps = list(needed_taps(specs)[0])
    return [*taps, "logits"] if any(spec.kind == "task" or spec.at == "logits" for spec in specs) else taps


def weight_at(spec: LossSpec, progress: float) -> float:
    """Return the weight of a term at `progress` (0..1): straight lines between points, level outside them."""
    if isinstance(spec.weight, float | int):
        return float(spec.weight)
    points = spec.weight
    if progress <= points[0][0]:
        return points[0][1]
    for (start, low), (end, high) in pairwise(points):
        if progress <= end:
            return low + (high - low) * (progress - start) / (end - start)
    return points[-1][1]


def resolve_layers(spec: LossSpec, student: int, teacher: int) -> list[tuple[int, int]]:
    """Return the pairs (student layer, teacher layer) of a term, both counted from 0.

    One to one where depths agree. `uniform` (also the default where they differ) gives layer i of the
    shallower student, counted from 1, layer round(i T / S) of the teacher (Jiao et al. 2020, TinyBERT);
    `last` pairs the last layers. Listed pairs may count from the end with -1. Raises `PlanError` (K740) for
    a pair that does not exist.
    """
    if isinstance(spec.layers, list):
        return [
            (_index(spec, s, student, "student"), _index(spec, t, teacher, "teacher")) for s, t in spec.layers
        ]
    if not student or not teacher:
        raise _layers(
            spec, f"the student gives {student} and the teacher {teacher} of it", "name another tap"
        )
    if spec.layers == "last":
        return [(student - 1, teacher - 1)]
    if student > teacher:
        raise _layers(
            spec,
            f"the student has {student} layers and the teacher {teacher}: no uniform map",
            "give `layers` as pairs [student, teacher], or `last`",
        )
    return [(at, (2 * (at + 1) * teacher + student) // (2 * student) - 1) for at in range(student)]


def check_spec(spec: LossSpec) -> None:
    """Raise `PlanError` for options of a term that cannot mean anything, whatever the models."""
    if spec.kind == "task" and spec.at != "logits":
        raise PlanError(
            f"the task loss is taken at the logits, not at {spec.at!r}",
            code="K749",
            path="at",
            remedy="leave `at` out",
        )
    if spec.temperature != 1.0 and (spec.kind not in SOFT or spec.at == "attention.probs"):
        raise PlanError(
            f"a temperature has no effect on {spec.kind} at {spec.at!r}",
            code="K743",
            path="temperature",
            remedy="leave it out, or use kl at logits or attention.scores",
        )
    if isinstance(spec.weight, list):
        places = [place for place, _ in spec.weight]
        if not places or any(after <= before for before, after in pairwise(places)):
            raise PlanError(
                f"the points of the weight of {spec.kind} do not rise: {places}",
                code="K744",
                path="weight",
                expected="[progress, weight] with rising progress from 0 to 1",
            )


def check_term(spec: LossSpec, student: Shapes, teacher: Shapes | None) -> list[tuple[int, int]]:
    """Return the layer pairs of a term, after checking that their shapes can be compared; [] for `task`.

    Raises `PlanError`: K740 layers, K741 heads, K742 no such tap, K745 one output, K746 no teacher, K747
    sizes of logits, K748 ranks.
    """
    check_spec(spec)
    if spec.kind == "task":
        return []
    if teacher is None:
        raise PlanError(f"{spec.kind} at {spec.at!r} needs a teacher", code="K746", remedy="use `distill`")
    for side, shapes in (("student", student), ("teacher", teacher)):
        if spec.at not in shapes:
            raise PlanError(
                f"the {side} gives no {spec.at!r}",
                code="K742",
                path="at",
                remedy=did_you_mean(spec.at, shapes),
            )
    pairs = resolve_layers(spec, len(student[spec.at]), len(teacher[spec.at]))
    check = _check_relation if spec.kind == "relation" else _check_shapes
    for at, to in pairs:
        check(spec, student[spec.at][at], teacher[spec.at][to])
    return pairs


def relation_heads(spec: LossSpec, teacher: Shape) -> int:
    """Return into how many heads a relation splits the widths: as asked, or as many as the teacher has."""
    return spec.heads or (int(teacher[1]) if len(teacher) == 4 else 1)


def _check_relation(spec: LossSpec, student: Shape, teacher: Shape) -> None:
    heads = relation_heads(spec, teacher)
    for side, shape in (("student", student), ("teacher", teacher)):
        if len(shape) not in (3, 4) or spec.at in PAIRWISE:
            raise PlanError(
                f"relation reads vectors, one a token; {spec.at!r} gives {len(shape)} dimensions",
                code="K748",
                path="at",
                remedy="read attention.values, attention.queries, attention.keys or hidden",
            )
        width = int(shape[-1]) * (int(shape[1]) if len(shape) == 4 else 1)
        if width % heads:
            raise PlanError(
                f"{spec.at!r} of the {side} has width {width}, which {heads} heads do not divide",
                code="K741",
                path="heads",
                remedy="set `heads` to a number that divides both widths",
            )


def projected_widths(spec: LossSpec, student: Shape, teacher: Shape) -> tuple[int, int] | None:
    """Return (student width, teacher width) where a learned projection must join them, else None."""
    fixed = spec.kind == "relation" or spec.at == "logits" or spec.at.startswith("attention.")
    if fixed or student[-1] == teacher[-1]:
        return None
    return int(student[-1]), int(teacher[-1])


def _check_shapes(spec: LossSpec, student: Shape, teacher: Shape) -> None:
    if len(student) != len(teacher):
        raise PlanError(
            f"{spec.at!r} has {len(student)} dimensions in the student and {len(teacher)} in the teacher",
            code="K748",
            path="at",
        )
    if spec.at.startswith("attention.") and student[1] != teacher[1]:
        raise PlanError(
            f"the student has {student[1]} attention heads and the teacher {teacher[1]}: "
            f"{spec.at!r} do not compare",
            code="K741",
            path="at",
            remedy=HEADS_REMEDY,
        )
    if spec.at.startswith("attention.") and spec.at not in PAIRWISE and student[-1] != teacher[-1]:
        raise PlanError(
            f"the student's heads have size {student[-1]} and the teacher's {teacher[-1]}: "
            f"{spec.at!r} do not compare",
            code="K741",
            path="at",
            remedy=HEADS_REMEDY,
        )
    if spec.at == "logits" and student[-1] != teacher[-1]:
        raise PlanError(
            f"the student's head has {student[-1]} outputs and the teacher's {teacher[-1]}",
            code="K747",
            path="at",
            remedy=f"set `labels: {teacher[-1]}` on the student's step",
        )
    if spec.at == "logits" and spec.kind in SOFT and student[-1] == 1:
        raise PlanError(
            f"{spec.kind} over a single output is always 0",
            code="K745",
            path="kind",
            remedy="use mse at logits",
        )


def _index(spec: LossSpec, layer: int, count: int, side: str) -> int:
    if not -count <= layer < count:
        raise _layers(spec, f"there is no layer {layer} in the {side}", f"it has layers 0 to {count - 1}")
    return layer % count


def _layers(spec: LossSpec, what: str, remedy: str) -> PlanError:
    return PlanError(f"{spec.kind} at {spec.at!r}: {what}", code="K740", path="layers", remedy=remedy)
