import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from kroncc.errors import RunError
from kroncc.run.accelerators import make_accelerator
from kroncc.run.checkpoint import POSITION, Checkpoints, Position
from kroncc.run.progress import NullReporter


class Heard(NullReporter):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


def prepared(tmp_path: Path, stage_hash: str = "h"):
    accelerator = make_accelerator("fp32")
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    heard = Heard()
    return (
        model,
        optimizer,
        heard,
        Checkpoints(tmp_path / "checkpoints" / "s", stage_hash, accelerator, heard),
    )


def advance(model, optimizer) -> None:
    model(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def position(step: int, stage_hash: str = "h", world: int = 1) -> Position:
    return Position(hash=stage_hash, step=step, world=world, curve=[{"step": step, "loss": 0.1 + 0.2}])


def test_restores_weights_optimiser_and_random_numbers(tmp_path: Path) -> None:
    model, optimizer, _, checkpoints = prepared(tmp_path)
    advance(model, optimizer)
    checkpoints.save(position(1))
    advance(model, optimizer)
    expected = model.weight.detach().clone()
    drawn = (torch.rand(3), random.random(), np.random.rand())

    model, optimizer, _, checkpoints = prepared(tmp_path)
    restored = checkpoints.restore()
    assert restored is not None
    assert restored.step == 1
    assert restored.curve == [{"step": 1, "loss": 0.1 + 0.2}]
    advance(model, optimizer)
    assert torch.equal(model.weight, expected)
    again = (torch.rand(3), random.random(), np.random.rand())
    assert torch.equal(drawn[0], again[0])
    assert drawn[1:] == again[1:]


def test_keeps_the_last_two(tmp_path: Path) -> None:
    *_, checkpoints = prepared(tmp_path)
    for step in (1, 2, 3):
        checkpoints.save(position(step))
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == ["00000002", "00000003"]


@pytest.mark.parametrize("victim", ["model.safetensors", "optimizer.bin", "random_states_0.pkl", POSITION])
def test_damage_falls_back_to_the_one_before_and_says_so(tmp_path: Path, victim: str) -> None:
    *_, checkpoints = prepared(tmp_path)
    checkpoints.save(position(1))
    newest = checkpoints.save(position(2)) / victim
    newest.write_bytes(newest.read_bytes()[:-7])
    _, _, heard, checkpoints = prepared(tmp_path)
    restored = checkpoints.restore()
    assert restored is not None
    assert restored.step == 1
    assert any("00000002" in message for message in heard.messages)


def test_a_missing_file_counts_as_damage(tmp_path: Path) -> None:
    _, _, heard, checkpoints = prepared(tmp_path)
    (checkpoints.save(position(1)) / "optimizer.bin").unlink()
    assert checkpoints.restore() is None
    assert "damaged" in heard.messages[0]


def test_checkpoints_of_a_changed_stage_or_other_processes_are_not_used(tmp_path: Path) -> None:
    _, _, heard, checkpoints = prepared(tmp_path)
    checkpoints.save(position(1, stage_hash="old"))
    checkpoints.save(position(2, world=4))
    assert checkpoints.restore() is None
    assert "4 processes" in heard.messages[0]


def test_a_checkpoint_that_does_not_fit_the_model_is_an_error(tmp_path: Path) -> None:
    *_, checkpoints = prepared(tmp_path)
    checkpoints.save(position(1))
    accelerator = make_accelerator("fp32")
    other = nn.Linear(5, 5)
    accelerator.prepare(other, torch.optim.AdamW(other.parameters()))
    with pytest.raises(RunError, match="K816"):
        Checkpoints(checkpoints.directory, "h", accelerator, Heard()).restore()


def test_an_unwritable_place_is_a_plain_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where a directory should be")
    *_, checkpoints = prepared(tmp_path)
    with pytest.raises(RunError, match="K802"):
        checkpoints.save(position(1))
