"""Expectations: `factored.params: "<= 15_000_000"`, `task.accuracy: ">= 0.99 * teacher.accuracy"`.

Grammar, read by a small parser of our own (nothing is ever evaluated as Python):

    expectation = ("<=" | ">=" | "==" | "!=" | "<" | ">") sum
    sum         = product (("+" | "-") product)*
    product     = factor (("*" | "/") factor)*
    factor      = "-" factor | "(" sum ")" | number | name
    number      = 12, 1_000, 0.99, 1.5e-3
    name        = STEP "." attribute            attribute: letters, digits, "_", and dots between words

A step's name may hold "-" (`task-sst2.accuracy`); an attribute may not, so `a.params-b.params` is a
difference. A minus after a bare word has no meaning of its own: `2*a-b.params` names the step `a-b`.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kroncc.errors import RecipeError

MAX_LENGTH = 500
MAX_DEPTH = 40

_NAME = r"[A-Za-z][A-Za-z0-9_-]*(?:\.[A-Za-z_][A-Za-z0-9_]*)+"
_TOKEN = re.compile(
    rf"\s*(?:(?P<compare><=|>=|==|!=|<|>)|(?P<name>{_NAME})"
    r"|(?P<number>(?:\d[\d_]*(?:\.[\d_]*)?|\.\d[\d_]*)(?:[eE][+-]?\d+)?)|(?P<operator>[-+*/()]))",
    re.ASCII,
)
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}


def _divide(left: float, right: float) -> float:
    if right:
        return left / right
    return math.nan if left == 0 or math.isnan(left) else math.copysign(math.inf, left)


_ARITHMETIC: dict[str, Callable[[float, float], float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": _divide,
}


@dataclass(frozen=True)
class Term:
    """One node of the parsed right side: a number, a name, or an operator over two terms."""

    value: float | str
    left: Term | None = None
    right: Term | None = None

    def names(self) -> set[str]:
        """Return the names that the term reads."""
        if self.left is not None and self.right is not None:
            return self.left.names() | self.right.names()
        return {self.value} if isinstance(self.value, str) else set()

    def evaluate(self, values: Mapping[str, float]) -> float:
        """Return the number; a division by zero gives inf or nan, as in IEEE 754."""
        if self.left is not None and self.right is not None:
            return _ARITHMETIC[str(self.value)](self.left.evaluate(values), self.right.evaluate(values))
        return float(values[self.value]) if isinstance(self.value, str) else self.value


@dataclass(frozen=True)
class Expectation:
    """One demand on a result: `key` must compare with the term on the right."""

    key: str
    text: str
    compare: str
    term: Term

    def names(self) -> set[str]:
        """Return every `STEP.attribute` that must be known to judge this, the key among them."""
        return {self.key} | self.term.names()

    def evaluate(self, values: Mapping[str, float]) -> bool | None:
        """Say whether `values` meet this; None while one of the names is not known."""
        if not self.names() <= values.keys():
            return None
        right = self.term.evaluate(values)
        return math.isfinite(right) and _COMPARE[self.compare](float(values[self.key]), right)

    def describe(self, values: Mapping[str, float]) -> str:
        """Return the demand with its numbers, as far as they are known."""
        names = sorted(self.term.names())
        known = [f"{name} = {_number(values[name])}" for name in names if name in values]
        missing = [name for name in sorted(self.names()) if name not in values]
        wanted = f"wanted {self.text}"
        if names and not set(names) - values.keys():
            wanted += f" = {_number(self.term.evaluate(values))}"
        found = f"{self.key} = {_number(values[self.key])}" if self.key in values else self.key
        notes = "; ".join([*known, *(f"{name} is not known yet" for name in missing)])
        return f"{found}, {wanted}" + (f" ({notes})" if notes else "")


def parse_expectation(key: str, text: str) -> Expectation:
    """Parse one entry of `expect`. Raises `RecipeError` K170 with a caret under the fault."""
    if not re.fullmatch(_NAME, key, re.ASCII):
        raise RecipeError(
            f"{key!r} is not the name of a result",
            code="K171",
            expected="STEP.attribute, e.g. factored.params",
        )
    return _Parser(key, text).parse()


class _Parser:
    """Recursive descent over the tokens of one expectation."""

    def __init__(self, key: str, text: str) -> None:
        self.key, self.text = key, re.sub(r"\s", " ", text)
        self.depth = 0
        self.tokens: list[tuple[str, str, int]] = []  # kind, text, column from 0
        self.index = 0

    def parse(self) -> Expectation:
        if len(self.text) > MAX_LENGTH:
            raise RecipeError("an expectation is too long", code="K170", expected=f"{MAX_LENGTH} characters")
        self._scan()
        kind, compare, _ = self._next()
        if kind != "compare":
            raise self._fault(0, "<=, >=, ==, !=, < or > first")
        term = self._sum()
        if self._peek()[0] != "end":
            raise self._fault(self.index, "an operator or the end")
        return Expectation(self.key, self.text.strip(), compare, term)

    def _scan(self) -> None:
        at = 0
        while self.text[at:].strip():
            found = _TOKEN.match(self.text, at)
            if not found:
                at += len(self.text[at:]) - len(self.text[at:].lstrip())
                raise self._error(at, "a number, STEP.attribute, + - * / ( ) or a comparison")
            kind = str(found.lastgroup)
            self.tokens.append((kind, found[kind], found.start(kind)))
            at = found.end()
        self.tokens.append(("end", "", len(self.text)))

    def _peek(self) -> tuple[str, str, int]:
        return self.tokens[self.index]

    def _next(self) -> tuple[str, str, int]:
        token = self.tokens[self.index]
        self.index = min(self.index + 1, len(self.tokens) - 1)
        return token

    def _sum(self) -> Term:
        return self._chain("+-", lambda: self._chain("*/", self._factor))

    def _chain(self, operators: str, part: Callable[[], Term]) -> Term:
        left = part()
        while self._peek()[0] == "operator" and self._peek()[1] in operators:
            left = Term(self._next()[1], left, part())
        return left

    def _factor(self) -> Term:
        at = self.index
        kind, text, _ = self._next()
        if kind == "number":
            return Term(self._number(text, at))
        if kind == "name":
            return Term(text)
        self.depth += 1
        if text not in ("-", "(") or self.depth > MAX_DEPTH:
            raise self._fault(at, "a number, STEP.attribute or (")
        if text == "-":
            term = Term("-", Term(0.0), self._factor())
        else:
            term = self._sum()
            at = self.index
            if self._next()[1] != ")":
                raise self._fault(at, ")")
        self.depth -= 1
        return term

    def _number(self, text: str, at: int) -> float:
        if re.search(r"__|_$|_[.eE]|[.]_", text):
            raise self._fault(at, "a number such as 15_000_000")
        return float(text.replace("_", ""))

    def _fault(self, index: int, expected: str) -> RecipeError:
        return self._error(self.tokens[index][2], expected)

    def _error(self, column: int, expected: str) -> RecipeError:
        caret = " " * column + "^"
        return RecipeError(
            f"the expectation cannot be read at character {column + 1}",
            code="K170",
            expected=f"{expected}, at the caret\n    {self.text}\n    {caret}",
        )


def _number(value: float) -> str:
    number = float(value)
    return (
        f"{number:,.0f}".replace(",", "_") if number.is_integer() and abs(number) < 1e15 else f"{number:.6g}"
    )
