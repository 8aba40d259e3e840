"""Runs on SST-2 that the benchmarks share: recipes made here, run by kroncc itself, finished stages kept.

The model is a MiniLM that was fine-tuned on SST-2 (recipes/sst2-minilm.yaml makes one: its step `teacher`);
the data are GLUE's `train.tsv` and `dev.tsv`. Neither is part of kroncc: both are given on the command line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import interleaved
from kroncc.cli.reporter import ConsoleReporter
from kroncc.compiler import compile_recipe
from kroncc.model.load import load
from kroncc.quiet import quiet_libraries
from kroncc.recipe.loader import Loaded
from kroncc.recipe.node import PlaceMap
from kroncc.recipe.schema import Recipe
from kroncc.run.executor import execute

LENGTH = 64  # tokens; the longest sentence of the validation split has 55
LOSSES = ({"kind": "kl", "at": "logits", "temperature": 2.0}, {"kind": "task"})
HIDDEN = {"kind": "mse", "at": "hidden"}


def arguments(about: str) -> argparse.ArgumentParser:
    """Return the options that every benchmark on SST-2 takes."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--model", type=Path, required=True, help="directory of the fine-tuned MiniLM")
    parser.add_argument("--data", type=Path, required=True, help="directory of train.tsv and dev.tsv")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="where runs are kept")
    parser.add_argument("--only", nargs="*", default=[], help="rows of the table to run")
    parser.add_argument("--steps", type=int, default=400, help="optimiser steps of the distillation")
    return parser


def recipe(name: str, steps: Mapping[str, Any], given: argparse.Namespace) -> Loaded:
    """Return the recipe of one row of a table: `steps` on the fine-tuned model and SST-2."""
    data = {
        "source": "csv",
        "files": {"train": [str(given.data / "train.tsv")], "validation": [str(given.data / "dev.tsv")]},
        "delimiter": "\t",
        "quoting": False,
        "text": ["sentence"],
        "label": "label",
        "max_length": LENGTH,
    }
    whole = {
        "kroncc": 1,
        "name": name,
        "model": {"source": str(given.model.resolve()), "task": "text-classification"},
        "data": {"sst2": data},
        "steps": steps,
    }
    made = Recipe.model_validate_json(json.dumps(whole))
    return Loaded(made, PlaceMap({}), Path.cwd() / f"{name}.yaml", "")


def run(loaded: Loaded, given: argparse.Namespace) -> tuple[dict[str, float], dict[str, float]]:
    """Run a recipe, or what is left of it; return its values, and the seconds of each stage."""
    directory = given.out / loaded.recipe.name
    with quiet_libraries():
        plan = compile_recipe(loaded)
        result = execute(plan, directory, Path.cwd(), reporter=ConsoleReporter())
    seconds = {
        stage.name: json.loads((directory / "steps" / stage.name / "stage.json").read_text())["seconds"]
        for stage in plan.stages
    }
    return result.values, seconds


def latencies(models: Mapping[str, Path], batch: int, rounds: int = 15) -> dict[str, float]:
    """Return the median milliseconds of a forward pass of each model, [batch, 64] tokens, taking turns."""
    with quiet_libraries():
        loaded = {name: load(path).eval() for name, path in models.items()}
    ids = torch.randint(1000, 20000, (batch, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        calls = {
            name: lambda model=model: model(input_ids=ids % rows_of(model), attention_mask=mask)
            for name, model in loaded.items()
        }
        return {name: 1000 * taken for name, taken in interleaved(calls, rounds).items()}


def rows_of(model: Any) -> int:
    """Return how many tokens a model knows."""
    table = model.get_input_embeddings()
    return int(getattr(table, "num_embeddings", model.config.vocab_size))


def weight_bytes(directory: Path) -> int:
    """Return the bytes of a model's weight files."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))
