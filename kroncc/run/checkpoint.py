"""Checkpoints of a training stage: weights, optimiser, random numbers, position; checked when read.

    checkpoints/STEP/00000200/  model.safetensors  optimizer.bin  random_states_0.pkl  position.json

A checkpoint appears by one rename. `position.json` holds a checksum of every other file.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kroncc.errors import RunError
from kroncc.run.files import TEMPORARY, replace_directory, write_text, writing
from kroncc.run.progress import Reporter

POSITION = "position.json"
KEPT = 2


class Position(BaseModel):
    """Where a checkpoint stands: optimiser steps done, seconds spent, the curve so far, the last losses."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hash: str
    step: int
    world: int
    seconds: float = 0.0
    curve: list[dict[str, Any]] = Field(default_factory=list)
    recent: list[float] = Field(default_factory=list)
    checksums: dict[str, str] = Field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one stage, told apart from those of a changed stage by its hash."""

    def __init__(
        self, directory: Path, stage_hash: str, accelerator: Accelerator, reporter: Reporter
    ) -> None:
        self.directory = directory
        self.hash = stage_hash
        self._accelerator = accelerator
        self._reporter = reporter

    def save(self, position: Position) -> Path:
        """Write a checkpoint, checksums and all, and drop all but the last two; all processes call this."""
        target = self.directory / f"{position.step:08d}"
        staged = self.directory / f"{TEMPORARY}{position.step:08d}"
        with writing(self.directory):
            staged.mkdir(parents=True, exist_ok=True)
            self._accelerator.save_state(str(staged))
        self._accelerator.wait_for_everyone()
        if self._accelerator.is_main_process:
            self._commit(staged, target, position)
        self._accelerator.wait_for_everyone()
        return target

    def restore(self) -> Position | None:
        """Load the newest good checkpoint into the prepared model and optimiser; None where there is none.

        One that is damaged, or was made by another number of processes, is passed over with a message.
        """
        for path in self._newest_first():
            position = self._read(path)
            if position is not None:
                self._load(path)
                return position
        return None

    def latest(self) -> Path | None:
        """Return the newest checkpoint that is there, good or not."""
        return next(iter(self._newest_first()), None)

    def _newest_first(self) -> list[Path]:
        return sorted(self.directory.glob("[0-9]*"), reverse=True)

    def _commit(self, staged: Path, target: Path, position: Position) -> None:
        with writing(self.directory):
            whole = position.model_copy(update={"checksums": checksums(staged)})
            write_text(staged / POSITION, whole.model_dump_json())
            replace_directory(staged, target)
            for old in self._newest_first()[KEPT:]:
                shutil.rmtree(old, ignore_errors=True)

    def _read(self, path: Path) -> Position | None:
        try:
            position = Position.model_validate_json((path / POSITION).read_bytes())
        except (OSError, ValidationError):
            self._reporter.message(
                f"checkpoint {path} has no readable {POSITION}; going back to the one before"
            )
            return None
        if position.hash != self.hash:
            return None  # of an earlier recipe
        if position.world != self._accelerator.num_processes:
            self._reporter.message(
                f"checkpoint {path} was made by {position.world} processes, now there are "
                f"{self._accelerator.num_processes}; it is not used"
            )
            return None
        if checksums(path) != position.checksums:
            self._reporter.message(f"checkpoint {path} is damaged; going back to the one before")
            return None
        return position

    def _load(self, path: Path) -> None:
        try:
            self._accelerator.load_state(str(path))
        except Exception as error:  # whatever it is, the model now holds half of a checkpoint
            raise RunError(
                f"checkpoint {path} cannot be loaded: {error}",
                code="K816",
                remedy=f"remove {self.directory} to start this step again",
            ) from error


def checksums(directory: Path) -> dict[str, str]:
    """Return the BLAKE2b digest of every file below `directory` but `position.json`."""
    digests = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.name != POSITION:
            with path.open("rb") as file:
                digests[path.relative_to(directory).as_posix()] = hashlib.file_digest(
                    file, "blake2b"
                ).hexdigest()[:32]
    return digests
