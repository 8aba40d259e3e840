"""Opening data: every kind of file, what is chosen of it, and each mistake with its own error."""

from __future__ import annotations

import errno
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from kroncc.data.splits import SplitData, open_data
from kroncc.errors import DataError
from kroncc.recipe.schema import DataSpec

ROWS = [("a fine film", 1), ('he said "no', 0), ("NA", 1), ("007", 0)]


def write_tsv(
    path: Path, rows: list[tuple[Any, ...]] = ROWS, head: str = "text\tlabel", bom: bool = False
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [head, *("\t".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8-sig" if bom else "utf-8")
    return path


def spec_of(**options: Any) -> DataSpec:
    return DataSpec.model_validate({"source": "csv", "delimiter": "\t", "quoting": False, **options})


def opened(root: Path, **options: Any) -> SplitData:
    return open_data(spec_of(**options), "mine", root, root / "cache")


def failure(root: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        opened(root, **options)
    (problem,) = caught.value.problems
    return f"{problem.code} {problem.message} | {problem.expected} | {problem.remedy}"


@pytest.mark.parametrize("bom", [False, True])
def test_csv_keeps_text_as_it_stands(tmp_path: Path, bom: bool) -> None:
    write_tsv(tmp_path / "a.tsv", bom=bom)
    data = opened(tmp_path, files="a.tsv", label="label")
    assert data.rows() == {"train": 4}
    assert list(data["train"].rows["text"]) == [text for text, _ in ROWS]
    assert list(data["train"].rows["label"]) == [1, 0, 1, 0]


def test_csv_with_quotes_and_commas(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,text\n1,"one, ""two""\nthree"\n2,four\n')
    data = opened(tmp_path, files=["a.csv"], delimiter=",", quoting=True)
    assert list(data["train"].rows["text"]) == ['one, "two"\nthree', "four"]


def test_stray_quote_that_swallows_lines_is_refused(tmp_path: Path) -> None:
    write_tsv(tmp_path / "a.tsv", [('"open', 1), ("b", 0), ('close"', 1)])
    assert failure(tmp_path, files="a.tsv", quoting=True).startswith("K621")
    assert opened(tmp_path, files="a.tsv").rows() == {"train": 3}


@pytest.mark.parametrize("lines", [True, False])
def test_json(tmp_path: Path, lines: bool) -> None:
    rows = [{"text": "one", "y": 0.5}, {"text": "two", "y": 1.0}]
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
    (tmp_path / "a.json").write_text(text, encoding="utf-8-sig")
    data = opened(tmp_path, source="json", files="a.json", label="y")
    assert list(data["train"].rows["label"]) == [0.5, 1.0]
    assert data.labels is not None
    assert data.labels.kind == "regression"


def test_parquet_pairs(tmp_path: Path) -> None:
    rows = {"a": ["one", "two"], "b": ["eins", "zwei"], "y": ["no", "yes"]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "a.parquet")
    data = opened(tmp_path, source="parquet", files={"train": "a.parquet"}, text=["a", "b"], label="y")
    assert data["train"].rows[1] == {"text": "two", "text_2": "zwei", "label": 1}


def test_text_takes_non_empty_lines_and_counts_the_rest(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufefffirst\n\n  \nsecond\n")
    split = opened(tmp_path, source="text", files="a.txt")["train"]
    assert list(split.rows["text"]) == ["first", "second"]
    assert split.dropped == 2


def test_builtin_corpus() -> None:
    data = open_data(DataSpec(source="builtin:python-docs", limit={"train": 100}), "docs", Path())
    assert data.rows()["train"] == 100
    assert 300 <= data.rows()["validation"] <= 1000


def test_globs_splits_and_files_outside_the_recipe(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        path = tmp_path / "data [x]" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"line of {name}\n")
    root = tmp_path / "recipes"
    root.mkdir()
    files = {"train": ["../data [[]x]/*.txt"], "validation": "../data [x]/sub/c.txt"}
    data = opened(root, source="text", files=files)
    assert list(data["train"].rows["text"]) == ["line of a.txt", "line of b.txt"]
    assert list(data["validation"].rows["text"]) == ["line of sub/c.txt"]


def test_limit_and_renamed_splits(tmp_path: Path) -> None:
    write_tsv(tmp_path / "a.tsv")
    data = opened(tmp_path, files={"one": "a.tsv", "two": "a.tsv"}, split={"train": "two"}, limit=3)
    assert data.rows() == {"train": 3}


def test_validation_is_set_aside_by_text(tmp_path: Path) -> None:
    rows = [(f"row {number % 60}", number % 2) for number in range(120)]
    write_tsv(tmp_path / "a.tsv", rows)
    write_tsv(tmp_path / "b.tsv", rows[::-1])
    first = opened(tmp_path, files="a.tsv", validation_fraction=0.2)
    turned = opened(tmp_path, files="b.tsv", validation_fraction=0.2)
    assert first.rows() == {"train": 96, "validation": 24}
    texts = {split: set(first[split].rows["text"]) for split in first}
    assert not texts["train"] & texts["validation"]
    assert set(turned["validation"].rows["text"]) == texts["validation"]
    assert first["train"].key != first["validation"].key


def test_a_given_validation_split_is_left_alone(tmp_path: Path) -> None:
    write_tsv(tmp_path / "a.tsv")
    data = opened(tmp_path, files={"train": "a.tsv", "validation": "a.tsv"}, validation_fraction=0.5)
    assert data.rows() == {"train": 4, "validation": 4}


def test_labels_are_numbered_over_all_splits(tmp_path: Path) -> None:
    write_tsv(tmp_path / "a.tsv", [("x", "good"), ("y", "ugly")])
    write_tsv(tmp_path / "b.tsv", [("z", "bad")])
    data = opened(tmp_path, files={"train": "a.tsv", "validation": "b.tsv"}, label="label")
    assert list(data["train"].rows["label"]) == [1, 2]
    assert list(data["validation"].rows["label"]) == [0]


def test_a_split_of_placeholder_labels_is_unlabelled(tmp_path: Path) -> None:
    for name, labels in (("train", [0, 1]), ("test", [-1, -1])):
        datasets.Dataset.from_dict({"text": ["a", "b"], "label": labels}).to_parquet(
            tmp_path / f"{name}.parquet"
        )
    files = {"train": "train.parquet", "test": "test.parquet"}
    data = opened(tmp_path, source="parquet", files=files, label="label")
    assert data["train"].labels is not None
    assert data["test"].labels is None
    assert data["test"].rows.column_names == ["text"]


def test_fingerprint_follows_content_and_options_only(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        write_tsv(tmp_path / folder / "a.tsv")
    first = opened(tmp_path / "one", files="a.tsv").fingerprint()
    assert opened(tmp_path / "two", files="*.tsv").fingerprint() == first
    assert opened(tmp_path / "two", files="a.tsv", max_length=7).fingerprint() == first
    assert opened(tmp_path / "two", files="a.tsv", limit=2).fingerprint() != first
    path = write_tsv(tmp_path / "two" / "a.tsv", [*ROWS[:-1], ("008", 0)])  # the same size
    os.utime(path, (1, 1))
    assert opened(tmp_path / "two", files="a.tsv").fingerprint() != first


def test_changed_files_are_read_again(tmp_path: Path) -> None:
    write_tsv(tmp_path / "a.tsv")
    assert opened(tmp_path, files="a.tsv").rows() == {"train": 4}
    write_tsv(tmp_path / "a.tsv", [*ROWS, ("more", 1)])
    assert opened(tmp_path, files="a.tsv").rows() == {"train": 5}


def test_a_damaged_cache_is_made_again(tmp_path: Path) -> None:
    write_tsv(tmp_path / "a.tsv")
    opened(tmp_path, files="a.tsv")
    (cached,) = (tmp_path / "cache").glob("rows-*.arrow")
    cached.write_bytes(cached.read_bytes()[:100])
    assert opened(tmp_path, files="a.tsv").rows() == {"train": 4}


def test_nothing_is_left_behind_without_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tsv(tmp_path / "a.tsv")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    data = open_data(spec_of(files="a.tsv"), "mine", tmp_path)
    assert list(scratch.iterdir())
    assert data.rows() == {"train": 4}
    del data
    gc.collect()
    assert not list(scratch.iterdir())
    with pytest.raises(DataError):
        open_data(spec_of(files="a.tsv", text=["none"]), "mine", tmp_path)
    assert not list(scratch.iterdir())


def test_the_terminal_stays_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_tsv(tmp_path / "a.tsv")
    opened(tmp_path, files="a.tsv")
    failure(tmp_path, source="parquet", files="a.tsv")
    assert capfd.readouterr() == ("", "")


def test_missing_file_names_it_and_the_nearest(tmp_path: Path) -> None:
    write_tsv(tmp_path / "train.tsv")
    message = failure(tmp_path, files="trian.tsv")
    assert message.startswith("K602")
    assert "'trian.tsv'" in message
    assert "'train.tsv'" in message
    assert "does not exist" in failure(tmp_path, files="nowhere/train.tsv")
    assert "is a directory" in failure(tmp_path, files=".")
    assert "K602" in failure(tmp_path, files="*.csv")


def test_missing_column_names_the_nearest(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "a.tsv", head="sentence\tlabel")
    message = failure(tmp_path, files="a.tsv", text=["sentense"])
    assert message.startswith("K604")
    assert str(path) in message
    assert "did you mean 'sentence'?" in message
    assert "K604" in failure(tmp_path, files="a.tsv", text=["sentence"], label="lable")
    (tmp_path / "a.json").write_text('{"body": "x"}')
    assert "'body'" in failure(tmp_path, source="json", files="a.json", text=["bodies"])


@pytest.mark.parametrize("content", ["", "text\tlabel\n", "text\tlabel\n \t1\n"])
def test_empty_data(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.tsv").write_text(content)
    assert failure(tmp_path, files="a.tsv", label="label").startswith("K605")


@pytest.mark.parametrize("source", ["text", "json", "parquet"])
def test_empty_files_of_other_kinds(tmp_path: Path, source: str) -> None:
    (tmp_path / "a").write_bytes(b"")
    assert failure(tmp_path, source=source, files="a").startswith("K605")


def test_json_without_rows(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]")
    assert failure(tmp_path, source="json", files="a.json").startswith("K605")


@pytest.mark.parametrize("rows", ["a\tb\t1\n", "a\tb\t1\nc\td\t0\n"])
def test_more_fields_than_columns(tmp_path: Path, rows: str) -> None:
    (tmp_path / "a.tsv").write_text(f"text\tlabel\n{rows}")
    assert failure(tmp_path, files="a.tsv").startswith("K603")


def test_validation_that_takes_everything(tmp_path: Path) -> None:
    write_tsv(tmp_path / "a.tsv", [("same", 1), ("same", 0)])
    assert failure(tmp_path, files="a.tsv", validation_fraction=0.5).startswith("K605")


@pytest.mark.parametrize(
    ("source", "content"),
    [
        ("csv", b"text\tlabel\na\t1\nb\t2\t3\t4\n"),
        ("csv", b"text\tlabel\n\xff\xfe\t1\n"),
        ("text", b"fine\n\xff\xfe\n"),
        ("json", b'{"text": "a"}\n{"text": '),
        ("parquet", b"PAR1 but nothing else"),
    ],
)
def test_unreadable_content(tmp_path: Path, source: str, content: bytes) -> None:
    (tmp_path / "a.bin").write_bytes(content)
    message = failure(tmp_path, source=source, files="a.bin")
    assert message.startswith("K603")
    assert "a.bin" in message


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({}, "K601"),
        ({"files": []}, "K601"),
        ({"source": "builtin:pyton-docs"}, "K615"),
        ({"source": "tsv", "files": "a.tsv"}, "K616"),
        ({"files": "a.tsv", "text": ["text", "label", "text"]}, "K609"),
        ({"files": "a.tsv", "delimiter": "tab"}, "K617"),
        ({"files": "a.tsv", "split": {"train": "dev"}}, "K607"),
        ({"files": "a.tsv", "limit": {"validation": 3}}, "K607"),
        ({"files": "empty_label.tsv", "label": "label"}, "K606"),
        ({"source": "json", "files": "lists.json"}, "K620"),
        ({"source": "json", "files": "lists.json", "text": ["other"], "label": "text"}, "K606"),
    ],
)
def test_each_mistake_has_its_code(tmp_path: Path, options: dict[str, Any], code: str) -> None:
    write_tsv(tmp_path / "a.tsv")
    write_tsv(tmp_path / "empty_label.tsv", [("a", 1), ("b", "")])
    (tmp_path / "lists.json").write_text('{"text": ["a", "b"], "other": "c"}\n')
    assert failure(tmp_path, **options).startswith(code)


def test_unknown_split_is_refused(tmp_path: Path) -> None:
    write_tsv(tmp_path / "a.tsv")
    data = opened(tmp_path, files="a.tsv")
    with pytest.raises(DataError, match=r"K607.*'validation'") as caught:
        data["validation"]
    assert "validation_fraction" in caught.value.problems[0].remedy


def test_trouble_of_the_machine_is_not_blamed_on_the_data(tmp_path: Path) -> None:
    """A disk that takes no more: the error of the system comes through, and a later run is not spoilt."""
    pytest.importorskip("resource")
    write_tsv(tmp_path / "a.tsv", [(f"{number} " * 50, 0) for number in range(5000)])
    code = (
        "import resource, sys; from kroncc.data.splits import *; root = Path(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))\n"
        "spec = DataSpec(source='csv', delimiter='\\t', files='a.tsv')\n"
        "try: open_data(spec, 'mine', root, root / 'cache')\n"
        "except OSError as error: print(error.errno)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(errno.EFBIG)]
    assert opened(tmp_path, files="a.tsv").rows() == {"train": 5000}


def test_hub_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"K608.*'nobody/nothing'"):
        open_data(DataSpec(source="nobody/nothing"), "mine", tmp_path)


@pytest.mark.parametrize(
    ("source", "full", "empty"),
    [
        ("csv", "text\na film\n", "text\n"),
        ("json", '{"text": "a film"}\n', "[]\n"),
        ("text", "a film\n", "\n\n"),
    ],
)
def test_only_files_without_rows_are_blamed(tmp_path: Path, source: str, full: str, empty: str) -> None:
    (tmp_path / "full").write_text(full)
    (tmp_path / "void").write_text(empty)
    said = failure(tmp_path, source=source, files={"train": "full", "validation": "void"})
    assert said.startswith("K605")
    assert str(tmp_path / "full") not in said


def test_a_parquet_file_without_rows_is_named(tmp_path: Path) -> None:
    for name, rows in (("full", ["a film"]), ("void", [])):
        features = datasets.Features({"text": datasets.Value("string")})
        datasets.Dataset.from_dict({"text": rows}, features=features).to_parquet(tmp_path / name)
    said = failure(tmp_path, source="parquet", files={"train": "full", "validation": "void"})
    assert said.startswith("K605")
    assert "full" not in said
