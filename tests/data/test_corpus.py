"""The built-in corpus: real text, deterministic, and no leak between its splits."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kroncc.data import corpus
from kroncc.errors import DataError


def test_sizes() -> None:
    rows = corpus.python_docs()
    assert set(rows) == {"train", "validation"}
    assert 2000 <= len(rows["train"]) <= 5000
    assert 300 <= len(rows["validation"]) <= 1000


@pytest.mark.parametrize("split", ["train", "validation"])
def test_rows_are_prose(split: str) -> None:
    rows = corpus.python_docs()[split]
    assert len(set(rows)) == len(rows)
    for row in rows:
        assert corpus.SHORTEST <= len(row) <= corpus.LONGEST
        assert row == " ".join(row.split())
        assert "::=" not in row
        assert ">>>" not in row
        assert "----" not in row


def test_no_sentence_is_in_both_splits() -> None:
    rows = corpus.python_docs()
    validation = {sentence for row in rows["validation"] for sentence in corpus.sentences(row)}
    train = {sentence for row in rows["train"] for sentence in corpus.sentences(row)}
    assert len(validation) > 250
    assert not validation & train


def test_topics_stay_whole() -> None:
    """Every row comes from a topic of its own split."""
    topics = corpus._topics()
    text = {
        held: {
            row
            for name, topic in topics.items()
            if corpus._is_validation(name) is held
            for row in _all_rows(topic)
        }
        for held in (True, False)
    }
    rows = corpus.python_docs()
    assert set(rows["validation"]) <= text[True]
    assert set(rows["train"]) <= text[False]


def _all_rows(topic: str) -> set[str]:
    found = set()
    for paragraph in corpus.paragraphs(topic):
        found |= {paragraph, *corpus.sentences(paragraph)}
    return found


def test_same_in_every_process() -> None:
    code = "from kroncc.data.corpus import *; print(hashlib.sha256(repr(python_docs()).encode()).digest())"
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
        ).stdout
        for seed in ("0", "1")
    }
    assert len(seen) == 1


def test_paragraphs_leave_out_what_is_not_prose() -> None:
    topic = (
        "Heading\n*******\n\nThe first paragraph is\nbroken over two-\nlines, see below. [3]\n\n"
        '   if_stmt ::= "if" expression\n\n   >>> code()\n   1\n\n+----+\n| a  |\n+----+\n\n'
        "* A bullet that says something of use.\n\n   for x in y:\n       print(x)\n"
    )
    assert list(corpus.paragraphs(topic)) == [
        "The first paragraph is broken over two-lines, see below.",
        "A bullet that says something of use.",
    ]


def test_sentences() -> None:
    text = 'It ends here. Use e.g. Python for it! Does "x" work? Yes, 3.5 is fine'
    found = corpus.sentences(text)
    assert found == ["It ends here.", "Use e.g. Python for it!", 'Does "x" work?', "Yes, 3.5 is fine"]
    assert " ".join(found) == text


def test_missing_module_is_a_data_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match=r"K614.*pydoc_data"):
        corpus._topics()
