import io

import pytest
from rich.console import Console
from rich.table import Table

from kroncc.plan.layout import Fitting
from kroncc.plan.render import fold, fold_names, human, mermaid, module_table, stage_table
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


def printed(table: Fitting, width: int) -> str:
    out = io.StringIO()
    Console(width=width, file=out).print(table)
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= width
    return text


@pytest.mark.parametrize(("width", "side_by_side"), [(70, False), (80, False), (110, True), (150, True)])
def test_modules_at_every_width(width: int, side_by_side: bool):
    rows = tuple(
        ModuleRow(
            fqn=f"encoder.layer.{layer}.intermediate.dense",
            role="ffn.up",
            passes="kronecker",
            before=Side(shape="3072x768", params=2_362_368, flops=603_979_776),
            after=Side(shape="16x2 (x) 192x384", params=76_832, flops=39_321_600),
        )
        for layer in range(12)
    )
    small = ModelReport(params=14_655_754, bytes=24, flops=Flops(linear=1, total=5_492_000_000), modules=rows)
    base = ModelReport(params=109_483_778, bytes=24, flops=Flops(linear=1, total=21_740_000_000))
    text = printed(module_table("small", small, base), width)
    for figure in (
        "2,362,368",
        "76,832",
        "603.98 M",
        "39.32 M",
        "109,483,778",
        "14,655,754",
        "21.74 G",
        "5.49 G",
    ):
        assert figure in text, figure
    for words in ("ffn.up", "3072x768", "192x384", "7.47x smaller"):
        assert words in text
    assert any("2,362,368" in line and "76,832" in line for line in text.splitlines()) is side_by_side


def test_a_narrow_table_of_stages_leaves_out_hashes_only():
    report = ModelReport(params=109_483_778, bytes=24, flops=Flops(linear=12, total=12))
    options = {
        "needs": ("general", "teacher-sst2"),
        "kind": "train",
        "options": {},
        "hash": "0123456789abcdef",
    }
    stage = Stage(name="task-sst2", steps=12_345, flops=10**15, **options)
    plan = Plan(
        name="x",
        recipe={},
        length=8,
        versions={},
        sources={},
        stages=(stage,),
        models={"base": report, "task-sst2": report},
    )
    for width in (70, 150):
        text = printed(stage_table(plan), width)
        for words in ("task-sst2", "general,", "teacher-sst2", "12,345", "<= 1.00 P", "109,483,778"):
            assert words in text
        assert ("01234567" in text) is (width == 150)


def test_the_widest_layout_that_fits_is_printed():
    def table(cell: str) -> Table:
        made = Table()
        made.add_column(cell, no_wrap=True)
        return made

    layouts = tuple(table(cell) for cell in ("w" * 40, "m" * 20, "s" * 10))
    for width, letter in ((50, "w"), (30, "m"), (15, "s"), (10, "s")):
        out = io.StringIO()
        Console(width=width, file=out).print(Fitting(layouts))
        assert letter in out.getvalue()
        assert not set("wms") - {letter} & set(out.getvalue())
    out = io.StringIO()
    Console(width=50, file=out).print(Fitting(layouts, least=60))
    assert "m" in out.getvalue()
