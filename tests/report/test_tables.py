import io

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
