"""What a frozen teacher says of every row, kept on disk, so that later epochs need no teacher.

One flat file a tap and layer, read through a memory map: a vector a row for `logits` and `sentence`, a vector
a token for `embeddings`, `hidden`, `ffn.output` and the like, without padding (rows meet other rows in every
epoch). Values of another form (attention scores) are not cached, and neither is more than `LIMIT` bytes: then
the teacher runs in every step, as without a cache. The whole cache is made before the first step.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from kroncc.run.files import TEMPORARY, replace_directory, writing
from kroncc.run.steps import Batch, BatchSource

LIMIT = 8 * 2**30
META = "cache.json"
Ints = np.ndarray[Any, np.dtype[np.int64]]


class Taught(Protocol):
    """What a teacher gives: named outputs, and for each tap one tensor a layer."""

    @property
    def outputs(self) -> Mapping[str, Tensor]: ...

    @property
    def taps(self) -> Mapping[str, Sequence[Tensor]]: ...


@dataclass(frozen=True)
class Recalled:
    """Teacher values that come from a cache."""

    taps: dict[str, list[Tensor]]
    outputs: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """One file of the cache: a tap and its layer, whether it has a vector a token or a row, width, dtype."""

    tap: str
    layer: int
    tokens: bool
    width: int
    dtype: str

    @property
    def file(self) -> str:
        """Name of the file."""
        return f"{self.tap}-{self.layer}.bin".replace("/", "_")


class TeacherCache:
    """A finished cache in `directory`; `recall` gives rows of it."""

    def __init__(self, directory: Path, entries: Sequence[Entry], lengths: Sequence[int]) -> None:
        self._entries = entries
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._lengths)])
        self._files = {entry: _open(directory, entry, self._lengths, "r") for entry in entries}

    def recall(self, rows: Sequence[int], width: int, device: torch.device) -> Recalled:
        """Return the teacher's values for these rows, token values padded with zeros to `width` tokens."""
        taps: dict[str, list[Tensor]] = {}
        for entry in self._entries:
            values = self._gather(entry, rows, width)
            taps.setdefault(entry.tap, []).append(torch.from_numpy(values).to(device))
        return Recalled(taps)

    def _gather(self, entry: Entry, rows: Sequence[int], width: int) -> np.ndarray[Any, Any]:
        stored = self._files[entry]
        if not entry.tokens:
            return np.asarray(stored[list(rows)])
        padded = np.zeros((len(rows), width, entry.width), dtype=entry.dtype)
        for at, row in enumerate(rows):
            count = int(self._lengths[row])
            padded[at, :count] = stored[self._starts[row] : self._starts[row] + count]
        return padded


def open_cache(directory: Path, key: str, lengths: Sequence[int]) -> TeacherCache | None:
    """Return the cache in `directory` if it was finished for `key`, else None."""
    try:
        meta = json.loads((directory / META).read_text())
        if meta["key"] != key:
            return None
        return TeacherCache(directory, [Entry(**entry) for entry in meta["entries"]], lengths)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def build_cache(
    directory: Path,
    key: str,
    teacher: Callable[[Batch], Taught],
    source: BatchSource,
    taps: Sequence[str],
    lengths: Sequence[int],
    limit: int = LIMIT,
) -> str | None:
    """Ask `teacher` once for every row of `source` and store what it says of `taps`.

    `lengths` counts the tokens of every row. Returns None, or why nothing was stored. Raises `RunError` where
    the disk refuses.
    """
    batches = source.epoch(0)
    counts = np.asarray(lengths, dtype=np.int64)
    with writing(directory.parent), torch.no_grad():
        entries = _layout(_values(teacher(source.collate(batches[0])), taps), source.collate(batches[0]))
        if isinstance(entries, str):
            return entries
        size = sum(prod(_shape(entry, counts)) * np.dtype(entry.dtype).itemsize for entry in entries)
        directory.parent.mkdir(parents=True, exist_ok=True)
        room = min(limit, shutil.disk_usage(directory.parent).free)
        if size > room:
            return f"it would take {size / 2**30:.1f} GiB, and there is room for {room / 2**30:.1f} GiB"
        staged = directory.with_name(TEMPORARY + directory.name)
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        why = _fill(staged, entries, teacher, source, batches, taps, counts)
        if why is not None:
            shutil.rmtree(staged, ignore_errors=True)
            return why
        meta = {"key": key, "entries": [vars(entry) for entry in entries]}
        (staged / META).write_text(json.dumps(meta))
        replace_directory(staged, directory)
    return None


def _values(taught: Taught, taps: Sequence[str]) -> dict[str, Sequence[Tensor]]:
    return {tap: taught.taps[tap] if tap in taught.taps else [taught.outputs[tap]] for tap in taps}


def _layout(values: Mapping[str, Sequence[Tensor]], batch: Batch) -> list[Entry] | str:
    """Return the files that the values of one batch need, or why they cannot be stored."""
    rows, width = batch["input_ids"].shape
    entries = []
    for tap, layers in values.items():
        for layer, value in enumerate(layers):
            tokens = value.dim() == 3 and tuple(value.shape[:2]) == (rows, width)
            if not tokens and not (value.dim() == 2 and value.shape[0] == rows):
                return f"{tap} has the shape {list(value.shape)}, neither a vector a row nor a vector a token"
            entries.append(Entry(tap, layer, tokens, value.shape[-1], _dtype(value)))
    return entries


def _fill(
    directory: Path,
    entries: Sequence[Entry],
    teacher: Callable[[Batch], Taught],
    source: BatchSource,
    batches: Sequence[Sequence[int]],
    taps: Sequence[str],
    lengths: Ints,
) -> str | None:
    """Store every row; return why that cannot be done, if so."""
    starts = np.concatenate([[0], np.cumsum(lengths)])
    files = {entry: _open(directory, entry, lengths, "w+") for entry in entries}
    for rows in batches:
        values = _values(teacher(source.collate(rows)), taps)
        for entry, stored in files.items():
            value = _array(values[entry.tap][entry.layer])
            if value.shape[-1] != entry.width:
                return f"the width of {entry.tap} depends on the length"
            if not entry.tokens:
                stored[list(rows)] = value
                continue
            for at, row in enumerate(rows):
                stored[starts[row] : starts[row + 1]] = value[at, : lengths[row]]
    for stored in files.values():
        stored.flush()
    return None


def _open(directory: Path, entry: Entry, lengths: Ints, mode: Any) -> np.memmap[Any, Any]:
    return np.memmap(directory / entry.file, dtype=entry.dtype, mode=mode, shape=_shape(entry, lengths))


def _shape(entry: Entry, lengths: Ints) -> tuple[int, int]:
    return (int(lengths.sum()) if entry.tokens else len(lengths), entry.width)


def _array(value: Tensor) -> np.ndarray[Any, Any]:
    value = value.detach().cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()


def _dtype(value: Tensor) -> str:
    return "float16" if value.dtype == torch.float16 else "float32"
