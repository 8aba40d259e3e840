"""Writing without halves: beside, flushed, renamed; what the system says against it, in plain words."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kroncc.errors import RunError

TEMPORARY = ".tmp-"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
ROOM = "free space or give another directory with -o; finished stages and checkpoints are kept"


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Turn what the operating system says about writing below `directory` into a `RunError`.

    K802 no permission or not a directory, K803 the disk is full, K804 anything else.
    """
    try:
        yield
    except OSError as error:
        raise write_error(error, directory) from error
    except Exception as error:
        known = disk_error(error, directory)
        if known is None:
            raise
        raise known from error


def disk_error(error: Exception, directory: Path) -> RunError | None:
    """Return the `RunError` of a full disk if that is what `error` tells; libraries wrap it in their own."""
    if isinstance(error, OSError):
        return write_error(error, directory) if error.errno in FULL else None
    said = str(error)
    if "os error 28)" in said or "No space left on device" in said:  # safetensors, pyarrow
        return write_error(OSError(errno.ENOSPC, said), directory)
    if "PytorchStreamWriter failed" in said or "unexpected pos" in said:  # torch.save gives no reason
        return RunError(f"cannot write to {directory}: {said.splitlines()[0]}", code="K804", remedy=ROOM)
    return None


def write_error(error: OSError, directory: Path) -> RunError:
    """Return the `RunError` for a failed write below `directory`."""
    if error.errno in FULL:
        return RunError(
            f"the disk is full: cannot write to {directory}",
            code="K803",
            remedy=ROOM,
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return RunError(
            f"cannot write to {error.filename or directory}: {error.strerror}",
            code="K802",
            expected="a directory that this user may write to",
            remedy="give another directory with -o",
        )
    return RunError(f"cannot write to {error.filename or directory}: {error.strerror or error}", code="K804")


def write_text(path: Path, text: str) -> None:
    """Write a text file beside and rename it, so that a reader sees the old file or the new one, whole."""
    handle, name = tempfile.mkstemp(prefix=TEMPORARY, dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o666 & ~umask())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def replace_directory(staged: Path, target: Path) -> None:
    """Flush `staged` to disk and rename it to `target`; what was there goes away afterwards."""
    flush_tree(staged)
    target.parent.mkdir(parents=True, exist_ok=True)
    old = None
    if target.exists():
        old = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=target.parent))
        target.rename(old / "old")
    staged.rename(target)
    _flush(target.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def flush_tree(directory: Path) -> None:
    """Force every file below `directory`, and the directories themselves, to disk."""
    for path in sorted(directory.rglob("*"), reverse=True):
        _flush(path)
    _flush(directory)


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # directories cannot be opened there
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def files_in(directory: Path) -> dict[str, int]:
    """Return every file below `directory` with its size in bytes."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.stat().st_size for path in paths}


def umask() -> int:
    """Return the file mode bits that this process withholds."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
