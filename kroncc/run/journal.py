"""The journal of a run: one JSON object a line, appended and flushed, readable after a crash."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any


class Journal:
    """Append events to `path`; a line is `{"time": seconds since 1970, "event": ..., "stage": ..., ...}`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        _end_torn_line(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, event: str, stage: str = "", **fields: Any) -> None:
        """Append one event and hand it to the operating system, so that SIGKILL cannot lose it."""
        line = json.dumps(
            {"time": round(time.time(), 3), "event": event, "stage": stage, **fields}, default=str
        )
        self._file.write(line + "\n")
        self._file.flush()

    def close(self) -> None:
        """Flush to disk and close; writing afterwards is an error."""
        if self._file.closed:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Return the events of a journal in order; lines that a crash tore are left out."""
    if not path.is_file():
        return []
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        event = _parse(line)
        if event is not None:
            events.append(event)
    return events


def _parse(line: str) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except json.JSONDecodeError:
        return None
    return event if isinstance(event, dict) else None


def _end_torn_line(path: Path) -> None:
    """Close a line that a crash left open, so that the next event starts on its own line."""
    if not path.is_file() or path.stat().st_size == 0:
        return
    with path.open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
