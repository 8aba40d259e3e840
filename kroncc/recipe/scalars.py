"""What an unquoted YAML word means: the core schema of YAML 1.2, with `1_000` and without surprises.

`1e-3` is a number, `on` and `2024-01-01` are text, and so is `010`, which one reader takes for 8 and another
for 10.
"""

from __future__ import annotations

import re

from kroncc.recipe.node import Scalar

_INT = re.compile(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)", re.ASCII)
_BASED = re.compile(r"[-+]?0(x[0-9a-fA-F]+|o[0-7]+|b[01]+)", re.ASCII)
_FLOAT = re.compile(r"[-+]?(((0|[1-9][0-9]*(_[0-9]+)*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?)", re.ASCII)
_WORDS: dict[str, Scalar] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf"), float("inf")),
    "-.inf": float("-inf"),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}
MAX_DIGITS = 400


def resolve_scalar(text: str) -> Scalar:
    """Return the value of an unquoted word."""
    if text in _WORDS:
        return _WORDS[text]
    if len(text) > MAX_DIGITS:
        return text
    if _INT.fullmatch(text):
        return int(text)
    if _BASED.fullmatch(text):
        return int(text, 0)
    return float(text) if _FLOAT.fullmatch(text) else text


TAG = "tag:yaml.org,2002:"


def resolve_tagged(tag: str, text: str) -> Scalar:
    """Return the value of a word with an explicit tag; raise ValueError where they do not go together."""
    if tag in ("!", TAG + "str"):
        return text
    value = resolve_scalar(text)
    if tag == TAG + "float" and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    wanted = {TAG + "int": int, TAG + "float": float, TAG + "bool": bool, TAG + "null": type(None)}
    if type(value) is not wanted.get(tag):
        raise ValueError(f"{text!r} does not read as {tag.removeprefix(TAG)}")
    return value
