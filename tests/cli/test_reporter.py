import io

import pytest
from rich.console import Console

from kroncc.cli.reporter import ConsoleReporter, describe, duration
from kroncc.run.progress import Step


def step(number: int, total: int = 40) -> Step:
    return Step(number, total, 0.12345, 2e-4, 1234.5, 95.0, 300 * 2**20)


def play(reporter: ConsoleReporter) -> None:
    reporter.stage_skipped("first", "finished in an earlier run")
    reporter.stage_started("second", "train", 40)
    for number in range(1, 41):
        reporter.step("second", step(number))
    reporter.message("second: a [bracket] is text")
    reporter.stage_finished("second", {"second.disk": 12345.0, "second.accuracy": 0.91234}, 75.0)
    reporter.close()


def test_plain_lines_where_no_terminal_listens() -> None:
    out = io.StringIO()
    play(ConsoleReporter(Console(file=out, width=200)))
    assert out.getvalue().splitlines() == [
        "first: skipped, finished in an earlier run",
        "second: train, 40 steps",
        "second: step 1/40  " + describe(step(1)),
        "second: step 40/40  " + describe(step(40)),
        "second: a [bracket] is text",
        "second: done in 1:15 min",
        "  second.disk = 12,345",
        "  second.accuracy = 0.9123",
    ]


def test_a_line_every_so_often() -> None:
    out = io.StringIO()
    play(ConsoleReporter(Console(file=out, width=200), line_seconds=0.0))
    assert out.getvalue().count("second: step ") == 40


def test_a_bar_on_a_terminal_that_goes_away() -> None:
    out = io.StringIO()
    console = Console(file=out, width=200, force_terminal=True)
    reporter = ConsoleReporter(console)
    play(reporter)
    assert "40/40" in out.getvalue()
    assert "second: step" not in out.getvalue()
    assert out.getvalue().endswith("second.accuracy = 0.9123\n")
    reporter.stage_started("third", "rewrite", None)
    reporter.close()
    reporter.close()
    assert "\x1b[?25h" in out.getvalue()  # the cursor is back


def test_figures_of_a_step() -> None:
    expected = "loss 0.1235  lr 2.00e-04  1,234.5 rows/s  1:35 min left  peak 300 MiB"
    assert describe(step(1)) == expected.replace("0.1235", f"{0.12345:.4g}")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(8.24, "8.2 s"), (59.94, "59.9 s"), (60, "1:00 min"), (185, "3:05 min"), (7800, "2:10 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
