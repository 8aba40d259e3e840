"""Statistics on disk: what a calibrate stage leaves for the compress steps after it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from kroncc.rewrite.base import SiteStats

TENSORS, NUMBERS = "statistics.safetensors", "statistics.json"
PARTS = ("mean", "moment", "lookups", "fisher")


def write_statistics(stats: Mapping[str, SiteStats], directory: Path) -> None:
    """Write the statistics of modules: tensors as `FQN/moment`, `FQN/saliency.64`; numbers as json."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for fqn, one in stats.items():
        values = {part: getattr(one, part) for part in PARTS}
        values |= {f"saliency.{size}": value for size, value in one.saliency.items()}
        given = {part: value.contiguous() for part, value in values.items() if value is not None}
        # a tied weight gives its modules one tensor, and safetensors refuses to write it twice
        tensors |= {f"{fqn}/{part}": value.clone() for part, value in given.items()}
        numbers[fqn] = {"count": one.count, "influence": one.influence, "tensors": list(given)}
    save_file(tensors, directory / TENSORS)
    (directory / NUMBERS).write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


def read_statistics(directory: Path) -> dict[str, SiteStats]:
    """Return the statistics that `write_statistics` wrote, by module."""
    tensors = load_file(directory / TENSORS)
    numbers = json.loads((directory / NUMBERS).read_text(encoding="utf-8"))
    return {fqn: _read(fqn, one, tensors) for fqn, one in numbers.items()}


def _read(fqn: str, numbers: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SiteStats:
    given = {part: tensors[f"{fqn}/{part}"] for part in numbers["tensors"]}
    return SiteStats(
        count=numbers["count"],
        influence=numbers["influence"],
        saliency={
            int(part.partition(".")[2]): value
            for part, value in given.items()
            if part.startswith("saliency.")
        },
        **{part: value for part, value in given.items() if part in PARTS},
    )
