import subprocess
import sys
from pathlib import Path

import pytest

from kroncc.run.journal import Journal, read_journal
from kroncc.run.progress import JournalReporter, NullReporter, Step


def test_events_come_back_in_order(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.write("stage_started", "a", kind="train")
    journal.write("message", text="naïve\nline")
    journal.close()
    journal.close()
    events = read_journal(tmp_path / "journal.jsonl")
    assert [(event["event"], event["stage"]) for event in events] == [("stage_started", "a"), ("message", "")]
    assert events[0]["kind"] == "train"
    assert events[1]["text"] == "naïve\nline"
    assert events[0]["time"] <= events[1]["time"]


def test_a_later_run_appends(tmp_path: Path) -> None:
    for name in ("one", "two"):
        journal = Journal(tmp_path / "journal.jsonl")
        journal.write(name)
        journal.close()
    assert [event["event"] for event in read_journal(tmp_path / "journal.jsonl")] == ["one", "two"]


@pytest.mark.parametrize("torn", ['{"time": 1, "eve', "\xff\x00", "[1, 2]", "7"])
def test_a_torn_last_line_is_left_out_and_closed_by_the_next_run(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"event": "first"}\n' + torn.encode("latin-1"))
    assert [event["event"] for event in read_journal(path)] == ["first"]
    journal = Journal(path)
    journal.write("second")
    journal.close()
    assert [event["event"] for event in read_journal(path)] == ["first", "second"]


def test_a_killed_process_loses_no_event(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    code = (
        "import os, signal, pathlib\n"
        "from kroncc.run.journal import Journal\n"
        f"journal = Journal(pathlib.Path({str(path)!r}))\n"
        "for index in range(50): journal.write('event', index=index)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -9
    assert [event["index"] for event in read_journal(path)] == list(range(50))


def test_no_journal_reads_as_empty(tmp_path: Path) -> None:
    assert read_journal(tmp_path / "journal.jsonl") == []


def test_reporter_writes_events_and_thins_out_steps(tmp_path: Path) -> None:
    class Count(NullReporter):
        steps = 0

        def step(self, stage: str, step: Step) -> None:
            self.steps += 1

    inner = Count()
    journal = Journal(tmp_path / "journal.jsonl")
    reporter = JournalReporter(inner, journal)
    reporter.stage_started("a", "train", 100)
    for number in range(1, 101):
        reporter.step("a", Step(number, 100, 0.5, 1e-3, 10.0, 1.0, 1))
    reporter.stage_finished("a", {"a.loss": 0.5}, 1.0)
    reporter.stage_skipped("b", "finished")
    reporter.message("well")
    journal.close()
    events = read_journal(tmp_path / "journal.jsonl")
    assert inner.steps == 100
    assert [event["event"] for event in events] == [
        "stage_started",
        "step",
        "step",
        "stage_finished",
        "stage_skipped",
        "message",
    ]
    assert [event["step"] for event in events if event["event"] == "step"] == [1, 100]
