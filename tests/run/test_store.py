import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kroncc.errors import RunError
from kroncc.plan.stages import Stage
from kroncc.run.files import replace_directory, write_text, writing
from kroncc.run.store import RECORD, RunStore, StageRecord


def stage(name: str = "s", stage_hash: str = "h1") -> Stage:
    return Stage(name=name, kind="rewrite", needs=(), options={}, hash=stage_hash)


def finish(store: RunStore, text: str = "weights", stage_hash: str = "h1") -> None:
    with store.staging("s") as path:
        (path / "model.bin").write_text(text)
        store.commit(path, StageRecord(name="s", kind="rewrite", hash=stage_hash, values={"s.x": 1.5}))


def children(path: Path) -> list[str]:
    return sorted(child.name for child in path.iterdir())


def test_a_committed_stage_is_finished_and_keeps_its_numbers(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "run")
    with store.locked():
        assert not store.is_finished(stage())
        finish(store)
    record = store.record(stage())
    assert record is not None
    assert record.values == {"s.x": 1.5}
    assert record.files == {"model.bin": 7}
    assert children(store.step("s")) == ["model.bin", RECORD]
    assert children(store.steps) == ["s"]


def test_another_hash_is_not_finished_and_is_replaced_whole(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    with store.locked():
        finish(store)
        (store.step("s") / "old-only").write_text("x")
        assert not store.is_finished(stage(stage_hash="h2"))
        finish(store, "new", "h2")
    assert store.is_finished(stage(stage_hash="h2"))
    assert children(store.step("s")) == ["model.bin", RECORD]
    assert children(store.steps) == ["s"]


@pytest.mark.parametrize("damage", ["truncate", "remove", "record"])
def test_a_damaged_step_is_not_finished(tmp_path: Path, damage: str) -> None:
    store = RunStore(tmp_path)
    with store.locked():
        finish(store)
    match damage:
        case "truncate":
            (store.step("s") / "model.bin").write_text("we")
        case "remove":
            (store.step("s") / "model.bin").unlink()
        case "record":
            (store.step("s") / RECORD).write_text("{")
    assert not store.is_finished(stage())


def test_a_failing_stage_leaves_nothing(tmp_path: Path) -> None:
    store = RunStore(tmp_path)

    def fail() -> None:
        with store.staging("s") as path:
            (path / "model.bin").write_text("half")
            raise ZeroDivisionError

    with store.locked(), pytest.raises(ZeroDivisionError):
        fail()
    assert children(store.steps) == []


def test_commit_removes_checkpoints_and_caches(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    with store.locked():
        for leftover in (store.checkpoints("s"), store.cache("s")):
            (leftover / "x").mkdir(parents=True)
        finish(store)
    assert not store.checkpoints("s").exists()
    assert children(tmp_path) == [".lock", "steps"]


HOLD = """
import pathlib, sys, time
from kroncc.run.store import RunStore
store = RunStore(pathlib.Path(sys.argv[1]))
with store.locked(), store.staging("s") as path:
    (path / "half").write_text("half")
    print("held", flush=True)
    time.sleep(60)
"""


def hold(directory: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    other = hold(tmp_path)
    try:
        with pytest.raises(RunError) as caught, RunStore(tmp_path).locked():
            pass
        assert "K801" in str(caught.value)
        assert str(other.pid) in str(caught.value)
        assert children(tmp_path / "steps") != []  # the refused one touched nothing
    finally:
        other.kill()
        other.communicate()
    with RunStore(tmp_path).locked():
        assert children(tmp_path / "steps") == []  # half-written files of the killed one are gone


def test_the_same_process_cannot_hold_it_twice(tmp_path: Path) -> None:
    with (
        RunStore(tmp_path).locked(),
        pytest.raises(RunError, match=f"process {os.getpid()}"),
        RunStore(tmp_path).locked(),
    ):
        pass


def test_a_file_in_the_way_is_a_plain_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="K802"), RunStore(tmp_path / "file").locked():
        pass
    with pytest.raises(RunError, match="K802"), RunStore(tmp_path / "file" / "run").locked():
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission_is_a_plain_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(RunError, match="K802"), RunStore(tmp_path / "run").locked():
        pass


def test_a_full_disk_is_a_plain_error() -> None:
    def fill() -> None:
        with writing(Path("/somewhere")):
            if Path("/dev/full").exists():
                Path("/dev/full").write_text("x")  # Linux: a real write that the kernel refuses with ENOSPC
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RunError) as caught:
        fill()
    assert "K803" in str(caught.value)
    assert "/somewhere" in str(caught.value)


def test_a_file_that_cannot_be_written_whole_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_text(path, "old")
    code = (
        "import pathlib, resource, signal, sys\n"
        "from kroncc.run.files import write_text\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "write_text(pathlib.Path(sys.argv[1]), 'new' * 100_000)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False
    )
    assert "File too large" in done.stderr
    assert path.read_text() == "old"
    assert children(tmp_path) == ["plan.json"]


def test_replace_directory_survives_an_old_one(tmp_path: Path) -> None:
    for text in ("one", "two"):
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "f").write_text(text)
        replace_directory(tmp_path / "new", tmp_path / "target")
    assert (tmp_path / "target" / "f").read_text() == "two"
    assert children(tmp_path) == ["target"]


def test_files_follow_the_umask(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    with store.locked():
        finish(store)
    mask = os.umask(0)
    os.umask(mask)
    assert store.step("s").stat().st_mode & 0o777 == 0o777 & ~mask


def test_the_record_is_readable_json(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    with store.locked():
        finish(store)
    assert json.loads((store.step("s") / RECORD).read_text())["hash"] == "h1"


def test_a_file_of_the_same_size_with_other_content_is_noticed(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    elsewhere = tmp_path / "given"
    elsewhere.mkdir()
    (elsewhere / "model.bin").write_text("weights")
    with store.locked(), store.staging("s") as path:
        (path / "report.json").write_text("{}")
        made = {"model": str(elsewhere), "model_files": {"model.bin": 7}}
        store.commit(path, StageRecord(name="s", kind="export", hash="h1", **made))
    record = store.record(stage())
    assert record is not None
    assert store.changed(record) is None
    assert record.checksums["report.json"] == hashlib.sha256(b"{}").hexdigest()
    for file in (elsewhere / "model.bin", store.step("s") / "report.json"):
        kept = file.read_bytes()
        file.write_bytes(kept[:-1] + b"?")
        assert store.record(stage()) is not None  # by size all is well
        assert store.changed(record) == file
        file.write_bytes(kept)
