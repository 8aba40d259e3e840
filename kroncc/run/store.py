"""The run directory: what is finished, what is locked, and how files get there without halves.

    runs/NAME/  plan.json  journal.jsonl  steps/STEP/{stage.json, ...}  checkpoints/STEP/  cache/STEP/

A stage is finished when `steps/STEP/stage.json` holds its hash and all files that it lists are there in their
full size; before a stage is skipped, their checksums are compared too. The directory of a step appears by one
rename, with `stage.json` already in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kroncc.errors import RunError
from kroncc.plan.stages import Plan, Stage
from kroncc.run.files import TEMPORARY, files_in, replace_directory, umask, write_text, writing

RECORD = "stage.json"


class StageRecord(BaseModel):
    """What a finished stage left: its hash, its numbers, and its files with sizes in bytes and checksums."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    kind: str
    hash: str
    seconds: float = 0.0
    values: dict[str, float] = Field(default_factory=dict)  # `MODEL.metric` -> number
    details: dict[str, Any] = Field(default_factory=dict)
    files: dict[str, int] = Field(default_factory=dict)
    model: str | None = None  # directory of the model, where it is not the step's own
    model_files: dict[str, int] = Field(default_factory=dict)
    checksums: dict[str, str] = Field(default_factory=dict)  # SHA-256 of `files`
    model_checksums: dict[str, str] = Field(default_factory=dict)  # and of `model_files`


class RunStore:
    """Files of one run. Make it, then do everything under `with store.locked():`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()
        self.steps = self.directory / "steps"

    @property
    def journal(self) -> Path:
        """The journal's file."""
        return self.directory / "journal.jsonl"

    def step(self, name: str) -> Path:
        """The directory of a step."""
        return self.steps / name

    def checkpoints(self, name: str) -> Path:
        """The directory of a step's checkpoints while it trains."""
        return self.directory / "checkpoints" / name

    def cache(self, name: str) -> Path:
        """The directory of what a step caches while it trains."""
        return self.directory / "cache" / name

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run directory for this process alone; `RunError` K801 when another process holds it.

        The lock belongs to the process (flock), so a killed process leaves none behind.
        """
        with writing(self.directory):
            self.steps.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.directory / ".lock", timeout=0)
            self._acquire(lock)
        try:
            with writing(self.directory):
                self._holder.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
                self._sweep()
            yield
        finally:
            with suppress(OSError):
                self._holder.unlink(missing_ok=True)
            lock.release()

    def write_plan(self, plan: Plan) -> None:
        """Write `plan.json`, beside and renamed."""
        with writing(self.directory):
            write_text(self.directory / "plan.json", plan.to_json())

    def record(self, stage: Stage) -> StageRecord | None:
        """Return what the stage left if it is finished: same hash, all files there; else None."""
        directory = self.step(stage.name)
        try:
            record = StageRecord.model_validate_json((directory / RECORD).read_bytes())
        except (OSError, ValidationError):
            return None
        if record.hash != stage.hash:
            return None
        whole = _whole(directory, record.files) and _whole(Path(record.model or ""), record.model_files)
        return record if whole else None

    def is_finished(self, stage: Stage) -> bool:
        """Say whether the stage need not run again."""
        return self.record(stage) is not None

    def changed(self, record: StageRecord) -> Path | None:
        """Return a file of a finished stage that is not what the stage wrote; None where all are."""
        own = {self.step(record.name) / name: digest for name, digest in record.checksums.items()}
        elsewhere = {
            Path(record.model or "") / name: digest for name, digest in record.model_checksums.items()
        }
        return next((path for path, digest in (own | elsewhere).items() if _digest(path) != digest), None)

    @contextmanager
    def staging(self, name: str) -> Iterator[Path]:
        """Yield an empty directory beside `steps/NAME`; it is removed again unless `commit` took it."""
        with writing(self.directory):
            path = Path(tempfile.mkdtemp(prefix=f"{TEMPORARY}{name}-", dir=self.steps))
            path.chmod(0o777 & ~umask())
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def commit(self, staged: Path, record: StageRecord) -> StageRecord:
        """Finish a stage: list its files, write `stage.json`, flush to disk, rename into place."""
        with writing(self.directory):
            files = files_in(staged)
            sums = {
                "checksums": {name: _digest(staged / name) for name in files},
                "model_checksums": {
                    name: _digest(Path(record.model or "") / name) for name in record.model_files
                },
            }
            record = record.model_copy(update={"files": files, **sums})
            (staged / RECORD).write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
            replace_directory(staged, self.step(record.name))
            for leftover in (self.checkpoints(record.name), self.cache(record.name)):
                shutil.rmtree(leftover, ignore_errors=True)
                with suppress(OSError):
                    leftover.parent.rmdir()  # unless another step's are there
        return record

    @property
    def _holder(self) -> Path:
        return self.directory / ".lock.holder"

    def _acquire(self, lock: FileLock) -> None:
        try:
            lock.acquire()
        except Timeout as error:
            raise RunError(
                f"another apply is running in {self.directory} ({self._held_by()})",
                code="K801",
                expected="one apply at a time in a run directory",
                remedy="wait for it to end, or give another directory with -o",
            ) from error

    def _held_by(self) -> str:
        try:
            holder = json.loads(self._holder.read_text())
            return f"process {holder['pid']} on {holder['host']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "process unknown"

    def _sweep(self) -> None:
        """Remove what killed processes left half-written; only called under the lock."""
        for parent in (self.steps, *(self.directory / "checkpoints").glob("*")):
            for leftover in parent.glob(f"{TEMPORARY}*"):
                shutil.rmtree(leftover, ignore_errors=True)


def _whole(directory: Path, files: dict[str, int]) -> bool:
    return all(_size(directory / name) == size for name, size in files.items())


def _digest(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
