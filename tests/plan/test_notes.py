"""What a plan remarks on."""

import io

from rich.console import Console

from kroncc.plan.notes import notes
from kroncc.plan.render import render
from kroncc.plan.stages import Flops, ModelReport, Plan, SkippedRow, Stage
from kroncc.rewrite.structure import AppliedPass, Structure

DONE = Structure(passes=(AppliedPass(name="kronecker", version=1, options={}, sites=("x",)),))


def skipped(fqn: str, reason: str) -> SkippedRow:
    return SkippedRow(fqn=fqn, name="kronecker", reason=reason)


def plan(structure: Structure, *rows: SkippedRow, source: Structure | None = None) -> Plan:
    base = ModelReport(params=6, bytes=24, flops=Flops(linear=1, total=2), structure=source or Structure())
    small = base.model_copy(update={"structure": structure, "skipped": rows})
    stage = Stage(name="small", kind="rewrite", needs=(), options={"model": "base"}, hash="1")
    return Plan(
        name="x",
        recipe={},
        length=8,
        versions={},
        sources={},
        stages=(stage,),
        models={"base": base, "small": small},
    )


def test_a_step_that_skips_all_is_noted_and_shown():
    made = plan(Structure(), skipped("a", "too small"), skipped("b", "too small"), skipped("c", "is odd"))
    (note,) = notes(made)
    assert note == "step 'small' changes nothing: all 3 modules it matched are skipped (2 of them: too small)"
    out = io.StringIO()
    Console(file=out, width=200).print(render(made))
    assert f"note: {note}" in out.getvalue()


def test_a_compressed_source_left_alone_is_noted_too():
    assert notes(plan(DONE, skipped("a", "too small"), source=DONE)) != []


def test_a_step_that_does_something_is_not_noted():
    assert notes(plan(DONE, skipped("a", "too small"))) == []
    assert notes(plan(DONE)) == []
