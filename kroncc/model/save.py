"""Write a model directory that plain transformers loads: safetensors, config with structure, tokenizer."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from kroncc.errors import RunError
from kroncc.model.quantizer import attach
from kroncc.model.ties import declare_ties
from kroncc.quiet import quiet_transformers
from kroncc.rewrite.structure import Structure
from kroncc.rewrite.treat import make_contiguous

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COMPANIONS = (
    "tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "spiece.model",
    "sentencepiece*.model", "preprocessor_config.json", "processor_config.json", "chat_template*",
)  # fmt: skip

MODEL_FILES = (  # what a model's directory may hold; anything else is somebody's own
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "*tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*processor_config.json",
    "*.jinja",
    "*.model",
    "recipe.yaml",
    "report.json",
    "stage.json",
)


def save_model(
    model: PreTrainedModel,
    directory: str | Path,
    structure: Structure,
    tokenizer: Any = None,
    dtype: torch.dtype | str | None = None,
    extra_files: Mapping[str, str] | None = None,
) -> None:
    """Write `model` to `directory`, whole or not at all; a model that is there is replaced.

    `tokenizer` is a tokenizer or processor, or the directory to copy its files from. `dtype` (torch type, or
    fp32, bf16, fp16) is the type on disk; the model itself is not changed. `extra_files` maps names to text,
    e.g. recipe.yaml. Raises `RunError`: K802 not writable, K803 disk full, K804 other, K805 `directory` holds
    other things than a model.
    """
    target = Path(directory).absolute()
    _require_replaceable(target)
    with _writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent))
        try:
            write_model(model, staged, structure, tokenizer, dtype, extra_files)
            staged.chmod(0o777 & ~_umask())
            _put_in_place(staged, target)
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def write_model(
    model: PreTrainedModel,
    directory: Path,
    structure: Structure,
    tokenizer: Any = None,
    dtype: torch.dtype | str | None = None,
    extra_files: Mapping[str, str] | None = None,
) -> None:
    """Write the same files straight into an existing directory, for callers that rename it themselves."""
    attach(model, structure)
    declare_ties(model)
    make_contiguous(model)
    kind = DTYPES[dtype] if isinstance(dtype, str) else dtype
    with quiet_transformers(), _writing(directory):
        model.save_pretrained(directory, state_dict=_cast(model.state_dict(), kind))
        if kind is not None:
            _set_dtype(directory / "config.json", kind)
        if isinstance(tokenizer, str | Path):
            _copy_companions(Path(tokenizer), directory)
        elif tokenizer is not None:
            tokenizer.save_pretrained(directory)
        for name, text in (extra_files or {}).items():
            (directory / name).write_text(text, encoding="utf-8")


def _cast(state: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Return the floating tensors of `state` as `dtype`; names that share a tensor go on sharing one."""
    if dtype is None:
        return dict(state)
    cast: dict[tuple[Any, ...], torch.Tensor] = {}
    result: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if key not in cast:
            cast[key] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        result[name] = cast[key]
    return result


def _set_dtype(path: Path, dtype: torch.dtype) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copy_companions(source: Path, directory: Path) -> None:
    for pattern in COMPANIONS:
        for file in sorted(source.glob(pattern)):
            shutil.copyfile(file, directory / file.name)


def _require_replaceable(target: Path) -> None:
    """Refuse to replace anything but a directory with a model's files and no others."""
    with suppress(OSError):
        if not target.exists() or (target.is_dir() and not any(target.iterdir())):
            return
        inside = list(target.iterdir()) if target.is_dir() else []
        foreign = [path.name for path in inside if path.is_dir() or not any(map(path.match, MODEL_FILES))]
        if foreign or not (target / "config.json").is_file():
            what = f"holds {foreign[0]!r}" if foreign else "holds no model"
            raise RunError(
                f"{target} is there and {what}; it is not replaced",
                code="K805",
                expected="a new directory, an empty one, or one with a model's files alone",
                remedy="give another directory",
            )


def _put_in_place(staged: Path, target: Path) -> None:
    """Rename `staged` to `target`; an old directory is moved aside first, and back if that fails."""
    if not target.exists():
        staged.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
    target.rename(old)
    try:
        staged.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    """Turn what the operating system says about writing into a `RunError`."""
    try:
        yield
    except SafetensorError as error:
        raise write_error(directory, str(error), _errno_in(str(error))) from error
    except OSError as error:
        raise write_error(directory, error.strerror or str(error), error.errno) from error


def _errno_in(text: str) -> int | None:
    """Return the system's error number that safetensors puts at the end of its message."""
    number = text.rpartition("os error ")[2].partition(")")[0]
    return int(number) if number.isdigit() else None


def write_error(directory: Path, reason: str, number: int | None) -> RunError:
    """Return the error for what the system said (`reason`, errno `number`) about writing a model."""
    remedy = "free space, or give another directory; what was there before is kept"
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return RunError(f"no room to write the model to {directory}: {reason}", code="K803", remedy=remedy)
    if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return RunError(
            f"cannot write the model to {directory}: {reason}",
            code="K802",
            expected="a directory that this user may write to",
            remedy="give another directory",
        )
    return RunError(f"cannot write the model to {directory}: {reason}", code="K804", remedy=remedy)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
