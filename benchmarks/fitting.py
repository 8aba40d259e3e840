"""What a start that knows the data is worth: MiniLM on SST-2, seven times smaller, before and in training.

    python -m benchmarks.fitting --model DIR --data DIR [--only NAME ...] [--steps 1000]

Every row has about the same number of parameters. The columns are the accuracy before any training (with the
seconds that the start took), and after each quarter of the same distillation (with the seconds of training).
Finished stages are kept: a second call measures nothing again.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks import sst2

QUARTERS = 4
ROWS_SEEN = {"data": "sst2", "rows": 1920, "batch_size": 32}
ATTENTION, UP, DOWN, WORD = "@attention.*", "@ffn.up", "@ffn.down", "@embedding.word"


def kronecker(**options: Any) -> list[dict[str, Any]]:
    """Return K_8's shapes on the 36 maps of the encoder."""
    return [
        call("kronecker", ATTENTION, a=[192, 192], b=[2, 2], **options),
        call("kronecker", UP, a=[8, 2], b=[192, 192], **options),
        call("kronecker", DOWN, a=[2, 8], b=[192, 192], **options),
    ]


def summed(**options: Any) -> list[dict[str, Any]]:
    """Return sums of small products, at the size of K_8's shapes."""
    return [
        call("kronecker", ATTENTION, a=[48, 48], b=[8, 8], rank=15, **options),
        call("kronecker", UP, a=[96, 24], b=[16, 16], rank=14, **options),
        call("kronecker", DOWN, a=[24, 96], b=[16, 16], rank=14, **options),
    ]


def low_rank(**options: Any) -> list[dict[str, Any]]:
    """Return two thin matrices for every map, at the size of K_8's shapes."""
    return [call("low-rank", ATTENTION, rank=48, **options), call("low-rank", "@ffn.*", rank=19, **options)]


def call(name: str, target: str, **options: Any) -> dict[str, Any]:
    """Return one call of a pass, as a recipe keeps it."""
    return {"name": name, "scope": {"targets": [target]}, "options": options}


PLAIN = call("kronecker", WORD, b=[1, 8])
THIN = call("low-rank", WORD, rank=48)
SEEN = call("low-rank", WORD, rank=48, weighted="activations")
WEIGHTED = {"weighted": "activations"}
SEQUENTIAL = {"weighted": "activations", "sequential": True}

ROWS: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "kronecker, nearest (the paper)": ([PLAIN, *kronecker()], False),
    "kronecker, nearest; low-rank table": ([THIN, *kronecker()], False),
    "kronecker, weighted": ([SEEN, *kronecker(**WEIGHTED)], False),
    "kronecker, sequential": ([SEEN, *kronecker(**SEQUENTIAL)], False),
    "kronecker, sequential, reconstructed": ([SEEN, *kronecker(**SEQUENTIAL)], True),
    "sums of products, nearest": ([SEEN, *summed()], False),
    "sums of products, sequential": ([SEEN, *summed(**SEQUENTIAL)], False),
    "sums of products, sequential, reconstructed": ([SEEN, *summed(**SEQUENTIAL)], True),
    "low-rank, nearest": ([SEEN, *low_rank()], False),
    "low-rank, sequential": ([SEEN, *low_rank(**SEQUENTIAL)], False),
    "low-rank, sequential, reconstructed": ([SEEN, *low_rank(**SEQUENTIAL)], True),
}


def main(words: list[str] | None = None) -> None:
    """Run the rows that are not finished, then print the table."""
    parser = sst2.arguments("starts of a distillation on SST-2")
    parser.add_argument("--start-only", action="store_true", help="measure before training alone")
    given = parser.parse_args(words)
    chosen = {name: row for name, row in ROWS.items() if not given.only or name in given.only}
    lines = [line(name, *row, given) for name, row in chosen.items()]
    quarters = (
        "" if given.start_only else "".join(f" {k * given.steps // QUARTERS} steps |" for k in (1, 2, 3, 4))
    )
    print(f"| start | parameters | before |{quarters}")
    print("|---|---|---|" + "---|" * quarters.count("|"))
    print("\n".join(lines))


def line(name: str, passes: list[dict[str, Any]], reconstruct: bool, given: argparse.Namespace) -> str:
    """Run one row; return its line of the table."""
    steps: dict[str, Any] = {"small": {"model": "base", "passes": passes, "calibrate": ROWS_SEEN}}
    student = "small"
    if reconstruct:
        student = "rebuilt"
        steps[student] = {
            "student": "small", "teacher": "base", "data": "sst2",
            "rows": 7680, "epochs": 3, "learning_rate": 5e-4,
        }  # fmt: skip
    starts = list(steps)
    models = [student]
    for quarter in range(1, 1 if given.start_only else QUARTERS + 1):
        steps[f"quarter-{quarter}"] = {
            "student": models[-1], "teacher": "base", "data": "sst2", "max_steps": given.steps // QUARTERS,
            "batch_size": 32, "learning_rate": 5e-4, "schedule": "constant", "seed": quarter,
            "losses": [{"kind": "mse", "at": "hidden"}, *sst2.LOSSES],
        }  # fmt: skip
        models.append(f"quarter-{quarter}")
    steps["report"] = {"models": models, "data": "sst2", "metrics": ["accuracy"]}
    slug = "fit-" + name.replace(",", "").replace(";", "").replace("(", "").replace(")", "").replace(" ", "-")
    values, seconds = sst2.run(sst2.recipe(slug, steps, given), given)
    started = sum(spent for stage, spent in seconds.items() if stage in starts or "calibrate" in stage)
    cells = [f"{100 * values[f'{student}.accuracy']:.1f} % ({started:.0f} s)"]
    spent = 0.0
    for model in models[1:]:
        spent += seconds[model]
        cells.append(f"{100 * values[f'{model}.accuracy']:.1f} % ({spent:.0f} s)")
    return f"| {name} | {values['small.params']:,.0f} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
