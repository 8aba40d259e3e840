"""Tensors that lie in memory-mapped files instead of in memory, with the very same strides and aliases."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Container, Iterable
from contextlib import suppress
from pathlib import Path

import torch


def storage_of(tensor: torch.Tensor) -> int:
    """Return what tells storages apart while they are alive; views share one."""
    return int(tensor.untyped_storage()._cdata)


def is_spilled(tensor: torch.Tensor) -> bool:
    """Say whether a tensor lies in a mapped file."""
    return tensor.device.type == "cpu" and tensor.untyped_storage().filename is not None


def held_bytes(tensors: Iterable[torch.Tensor], foreign: Container[int]) -> int:
    """Return the bytes of memory behind `tensors`, views once, less mapped files and `foreign` storages."""
    sizes = {
        storage_of(tensor): tensor.untyped_storage().nbytes()
        for tensor in tensors
        if not is_spilled(tensor) and storage_of(tensor) not in foreign
    }
    return sum(sizes.values())


class Spill:
    """Writes tensors into files of `directory` (the system's temporary one by default).

    A file loses its name as soon as it is mapped, so its room is free again when the last tensor on it goes,
    and also when the process is killed. Raises OSError where the disk is full.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory
        self._made: dict[int, torch.UntypedStorage] = {}

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor in a mapped file: same shape, strides and bits, on the CPU.

        Views of one storage, spilled by one `Spill`, share a file, so spill all of them before letting go.
        """
        if is_spilled(tensor):
            return tensor
        place = storage_of(tensor)
        if place not in self._made:
            self._made[place] = _mapped(tensor.untyped_storage(), self.directory)
        with torch.no_grad():
            lying = torch.empty(0, dtype=tensor.dtype)
            return lying.set_(self._made[place], tensor.storage_offset(), tensor.size(), tensor.stride())


def _mapped(storage: torch.UntypedStorage, directory: Path | None) -> torch.UntypedStorage:
    size = storage.nbytes()
    if not size:
        return torch.empty(0).untyped_storage()  # an empty file cannot be mapped
    handle, name = tempfile.mkstemp(prefix=".tmp-spill-", dir=directory)
    try:
        with os.fdopen(handle, "wb") as file:
            _reserve(file.fileno(), size)
        mapped: torch.UntypedStorage = torch.UntypedStorage.from_file(name, True, size)  # type: ignore[assignment]
        mapped.copy_(storage)
    finally:
        with suppress(OSError):  # where a mapped file cannot be removed, it goes with its directory
            Path(name).unlink()
    return mapped


def _reserve(handle: int, size: int) -> None:
    """Take the room on disk now: a full disk is an error here, and would be a crash through a mapping."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
