"""`builtin:python-docs`: paragraphs and sentences of the language reference that ships with CPython.

The text comes from `pydoc_data.topics`, so nothing is downloaded; its amount differs a little from one Python
version to the next. Headings, code, grammar and tables are left out.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable, Iterator

from kroncc.errors import DataError

SHORTEST, LONGEST = 20, 1200  # characters of a row
HELD_OUT = 8  # one topic in this many is validation

_PROSE = re.compile(r"[A-Za-z]{2,}")
_BULLET = re.compile(r"^(?:[*•\-–]|\d+\.|\[\d+\])\s+")
_NOT_PROSE = re.compile(r"::=|^>>>|^\.\.\. |^[+|]|[-=*~]{6}|\s{4,}\S|^\S+\(.*\)$")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(A-Z])")
_FOOTNOTE = re.compile(r"\s\[\d+\]")
_BROKEN_WORD = re.compile(r"(?<=[a-z])- (?=[a-z])")
_SHORTENED = re.compile(r"\b(?:e\.g|i\.e|etc|cf|vs|resp)\.$")


@functools.cache
def python_docs() -> dict[str, tuple[str, ...]]:
    """Return the rows of `train` and `validation`: the paragraphs of each topic, then their sentences.

    A topic belongs to one split, chosen by a hash of its name. Topics quote each other, so a paragraph of
    `train` that shares a sentence with `validation` is left out, and every row occurs once.

    Raises `DataError` where this Python comes without `pydoc_data`.
    """
    held_out: list[list[str]] = []
    rest: list[list[str]] = []
    for name, text in sorted(_topics().items()):
        for paragraph in paragraphs(text):
            (held_out if _is_validation(name) else rest).append(sentences(paragraph))
    seen = {sentence for paragraph in held_out for sentence in paragraph}
    return {
        "train": _rows(paragraph for paragraph in rest if seen.isdisjoint(paragraph)),
        "validation": _rows(held_out),
    }


def paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs of a topic that are prose, each on one line, without bullets."""
    for block in re.split(r"\n\s*\n", text):
        lines = block.strip("\n").split("\n")
        if any(_NOT_PROSE.search(line.strip()) for line in lines):
            continue
        paragraph = _BULLET.sub("", " ".join(" ".join(lines).split()))
        paragraph = _BROKEN_WORD.sub("-", _FOOTNOTE.sub("", paragraph))
        if _is_prose(paragraph):
            yield paragraph


def sentences(paragraph: str) -> list[str]:
    """Return the sentences of a paragraph; joined with spaces they give it back."""
    found: list[str] = []
    start = 0
    for end in _SENTENCE_END.finditer(paragraph):
        piece = paragraph[start : end.end()].strip()
        if not _SHORTENED.search(piece):
            found.append(piece)
            start = end.end()
    return [*found, paragraph[start:]] if start < len(paragraph) else found


def _rows(groups: Iterable[list[str]]) -> tuple[str, ...]:
    rows: dict[str, None] = {}
    for group in groups:
        whole = " ".join(group)
        for row in (whole, *group):
            if SHORTEST <= len(row) <= LONGEST:
                rows.setdefault(row)
    return tuple(rows)


def _is_prose(paragraph: str) -> bool:
    if len(_PROSE.findall(paragraph)) < 4:
        return False
    letters = sum(char.isalpha() or char.isspace() for char in paragraph) / len(paragraph)
    ends_well = paragraph[-1] in '.:;!?)”"' or len(paragraph) >= 60
    return letters >= (0.7 if ends_well else 0.85)


def _is_validation(topic: str) -> bool:
    return int(hashlib.sha256(topic.encode()).hexdigest()[:8], 16) % HELD_OUT == 0


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            "this Python comes without the language reference (module pydoc_data)",
            code="K614",
            expected="a CPython with its whole standard library",
            remedy="install the distribution's full Python package, or name text files of your own",
        ) from error
    return dict(topics)
