import io

import pytest
from rich.console import Console

from kroncc.plan.stages import Flops, ModelReport, Plan
from kroncc.report.tables import closing_table


def test_the_closing_table_sets_models_beside_the_original():
    base = ModelReport(params=200, bytes=800, flops=Flops(linear=1000, total=2000))
    small = ModelReport(params=50, bytes=200, flops=Flops(linear=100, total=500))
    models = {"base": base, "small": small, "unmeasured": small}
    plan = Plan(name="x", recipe={}, length=8, versions={}, sources={}, stages=(), models=models)
    values = {
        "base.params": 200,
        "base.disk": 4e6,
        "base.latency": 10.0,
        "small.disk": 1e6,
        "small.latency": 5.0,
        "small.fidelity.cosine": 0.9,
    }
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(closing_table(plan, values))
    text = console.export_text()
    for cell in ("50 (4.00x)", "1.0 MB (4.00x)", "500 (4.00x)", "5.0 ms (2.00x)", "0.9000"):
        assert cell in text
    assert "unmeasured" not in text


@pytest.mark.parametrize("width", [60, 80, 110, 150])
def test_every_figure_stands_whole_at_every_width(width: int):
    def report(params: int, flops: int) -> ModelReport:
        return ModelReport(params=params, bytes=4 * params, flops=Flops(linear=flops, total=flops))

    models = {name: report(22_713_216, 1_400_000_000) for name in ("base", "teacher")}
    models |= {name: report(3_168_392, 384_880_000) for name in ("factored", "task-sst2")}
    plan = Plan(name="x", recipe={}, length=64, versions={}, sources={}, stages=(), models=models)
    values = {}
    for index, name in enumerate(models):
        figures = {
            "disk": 1e6 * (12 + index),
            "latency": 19.2 - index,
            "fidelity.rank_correlation": 0.1234 + index,
        }
        values |= {f"{name}.{figure}": value for figure, value in (figures | {"accuracy": 0.5678}).items()}
    out = io.StringIO()
    Console(width=width, file=out).print(closing_table(plan, values))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= width
    words = text.replace("(", " (").split()
    for figure in ("3,168,392", "(7.17x)", "384.88", "(3.64x)", "13.0", "0.1234", "1.1234", "3.1234", "16.2"):
        assert figure in words, figure
    assert words.count("0.5678") == 4
