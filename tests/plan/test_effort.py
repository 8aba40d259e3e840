"""FLOPs of training stages: each at the length of its own data."""

from pathlib import Path
from typing import Any

import yaml

from kroncc.compiler import compile_recipe
from kroncc.plan.stages import Plan
from kroncc.recipe.loader import load_recipe

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def planned(root: Path, lengths: dict[str, int], steps: dict[str, Any]) -> Plan:
    (root / "a.txt").write_text("one\ntwo\n")
    small = {"compress": {"model": "base", "passes": [{"low-rank": {"targets": "@ffn.*", "rank": 2}}]}}
    recipe = {
        "kroncc": 1,
        "name": "x",
        "model": {"config": {"model_type": "bert", "vocab_size": 50, **SIZES}},
        "data": {
            name: {"source": "text", "files": "a.txt", "max_length": length}
            for name, length in lengths.items()
        },
        "steps": {"small": small, **steps},
    }
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return compile_recipe(load_recipe(path), offline=True)


def distill(student: str, data: str) -> dict[str, Any]:
    options = {"max_steps": 3, "batch_size": 5, "accumulate": 2, "losses": [{"mse": {"at": "hidden"}}]}
    return {"distill": {"student": student, "teacher": "base", "data": data, **options}}


def test_each_stage_counts_its_own_length(tmp_path: Path):
    steps = {"first": distill("small", "short"), "second": distill("first", "long")}
    both = planned(tmp_path, {"short": 8, "long": 64}, steps)
    alone = planned(tmp_path, {"short": 8}, {"first": distill("small", "short")})
    long = planned(tmp_path, {"long": 64}, {"second": distill("small", "long")})
    assert both.length == 64
    flops = {stage.name: stage.flops for stage in both.stages}
    assert flops["first"] == alone.stages[-1].flops
    assert flops["second"] == long.stages[-1].flops
    base, small = (alone.models[name].flops.total for name in ("base", "small"))
    assert flops["first"] == 3 * 5 * 2 * (3 * small + base)
