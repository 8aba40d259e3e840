"""Every method at the setting of its recipe, on SST-2: size, latency, accuracy before and after distillation.

    python -m benchmarks.methods --model DIR --data DIR [--only NAME ...] [--steps 400]

Each row takes the compress, reconstruct and training steps of a recipe of this repository; data and losses
become those of SST-2, and all rows train equally long. Rows that are finished are kept and not run again.
Latencies are measured at the end, all models of the table in turn.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import sst2
from kroncc.errors import KronccError
from kroncc.recipe.loader import load_recipe
from kroncc.recipe.schema import Compress, Distill, Finetune, Reconstruct
from kroncc.rewrite.registry import schemas

RECIPES = Path(__file__).parents[1] / "recipes"


@dataclass(frozen=True)
class Row:
    """One row: the recipe that it follows, and what the survey's table 1 says of such methods (BERT_BASE)."""

    recipe: str
    survey: str = ""


ROWS = {
    "kronecker": Row("quickstart"),
    "low-rank": Row("low-rank-minilm"),
    "reconstruct": Row("reconstruct-minilm"),
    "quantize": Row("quantize-minilm", "Q-BERT 15 %, 1x, -0.6; GOBO 10.2 %, 1x, -0.9"),
    "prune-weights": Row("prune-weights-minilm", "movement pruning 23.8 %, 1x, -4.7"),
    "prune-heads": Row("prune-heads-minilm"),
    "prune-neurons": Row("prune-neurons-minilm", "DynaBERT 31.2 %, 8.7x, -1.0"),
    "prune-hidden": Row("prune-hidden-minilm"),
    "drop-layers": Row("drop-layers-minilm", "DistilBERT 60.7 %, 1.7x, -1.7"),
    "share-layers": Row("share-layers-minilm", "ALBERT 10.7 %, 1.2x, -0.6"),
    "embedding": Row("embedding-minilm"),
    "squeeze": Row("squeeze-minilm"),
    "student": Row("student-minilm", "BiLSTM and CNN students, not in its table"),
    "edge": Row("edge", "EdgeBERT 1.3 %, 1.8x, -1.5"),
    "tiny-fast": Row("tiny-fast", "TinyBERT 13.3 %, 9.3x, -1.0; MobileBERT int8 5.7 %, 4.7x, -0.23"),
    "q-kron": Row("q-kron"),
}


def main(words: list[str] | None = None) -> None:
    """Run the rows that are not finished, then print the table."""
    parser = sst2.arguments("every method on SST-2")
    parser.add_argument("--no-latency", action="store_true", help="leave out the latencies")
    given = parser.parse_args(words)
    names = given.only or list(ROWS)
    figures = {name: figure for name in names if (figure := measured(name, given))}
    print(json.dumps(figures, indent=1))
    print_table(figures, given)


def measured(name: str, given: argparse.Namespace) -> dict[str, Any] | None:
    """Return the figures of one row; None, and why, where it cannot be run."""
    file = RECIPES / f"{ROWS[name].recipe}.yaml"
    if not file.is_file():
        print(f"{name}: there is no {file.name}")
        return None
    steps, before, after = steps_of(file, given)
    try:
        values, seconds = run_with_hidden(name, steps, given)
    except KronccError as error:
        print(f"{name}: {error}")
        return None
    directory = given.out / name / "steps" / after
    return {
        "model": str(directory),
        "base": values["base.accuracy"],
        "before": values.get(f"{before}.accuracy"),
        "after": values[f"{after}.accuracy"],
        "bytes": sst2.weight_bytes(directory),
        "seconds": sum(seconds.values()),
    }


def run_with_hidden(
    name: str, steps: dict[str, Any], given: argparse.Namespace
) -> tuple[dict[str, float], dict[str, float]]:
    """Run a row with the hidden states among its losses, or without where the models do not compare there."""
    rich = {key: with_hidden(step) for key, step in steps.items()}
    try:
        return sst2.run(sst2.recipe(name, rich, given), given)
    except KronccError as error:
        if not error.problems[0].code.startswith("K7"):
            raise
        print(f"{name}: without hidden states: {error.problems[0].message}")
    return sst2.run(sst2.recipe(name, steps, given), given)


def with_hidden(step: dict[str, Any]) -> dict[str, Any]:
    """Return a step with the hidden states among its losses, if it distils."""
    if "losses" not in step:
        return step
    return {**step, "losses": [*step["losses"], sst2.HIDDEN]}


def steps_of(file: Path, given: argparse.Namespace) -> tuple[dict[str, Any], str | None, str]:
    """Return the steps of a recipe on SST-2, and the models to measure before and after distillation."""
    recipe = load_recipe(file, passes=schemas()).recipe
    kept = {
        name: action
        for name, action in recipe.steps.items()
        if isinstance(action, Compress | Reconstruct | Distill | Finetune)
    }
    trained = [name for name, action in kept.items() if isinstance(action, Distill | Finetune)]
    made = [name for name, action in kept.items() if isinstance(action, Compress | Reconstruct)]
    steps: dict[str, Any] = {}
    for name, action in kept.items():
        body = action.model_dump(mode="json", exclude_unset=True)
        if isinstance(action, Distill | Finetune):
            body = taught(action, body, given.steps // len(trained))
        elif isinstance(action, Reconstruct):
            body |= {"data": "sst2", "split": "train"}
        elif action.calibrate is not None:
            body["calibrate"] |= {"data": "sst2", "split": "train"}
        steps[name] = body
    if not trained:
        student = made[-1]
        steps["distilled"] = {
            "student": student, "teacher": "base", "data": "sst2", "max_steps": given.steps, "batch_size": 32,
            "learning_rate": 5e-4, "warmup": 0.05, "losses": list(sst2.LOSSES),
        }  # fmt: skip
        trained = ["distilled"]
    before = made[-1] if made else None
    after = trained[-1]
    models = [name for name in ("base", before, after) if name]
    steps["report"] = {"models": models, "data": "sst2", "metrics": ["accuracy"]}
    return steps, before, after


def taught(action: Distill | Finetune, body: dict[str, Any], steps: int) -> dict[str, Any]:
    """Return a training step on SST-2, of so many optimiser steps."""
    for key in ("epochs", "cache_teacher", "evaluate_every"):
        body.pop(key, None)
    body |= {"data": "sst2", "split": "train", "max_steps": steps, "batch_size": 32}
    if isinstance(action, Distill):
        body["losses"] = list(sst2.LOSSES)
    return body


def print_table(figures: dict[str, dict[str, Any]], given: argparse.Namespace) -> None:
    """Print the table in Markdown."""
    base_bytes = sst2.weight_bytes(given.model)
    models = {"base": given.model} | {name: Path(figure["model"]) for name, figure in figures.items()}
    taken = {} if given.no_latency else {batch: sst2.latencies(models, batch) for batch in (1, 16)}
    print("| method | size | bytes | latency b1 | b16 | accuracy before | after | survey (BERT_BASE) |")
    print("|---|---|---|---|---|---|---|---|")
    for name, figure in figures.items():
        ratios = [f"{taken[batch]['base'] / taken[batch][name]:.2f}x" for batch in taken] or ["", ""]
        before = "" if figure["before"] is None else f"{100 * figure['before']:.1f} %"
        print(
            f"| `{name}` | {100 * figure['bytes'] / base_bytes:.1f} % | {figure['bytes']:,} | {ratios[0]} "
            f"| {ratios[1]} | {before} | {100 * figure['after']:.1f} % | {ROWS[name].survey} |"
        )
    for batch, times in taken.items():
        print(f"dense, batch {batch}: {times['base']:.1f} ms")


if __name__ == "__main__":
    main()
