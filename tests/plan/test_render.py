from kroncc.plan.render import fold, fold_names, human, mermaid
from kroncc.plan.stages import Flops, ModelReport, ModuleRow, Plan, Side, Stage


def row(fqn: str, params: int = 6) -> ModuleRow:
    side = Side(shape="2x3", params=params, flops=12)
    return ModuleRow(fqn=fqn, role="ffn.up", before=side, after=side)


def test_human_keeps_three_digits():
    assert [human(v) for v in (950, 14655754, 21_743_271_936)] == ["950", "14.66 M", "21.74 G"]


def test_layers_fold_into_one_row_and_others_stay():
    folded = fold(
        [row("layer.0.up"), row("layer.1.up"), row("layer.2.up"), row("head"), row("layer.3.up", 7)]
    )
    assert [(f.name, f.count) for f in folded] == [("layer.{0-2}.up", 3), ("head", 1), ("layer.3.up", 1)]


def test_gaps_in_layers_are_listed():
    assert fold_names(["l.0.q", "l.2.q", "l.5.q"]) == "l.{0,2,5}.q"
    assert fold_names(["a.0.b.1", "a.0.b.2"]) == "a.0.b.{1-2}"


def test_mermaid_draws_every_stage_and_edge():
    report = ModelReport(params=6, bytes=24, flops=Flops(linear=12, total=12))
    stages = (
        Stage(name="small", kind="rewrite", needs=(), options={"model": "base"}, hash="1"),
        Stage(
            name="task",
            kind="train",
            needs=("small",),
            options={"student": "small", "teacher": "base"},
            hash="2",
        ),
    )
    plan = Plan(
        name="x",
        recipe={},
        length=8,
        versions={},
        sources={},
        stages=stages,
        models={"base": report, "small": report},
    )
    text = mermaid(plan)
    assert text.startswith("flowchart LR")
    assert text.count("-->") == 3
    assert "s1 --> s2" in text
    assert "s0 --> s2" in text
