"""Shapes of the factors: completed from what was given, or chosen to meet a budget of parameters."""

from __future__ import annotations

from collections.abc import Iterator

from kroncc.api import PassError
from kroncc_passes._kronecker_product import contraction

Shape = tuple[int, int]
SHOWN = 24  # divisors listed in a message


def factor_parameters(a: Shape, b: Shape, rank: int, scalars: bool) -> int:
    """Return the number of parameters of `rank` products, with one scalar each if `scalars`."""
    return rank * (a[0] * a[1] + b[0] * b[1] + int(scalars))


def complete(size: Shape, a: Shape | None, b: Shape | None) -> tuple[Shape, Shape]:
    """Return both shapes for a weight of `size` from one of them or both.

    Raises PassError K420 (a shape does not divide the weight), K421 (both given, and they do not make it up).
    """
    if a is not None and b is not None:
        if (a[0] * b[0], a[1] * b[1]) == size:
            return a, b
        raise PassError(
            f"a {list(a)} (x) b {list(b)} is {a[0] * b[0]}x{a[1] * b[1]}, the weight is {size[0]}x{size[1]}",
            code="K421",
            expected=f"a[0] * b[0] = {size[0]} and a[1] * b[1] = {size[1]}",
            remedy="give only one of them: the other follows",
        )
    if a is not None:
        return a, _cofactor(size, a, "a")
    assert b is not None, "one of a and b is required by the pass"
    return _cofactor(size, b, "b"), b


def fit(
    size: Shape, budget: int, fixed: int, rank: int, scalars: bool, *, whole_rows: bool
) -> tuple[Shape, Shape]:
    """Return the shapes with the most parameters within `budget`, of which `fixed` go to the bias.

    Among equals, those with the fewest FLOPs, then with the smallest a. `whole_rows` keeps b at one row, so
    that every row of the weight has its own row of A. Raises PassError K423 if nothing is small enough.
    """

    def parameters(pair: tuple[Shape, Shape]) -> int:
        return fixed + factor_parameters(*pair, rank, scalars)

    pairs = (pair for pair in _factorisations(size) if not whole_rows or pair[1][0] == 1)
    allowed = [pair for pair in pairs if rank <= _largest_rank(*pair)]
    small = [pair for pair in allowed if parameters(pair) <= budget]
    if small:
        return max(small, key=lambda pair: (parameters(pair), -contraction(*pair).cost))
    least = min(map(parameters, allowed), default=None)
    raise PassError(
        f"no factors of a {size[0]}x{size[1]} weight, rank {rank}, keep the module to {budget} parameters",
        code="K423",
        expected=f"a budget of {least} or more" if least else f"a rank below {rank}",
        remedy="lower `ratio` or `rank`, or raise `params`" if least else "lower `rank`",
    )


def check_rank(a: Shape, b: Shape, rank: int) -> None:
    """Raise PassError K422 if `rank` products are more than any weight of this size needs."""
    most = _largest_rank(a, b)
    if rank <= most:
        return
    raise PassError(
        f"rank {rank} is too large for a {list(a)} (x) b {list(b)}",
        code="K422",
        expected=f"1 to {most}: the number of entries of the smaller factor",
        remedy=f"set `rank` to {most} or less",
    )


def _largest_rank(a: Shape, b: Shape) -> int:
    return min(a[0] * a[1], b[0] * b[1])


def _factorisations(size: Shape) -> Iterator[tuple[Shape, Shape]]:
    """Yield all pairs of shapes, the smallest a first."""
    for m1 in _divisors(size[0]):
        for n1 in _divisors(size[1]):
            yield (m1, n1), (size[0] // m1, size[1] // n1)


def _cofactor(size: Shape, given: Shape, name: str) -> Shape:
    wrong = [axis for axis in (0, 1) if size[axis] % given[axis]]
    if not wrong:
        return size[0] // given[0], size[1] // given[1]
    raise PassError(
        f"{name} {list(given)} does not divide the {size[0]}x{size[1]} weight",
        code="K420",
        expected="; ".join(f"{name}[{axis}] one of {_listed(_divisors(size[axis]))}" for axis in wrong),
        remedy=f"nearest: {name}: {[_nearest_divisor(size[axis], given[axis]) for axis in (0, 1)]}",
    )


def _divisors(number: int) -> list[int]:
    low = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*low, *(number // d for d in low)})


def _nearest_divisor(number: int, wish: int) -> int:
    return min(_divisors(number), key=lambda divisor: abs(divisor - wish))


def _listed(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:SHOWN]))
    return shown if len(numbers) <= SHOWN else f"{shown}, ... {numbers[-1]}"
