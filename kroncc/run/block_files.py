"""The finished blocks of a `reconstruct` step on disk: their weights and what fitting them gave.

    checkpoints/STEP/0003/  block.safetensors  position.json

A block appears by one rename. `position.json` holds a checksum of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import load_file, save_file

from kroncc.run.checkpoint import POSITION, checksums
from kroncc.run.files import TEMPORARY, replace_directory, write_text, writing

WEIGHTS = "block.safetensors"


class Fitted(BaseModel):
    """What fitting a block gave.

    `before` and `after` are squared errors, relative to the squared size of the teacher's values; None where
    they were not measured. `idle` says why a block was left as it was.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    before: float | None = None
    after: float | None = None
    steps: int = 0
    seconds: float = 0.0
    idle: str = ""
    curve: list[dict[str, Any]] = Field(default_factory=list)


class _Position(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    hash: str
    fitted: Fitted
    checksums: dict[str, str]


class BlockFiles:
    """The finished blocks of one stage, told apart from those of a changed stage by its hash."""

    def __init__(self, directory: Path, stage_hash: str) -> None:
        self.directory = directory
        self.hash = stage_hash

    def save(self, number: int, fitted: Fitted, weights: Mapping[str, torch.Tensor]) -> None:
        """Keep block `number` with its weights by name. Raises `RunError` where the disk refuses."""
        staged = self.directory / f"{TEMPORARY}{number:04d}"
        with writing(self.directory):
            staged.mkdir(parents=True, exist_ok=True)
            save_file({name: one.detach().contiguous() for name, one in weights.items()}, staged / WEIGHTS)
            position = _Position(hash=self.hash, fitted=fitted, checksums=checksums(staged))
            write_text(staged / POSITION, position.model_dump_json())
            replace_directory(staged, self.directory / f"{number:04d}")

    @torch.no_grad()
    def restore(self, number: int, weights: Mapping[str, torch.Tensor]) -> Fitted | None:
        """Fill `weights` from block `number`, say what fitting it gave; None where it is not there whole."""
        path = self.directory / f"{number:04d}"
        try:
            position = _Position.model_validate_json((path / POSITION).read_bytes())
        except (OSError, ValidationError):
            return None
        if position.hash != self.hash or checksums(path) != position.checksums:
            return None
        stored = load_file(path / WEIGHTS)
        if {name: one.shape for name, one in stored.items()} != {n: w.shape for n, w in weights.items()}:
            return None
        for name, one in stored.items():
            weights[name].copy_(one)
        return position.fitted
