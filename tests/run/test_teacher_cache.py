from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from kroncc.errors import RunError
from kroncc.run.teacher_cache import build_cache, open_cache

LENGTHS = [3, 1, 4, 1, 5]


class Given(NamedTuple):
    outputs: dict[str, torch.Tensor]
    taps: dict[str, list[torch.Tensor]]


class Rows:
    """Five rows of 1 to 5 tokens, two in a batch."""

    def epoch(self, number: int) -> list[list[int]]:
        return [[2, 4], [0, 1], [3]]

    def collate(self, rows: Sequence[int], epoch: int = 0) -> dict[str, torch.Tensor]:
        width = max(LENGTHS[row] for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        for at, row in enumerate(rows):
            ids[at, : LENGTHS[row]] = torch.arange(LENGTHS[row]) + 10 * row + 1
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


class Teacher:
    """Values that depend on the ids alone, as a frozen model's do; padding gets garbage."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.calls = 0
        self.dtype = dtype

    def __call__(self, batch) -> Given:
        self.calls += 1
        ids = batch["input_ids"]
        hidden = ids[:, :, None] * torch.tensor([1.0, 0.5, -2.0])
        hidden = hidden.masked_fill(ids[:, :, None] == 0, 777.0).to(self.dtype)
        scores = hidden @ hidden.transpose(1, 2)
        logits = torch.stack([ids.sum(1), ids.amax(1)], 1).to(self.dtype)
        return Given({"logits": logits}, {"hidden": [hidden, hidden * 2], "attention.scores": [scores]})


def build(directory: Path, taps: Sequence[str], teacher: Teacher | None = None, **options) -> str | None:
    return build_cache(directory, "key", teacher or Teacher(), Rows(), taps, LENGTHS, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_come_back_as_the_teacher_gave_them_in_any_company(tmp_path: Path, dtype: torch.dtype) -> None:
    assert build(tmp_path / "c", ["hidden", "logits"], Teacher(dtype)) is None
    cache = open_cache(tmp_path / "c", "key", LENGTHS)
    assert cache is not None
    for rows in ([0, 4], [3, 1], [2], [4, 3, 2, 1, 0]):
        batch = Rows().collate(rows)
        fresh = Teacher(dtype)(batch)
        recalled = cache.recall(rows, batch["input_ids"].shape[1], torch.device("cpu"))
        assert torch.equal(recalled.taps["logits"][0], fresh.outputs["logits"].to(recalled.taps["logits"][0]))
        real = batch["attention_mask"].bool()
        for layer in (0, 1):
            value = recalled.taps["hidden"][layer]
            assert torch.equal(value[real], fresh.taps["hidden"][layer][real].to(value))
            assert not value[~real].any()


def test_every_row_is_asked_for_once(tmp_path: Path) -> None:
    teacher = Teacher()
    build(tmp_path / "c", ["logits"], teacher)
    assert teacher.calls == 1 + len(Rows().epoch(0))  # one more to learn the shapes


def test_attention_is_not_cached(tmp_path: Path) -> None:
    why = build(tmp_path / "c", ["logits", "attention.scores"])
    assert why is not None
    assert "attention.scores" in why
    assert not (tmp_path / "c").exists()


def test_more_than_the_limit_is_not_cached(tmp_path: Path) -> None:
    size = 4 * (2 * 3 * sum(LENGTHS) + 2 * len(LENGTHS))
    assert build(tmp_path / "c", ["hidden", "logits"], limit=size - 1) is not None
    assert not (tmp_path / "c").exists()
    assert build(tmp_path / "c", ["hidden", "logits"], limit=size) is None
    stored = sum(path.stat().st_size for path in (tmp_path / "c").glob("*.bin"))
    assert stored == size


def test_another_key_or_a_half_made_cache_is_not_opened(tmp_path: Path) -> None:
    build(tmp_path / "c", ["logits"])
    assert open_cache(tmp_path / "c", "other", LENGTHS) is None
    assert open_cache(tmp_path / "nothing", "key", LENGTHS) is None
    next((tmp_path / "c").glob("*.bin")).unlink()
    assert open_cache(tmp_path / "c", "key", LENGTHS) is None


def test_an_unwritable_place_is_a_plain_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="K802"):
        build(tmp_path / "file" / "c", ["logits"])
