"""What a plan does that its author may not have meant: no error, and worth a line."""

from __future__ import annotations

from collections import Counter

from kroncc.plan.stages import Plan


def notes(plan: Plan) -> list[str]:
    """Return a sentence for each compress step that leaves its model as it is."""
    return [
        _unchanged(stage.name, [row.reason for row in plan.models[stage.name].skipped])
        for stage in plan.stages
        if stage.kind == "rewrite"
        and plan.models[stage.name].skipped
        and plan.models[stage.name].structure == plan.models[stage.options["model"]].structure
    ]


def _unchanged(name: str, reasons: list[str]) -> str:
    (reason, count), *others = Counter(reasons).most_common()
    why = reason if not others else f"{count} of them: {reason}"
    return f"step {name!r} changes nothing: all {len(reasons)} modules it matched are skipped ({why})"
