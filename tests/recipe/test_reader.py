import json
import math
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kroncc.errors import RecipeError
from kroncc.recipe.reader import MAX_BYTES, MAX_DEPTH, read_file, read_yaml
from kroncc.recipe.scalars import resolve_scalar


def read(text: str):
    return read_yaml(text, "r.yaml").plain()


def problems(text: str):
    with pytest.raises(RecipeError) as caught:
        read_yaml(text, "r.yaml")
    return caught.value.problems


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("1.0e-3", 1e-3),
        ("1_000", 1000),
        ("1_000.5", 1000.5),
        (".5", 0.5),
        ("5.", 5.0),
        ("-3", -3),
        ("+3", 3),
        ("0", 0),
        ("0x1F", 31),
        ("0o17", 15),
        ("0b101", 5),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("Off", "Off"),
        ("y", "y"),
        ("010", "010"),
        ("-007", "-007"),
        ("00", "00"),
        ("1__0", "1__0"),
        ("_1", "_1"),
        ("1_", "1_"),
        ("2024-01-01", "2024-01-01"),
        ("2001-12-14t21:59:43.10-05:00", "2001-12-14t21:59:43.10-05:00"),
        ("1:30", "1:30"),
        ("12e03", 12e3),
        ("1e999", math.inf),
        ("0x", "0x"),
        ("=", "="),
        ("９", "９"),  # a full-width nine is text
    ],
)
def test_words(word: str, value: object):
    found = read(f"a: {word}")["a"] if word else read("a:")["a"]
    assert found == value
    assert type(found) is type(value)


def test_quoted_words_are_text():
    assert read("""{a: "1", b: 'true', c: "", d: "null"}""") == {"a": "1", "b": "true", "c": "", "d": "null"}


def test_keys_are_always_text():
    assert read("{on: 1, yes: 2, 3: 4, null: 5, 1e-3: 6}") == {
        "on": 1,
        "yes": 2,
        "3": 4,
        "null": 5,
        "1e-3": 6,
    }


def test_places_count_from_one_and_letters_not_bytes():
    root = read_yaml("é: {ü: 1, b: [x, yy]}\nc: |\n  text\n", "r.yaml")
    inner = root.children["é"].children["b"]
    assert str(inner.key) == "r.yaml:1:11"
    assert str(inner.items[1].place) == "r.yaml:1:18"
    assert str(root.children["c"].key) == "r.yaml:2:1"


def test_aliases_and_merge_keys():
    text = "a: &x {k: 1, l: 2}\nb: *x\nc: {<<: *x, l: 3}\nd: {<<: [{l: 5}, *x]}\ne: {'<<': 1}\n"
    assert read(text) == {
        "a": {"k": 1, "l": 2},
        "b": {"k": 1, "l": 2},
        "c": {"k": 1, "l": 3},
        "d": {"l": 5, "k": 1},
        "e": {"<<": 1},
    }


def test_plain_tags():
    assert read("[!!str 1, !!float 1, !!int '3', !!bool 'true', !!null '', ! 5]") == [
        "1",
        1.0,
        3,
        True,
        None,
        "5",
    ]


@pytest.mark.parametrize(
    ("text", "code", "line", "column"),
    [
        ("a: [1, 2", "K104", 2, 1),
        ("a: 1\n  b: 2", "K104", 2, 4),
        ("a: @ffn.up", "K104", 1, 4),
        ("a: >= 3", "K104", 1, 5),
        ("a: *.dense", "K104", 1, 5),
        ("a: %x", "K104", 1, 4),
        ("a: `x`", "K104", 1, 4),
        ("a: 'x", "K104", 1, 6),
        ("a:\n\t- b", "K104", 2, 1),
        ("\ta: 1", "K104", 1, 1),
        ("a: \x01b", "K103", 1, 4),
        ("", "K105", 1, 1),
        ("# only a comment\n", "K105", 1, 1),
        ("a: 1\n---\nb: 2\n", "K106", 2, 1),
        ("a: 1\na: 2\n", "K108", 2, 1),
        ("a: {b: 1, 'b': 2}", "K108", 1, 11),
        ("a: &x [*x]", "K111", 1, 8),
        ("a: *nothing", "K111", 1, 4),
        ("a: &x {b: &y [*x]}", "K111", 1, 15),
        ("a: !!python/object/apply:os.system ['echo']", "K112", 1, 4),
        ("a: !!python/name:os.system", "K112", 1, 4),
        ("a: !!set {b, c}", "K112", 1, 4),
        ("a: !!binary aGk=", "K112", 1, 4),
        ("a: !mine 3", "K112", 1, 4),
        ("a: !!int x", "K112", 1, 4),
        ("a: != 3", "K112", 1, 4),
        ("? [a, b]\n: 3", "K113", 1, 3),
        ("? {a: b}\n: 3", "K113", 1, 3),
        ("{a: {<<: 3}}", "K114", 1, 6),
        ("{a: {<<: [1]}}", "K114", 1, 6),
    ],
)
def test_bad_yaml(text: str, code: str, line: int, column: int):
    found = problems(text)[0]
    assert (found.code, found.place.line, found.place.column) == (code, line, column), found
    assert found.expected


def test_every_duplicate_is_reported_with_the_first_place():
    found = problems("a: 1\nb: {c: 1, c: 2}\na: 3\na: 4\n")
    assert [str(one.place) for one in found] == ["r.yaml:2:11", "r.yaml:3:1", "r.yaml:4:1"]
    assert "first at r.yaml:1:1" in found[1].message


def test_quotes_are_recommended_where_they_help():
    assert "quotes" in problems("targets: [@ffn.up]")[0].remedy
    assert "quotes" in problems("expect: {a.b: >= 1}")[0].remedy


def test_depth_is_bounded():
    assert read("[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1))
    assert problems("[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2))[0].code == "K109"


@pytest.mark.parametrize("opening", ["[", "{a: ", "- ", "? "])
def test_a_bomb_of_brackets_is_refused_quickly(opening: str):
    start = time.process_time()
    assert problems((opening * MAX_BYTES)[:MAX_BYTES])[0].code in ("K104", "K109")
    assert time.process_time() - start < 5


def test_depth_counts_through_aliases():
    levels = "\n".join(f"a{n}: &a{n} [[[[[*a{n - 1}]]]]]" for n in range(1, 15))
    assert problems(f"a0: &a0 [1]\n{levels}")[0].code == "K109"


def test_a_bomb_of_aliases_is_refused_quickly():
    row = ", ".join
    levels = "\n".join(f"a{n}: &a{n} [{row([f'*a{n - 1}'] * 10)}]" for n in range(1, 10))
    start = time.process_time()
    assert problems(f"a0: &a0 x\n{levels}")[0].code == "K110"
    assert time.process_time() - start < 5


def test_unreadable_files(tmp_path: Path):
    (tmp_path / "big.yaml").write_bytes(b"#" * (MAX_BYTES + 1))
    (tmp_path / "latin.yaml").write_bytes("a: 1\nb: é".encode("latin-1"))
    (tmp_path / "binary.yaml").write_bytes(b"\x80\x02}q\x00.")
    for name, code in [
        ("none.yaml", "K101"),
        ("", "K101"),
        ("a\0b", "K101"),
        ("big.yaml", "K102"),
        ("latin.yaml", "K103"),
        ("binary.yaml", "K103"),
    ]:
        with pytest.raises(RecipeError) as caught:
            read_file(tmp_path / name)
        assert caught.value.problems[0].code == code
    with pytest.raises(RecipeError) as caught:
        read_file(tmp_path / "latin.yaml")
    assert str(caught.value.problems[0].place).endswith("latin.yaml:2:4")


def test_byte_order_mark_is_left_out(tmp_path: Path):
    file = tmp_path / "r.yaml"
    file.write_bytes(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n")
    assert read(read_file(file)) == {"a": 1, "b": 2}


def _check_placed(error: RecipeError) -> None:
    assert all(problem.code.startswith("K1") and problem.place for problem in error.problems)


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@given(plain)
def test_json_reads_as_itself(value: object):
    text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    try:
        found = read(text)
    except RecipeError:  # JSON allows letters that YAML does not
        assert any(ord(letter) > 126 for letter in text)
    else:
        assert found == value


@given(st.text(max_size=60) | st.text("ab:-[]{}&*!|>'\"#%@`,?\n\t 01.~<", max_size=60))
def test_any_text_reads_or_is_refused(text: str):
    try:
        read_yaml(text, "r.yaml")
    except RecipeError as error:
        _check_placed(error)


@given(st.text(max_size=20))
def test_any_word_resolves(text: str):
    resolve_scalar(text)
