"""The files of a model directory: which hold the weights, whether they are whole, and their fingerprint."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from kroncc.errors import ModelError
from kroncc.rewrite import schema_cache

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth", "model.pkl")


def weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files that hold a model's weights, in order.

    `ModelError` K507 for a pickle checkpoint, K509 for a bad index or a missing shard, K510 for no weights.
    """
    single, index = directory / SINGLE, directory / INDEX
    if single.is_file():
        return [single]
    if index.is_file():
        return _shards(index)
    if pickle := next((name for name in PICKLES if (directory / name).is_file()), None):
        raise ModelError(
            f"{directory / pickle} is a pickle checkpoint, which can run code when it is read: refused",
            code="K507",
            expected=f"{SINGLE} or {INDEX}",
            remedy="convert it where you trust it: load it and call save_pretrained",
        )
    raise ModelError(f"no weights in {directory}", code="K510", expected=f"{SINGLE} or {INDEX}")


def check_weights(directory: Path) -> None:
    """Read the headers of all weight files; `ModelError` K508 names a truncated or corrupt one."""
    for path in weight_files(directory):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{path} is truncated or corrupt: {error}",
                code="K508",
                remedy="copy or download the file again",
            ) from error


def fingerprint(directory: Path) -> str:
    """Return the SHA-256 (32 hex digits) of config and weight files; unchanged files are not read again."""
    total = hashlib.sha256()
    for path in [directory / "config.json", *weight_files(directory)]:
        total.update(f"{path.name}:{_file_hash(path)}\n".encode())
    return total.hexdigest()[:32]


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError, OSError) as error:
        raise ModelError(f"{index} is not an index of shards: {error}", code="K509") from error
    for name in names:
        if Path(name).name != name:
            raise ModelError(f"{index} names a shard outside its directory: {name}", code="K509")
        if not (index.parent / name).is_file():
            raise ModelError(
                f"the shard {index.parent / name} is missing", code="K509", remedy="copy it again"
            )
    return [index.parent / name for name in names]


def _file_hash(path: Path) -> str:
    """Return the hex SHA-256 of a file, remembered by path, size and time of change."""
    stat = path.stat()
    known = schema_cache.directory() / "hashes.json"
    key = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
    hashes = _read_cache(known)
    if key in hashes:
        return str(hashes[key])
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    _write_cache(known, {**_read_cache(known), key: digest})
    return digest


def _read_cache(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        data = json.loads(path.read_text(encoding="utf-8"))
        return data if isinstance(data, dict) else {}
    return {}


def _write_cache(path: Path, hashes: dict[str, Any]) -> None:
    """Replace the cache in one step; a cache that cannot be written is no error."""
    recent = dict(list(hashes.items())[-500:])
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(recent, file)
        Path(name).replace(path)
