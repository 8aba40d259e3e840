"""Calibrate stages: planned once for all who share them, run, kept, and handed to the passes."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
import yaml
from torch import nn

from kroncc.api import Calibration, Resolved, SitePass, SiteStats, TreePass
from kroncc.compiler import compile_recipe
from kroncc.errors import KronccError
from kroncc.graph.capture import capture
from kroncc.graph.model_graph import ModelGraph
from kroncc.model.load import load
from kroncc.plan import models
from kroncc.plan.render import mermaid, render
from kroncc.plan.stages import Plan, Stage
from kroncc.recipe.loader import load_recipe
from kroncc.rewrite import pipeline, registry
from kroncc.rewrite.demands import dump_requests, parse_requests
from kroncc.run import context
from kroncc.run.calibrate import collect
from kroncc.run.context import Context
from kroncc.run.executor import RunResult, execute
from kroncc.run.progress import NullReporter
from kroncc.run.statistics import read_statistics, write_statistics
from kroncc.run.store import RunStore

SEEN: list[tuple[str, SiteStats | None]] = []
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "bad", "film", "plot"]
QUERY, DENSE = "encoder.layer.0.attention.self.query", "encoder.layer.1.output.dense"


class Coarse(SitePass):
    """Round a weight, and note the statistics that came with the site."""

    kind: ClassVar[str] = "coarse"
    accepts: ClassVar[Any] = (nn.Linear, nn.Embedding)
    step: float = 0.2
    fisher: bool = False
    moments: bool = True
    sequential: bool = False

    def needs(self):
        return Calibration(moments=self.moments, fisher=self.fisher, sequential=self.sequential)

    def replace(self, site):
        new = copy.deepcopy(site.module)
        if not new.weight.is_meta:
            SEEN.append((site.fqn, site.stats))
            with torch.no_grad():
                new.weight.copy_((new.weight / self.step).round() * self.step)
        return new


class Fewer(TreePass):
    """Take out the layer that turns its input the least; half the heads' saliency is asked for too."""

    kind: ClassVar[str] = "fewer"
    data: bool = True

    def requests(self, graph, sites):
        layers = [
            name for name, module in graph.model.named_modules() if name.endswith(("layer.0", "layer.1"))
        ]
        return dict.fromkeys(layers, Calibration(influence=True)) if self.data else {}

    def resolve_tree(self, graph, sites, stats, seed):
        stack = next(
            name for name, module in graph.model.named_modules() if isinstance(module, nn.ModuleList)
        )
        if stats is not None:
            SEEN.extend((name, stats[name]) for name in stats if name.startswith(stack))
        return Resolved(self, (f"{stack}.1",))

    def rewrite(self, model, sites, choice=None):
        del model.get_submodule(sites[0].rpartition(".")[0])[1:]


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    table, broken = registry._table()
    mine = {cls.kind: registry.Entry(cls.kind, "tests", "nowhere:x", loaded=cls) for cls in (Coarse, Fewer)}
    monkeypatch.setattr(registry, "_table", lambda: ({**table, **mine}, broken))
    SEEN.clear()


@pytest.fixture(scope="module", autouse=True)
def captured_once():
    """The same model is planned and run many times here; capturing it is most of the work."""
    known: dict[Any, ModelGraph] = {}

    def cached(model: Any, inputs: Any = None, *rest: Any, **more: Any) -> ModelGraph:
        names = tuple(name for name, _ in model.named_modules())
        key = type(model), model.config.num_labels, inputs and tuple(inputs), names
        if key not in known:
            known[key] = capture(model, inputs, *rest, **more)
        return known[key].bind(model)

    with pytest.MonkeyPatch.context() as patch:
        for user in (models, context, pipeline):
            patch.setattr(user, "capture", cached)
        yield


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ground")
    (root / "model").mkdir()
    (root / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=24,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(root / "model")
    transformers.BertTokenizerFast(vocab=str(root / "vocab.txt")).save_pretrained(root / "model")
    generator = torch.Generator().manual_seed(1)
    lines = ["text,label"]
    for _ in range(40):
        length = int(torch.randint(1, 8, (), generator=generator))
        words = [WORDS[int(i)] for i in torch.randint(5, 10, (length,), generator=generator)]
        lines.append(f"{' '.join(words)},{int('good' in words)}")
    (root / "train.csv").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def root(ground: Path, tmp_path: Path) -> Path:
    shutil.copytree(ground, tmp_path, dirs_exist_ok=True)
    return tmp_path


SPEC: dict[str, Any] = {"data": "d", "rows": 12, "batch_size": 4}


def compress(*passes: Mapping[str, Any], model: str = "base", calibrate: Any = SPEC) -> dict[str, Any]:
    body = {"model": model, "passes": list(passes)}
    return {"compress": body | ({"calibrate": calibrate} if calibrate else {})}


def coarse(targets: str = "@attention.q", **options: Any) -> dict[str, Any]:
    return {"coarse": {"targets": targets, **options}}


def plan(root: Path, steps: dict[str, Any], task: str = "feature-extraction", **data: Any) -> Plan:
    recipe = {
        "kroncc": 1,
        "name": "x",
        "model": {"source": "model", "task": task},
        "data": {"d": {"source": "csv", "files": "train.csv", "label": "label", "max_length": 16, **data}},
        "steps": steps,
        "expect": {f"{name}.params": "> 0" for name in steps},  # so that every step is used
    }
    if not any("calibrate" in body for step in steps.values() for body in step.values()):
        del recipe["data"]
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return compile_recipe(load_recipe(path))


class Heard(NullReporter):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


def run(root: Path, made: Plan, heard: Heard | None = None) -> RunResult:
    return execute(made, root / "run", root, reporter=heard or Heard())


def stage(made: Plan, name: str) -> Stage:
    return next(one for one in made.stages if one.name == name)


def test_one_stage_serves_all_steps_with_the_same_model_and_rows(root):
    made = plan(
        root,
        {
            "first": compress(coarse()),
            "second": compress(coarse("@ffn.down", fisher=True), coarse("@attention.*")),
            "more": compress(coarse(), calibrate=SPEC | {"rows": 20}),
            "then": compress(
                coarse(), coarse("@ffn.up", fisher=True), {"fewer": {"data": False}}, model="first"
            ),
        },
    )
    assert [(one.name, one.kind, one.needs) for one in made.stages] == [
        ("base.calibrate", "calibrate", ()),
        ("first", "rewrite", ("base.calibrate",)),
        ("second", "rewrite", ("base.calibrate",)),
        ("base.calibrate-2", "calibrate", ()),
        ("more", "rewrite", ("base.calibrate-2",)),
        ("first.calibrate", "calibrate", ("first",)),
        ("then", "rewrite", ("first", "first.calibrate")),
    ]
    requests = parse_requests(stage(made, "base.calibrate").options["requests"])
    moments, both = Calibration(moments=True), Calibration(moments=True, fisher=True)
    assert requests[QUERY] == moments
    assert requests[DENSE] == both
    assert len(requests) == 10
    assert Plan.model_validate_json(made.to_json()) == made


def test_the_stage_is_shown(root, capsys):
    from rich.console import Console

    made = plan(root, {"first": compress(coarse()), "next": compress(coarse(fisher=True), model="first")})
    Console(width=200).print(render(made))
    assert "base.calibrate" in capsys.readouterr().out
    page = mermaid(made)
    assert 's1["base.calibrate<br/>calibrate"]' in page
    assert "s0 --> s1" in page
    assert "s1 --> s2" in page
    cost = made.models["base"].flops.total
    assert stage(made, "base.calibrate").flops == 12 * cost
    assert stage(made, "first.calibrate").flops == 36 * cost


def test_the_hash_covers_model_rows_and_requests(root):
    def hashes() -> dict[str, str]:
        steps = {
            "plain": compress(coarse()),
            "rows": compress(coarse(), calibrate=SPEC | {"rows": 13}),
            "seed": compress(coarse(), calibrate=SPEC | {"seed": 1}),
            "asked": compress(coarse(fisher=True), calibrate=SPEC | {"batch_size": 5}),
            "coarser": compress(coarse(step=0.5), model="plain"),
            "sequential": compress(coarse(sequential=True)),
        }
        return {one.name: one.hash for one in plan(root, steps).stages}

    before = hashes()
    assert len(set(before.values())) == len(before) == 11
    (root / "train.csv").write_text((root / "train.csv").read_text() + "a good film,1\n")
    after = hashes()
    assert not {name for name, value in after.items() if value == before[name]}


@pytest.mark.parametrize(
    ("steps", "code", "path", "text"),
    [
        (
            {"first": compress(coarse(moments=False), coarse(), calibrate=None)},
            "K770",
            "steps.first.compress.passes[1].coarse",
            "calibrate: {data: ..., rows: 512}",
        ),
        (
            {"first": compress({"fewer": {}}, coarse())},
            "K771",
            "steps.first.compress.passes[1].coarse",
            "a compress step of its own",
        ),
        (
            {"first": compress(coarse(), coarse(fisher=True))},
            "K771",
            "steps.first.compress.passes[1].coarse",
            "a compress step of its own",
        ),
    ],
)
def test_mistakes_are_found_by_the_plan(root, steps, code, path, text):
    with pytest.raises(KronccError) as caught:
        plan(root, steps)
    problem = caught.value.problems[0]
    assert problem.code == code
    assert problem.path == path
    assert problem.place is not None
    assert text in f"{problem.expected} {problem.remedy}"


def test_passes_get_what_was_measured(root):
    steps = {
        "first": compress(coarse(f"{{{QUERY},{DENSE}}}"), coarse("@embedding.word")),
        "second": compress(coarse(DENSE, fisher=True)),
        "third": compress({"fewer": {}}),
    }
    made = plan(root, steps)
    result = run(root, made)
    assert result.finished == ("base.calibrate", "first", "second", "third")
    kept = read_statistics(root / "run" / "steps" / "base.calibrate")
    opened = Context(made, RunStore(root / "run"), root, NullReporter())
    model = opened.load("base")
    source = opened.batches("d", "train", model, "base", 4, 0)
    drawn = source.sample(12, 0)
    assert sum(map(len, drawn)) == len({row for batch in drawn for row in batch}) == 12
    batches = [{n: v for n, v in source.collate(rows).items() if n != "labels"} for rows in drawn]
    requests = parse_requests(stage(made, "base.calibrate").options["requests"])
    again = collect(model, batches, requests, task="feature-extraction", device="cpu")
    assert kept.keys() == again.keys()
    for fqn, one in again.items():
        assert_same(kept[fqn], one)
    seen = dict(SEEN)
    assert_same(seen[QUERY], again[QUERY])
    assert_same(seen[DENSE], again[DENSE])
    assert seen["embeddings.word_embeddings"].lookups.sum() == seen[QUERY].count
    assert seen["encoder.layer.1"].influence == again["encoder.layer.1"].influence
    assert len(load(root / "run" / "steps" / "third").encoder.layer) == 1
    record = json.loads((root / "run" / "steps" / "base.calibrate" / "stage.json").read_text())
    assert record["details"] == {"rows": 12, "modules": 5, "labels": False}


def assert_same(one: SiteStats, other: SiteStats) -> None:
    assert (one.count, one.influence) == (other.count, other.influence)
    for part in ("mean", "moment", "lookups", "fisher"):
        mine, theirs = getattr(one, part), getattr(other, part)
        assert (mine is None) == (theirs is None), part
        assert mine is None or torch.equal(mine, theirs), part


def test_a_finished_stage_is_kept(root):
    made, changed = (plan(root, {"first": compress(coarse(step=step))}) for step in (0.2, 0.4))
    run(root, made)
    kept = run(root, changed)
    assert (kept.skipped, kept.finished) == (("base.calibrate",), ("first",))
    (root / "run" / "steps" / "base.calibrate" / "statistics.safetensors").unlink()
    again = run(root, changed)
    assert (again.skipped, again.finished) == (("first",), ("base.calibrate",))


def test_labels_are_used_where_they_are_those_of_the_head(root):
    steps = {"first": compress(coarse("@ffn.up", fisher=True))}
    heard = Heard()
    run(root, plan(root, steps, "text-classification"), heard)
    record = json.loads((root / "run" / "steps" / "base.calibrate" / "stage.json").read_text())
    assert record["details"]["labels"] is True
    assert not heard.messages
    labelled = dict(SEEN)["bert.encoder.layer.0.intermediate.dense"].fisher
    made = plan(root, steps, "text-classification", label=None)
    run(root, made, heard)
    assert ["labels that the model draws" in text for text in heard.messages] == [True]
    drawn = dict(SEEN)["bert.encoder.layer.0.intermediate.dense"].fisher
    assert not torch.equal(labelled, drawn)


@pytest.mark.parametrize("task", ["fill-mask", "text-generation"])
def test_language_models_are_measured_on_their_own_labels(root, task):
    run(root, plan(root, {"first": compress(coarse("@ffn.up", fisher=True))}, task, label=None))
    record = json.loads((root / "run" / "steps" / "base.calibrate" / "stage.json").read_text())
    assert record["details"]["labels"] is True


def test_a_sequential_step_measures_while_it_rewrites(root):
    steps = {
        "first": compress(
            coarse("@attention.*", step=0.5, sequential=True), coarse("@ffn.*", sequential=True, fisher=True)
        ),
        "plain": compress(coarse("@attention.*", step=0.5, moments=False)),
    }
    made = plan(root, steps)
    assert [one.name for one in made.stages] == ["base.calibrate", "first", "plain"]
    requests = parse_requests(stage(made, "base.calibrate").options["requests"])
    assert set(requests.values()) == {Calibration(fisher=True)}
    run(root, made)
    assert not (root / "run" / "cache").exists()
    first, last = dict(SEEN[:12])[QUERY], dict(SEEN[:12])[DENSE]
    assert torch.allclose(first.moment, first.cross)
    assert not torch.allclose(last.moment, last.cross, rtol=1e-2)
    assert last.fisher is not None
    assert first.fisher is None
    ours, plain = (load(root / "run" / "steps" / name).state_dict() for name in ("first", "plain"))
    assert torch.equal(ours[f"{QUERY}.weight"], plain[f"{QUERY}.weight"])


def test_requests_as_plain_data():
    requests = {
        "a": Calibration(moments=True),
        "b": Calibration(saliency=frozenset({64, 1}), influence=True),
        "c": Calibration(moments=True),
    }
    dumped = dump_requests(requests)
    assert dumped == [
        {"moments": True, "sites": ["a", "c"]},
        {"saliency": [1, 64], "influence": True, "sites": ["b"]},
    ]
    assert parse_requests(json.loads(json.dumps(dumped))) == requests


def test_statistics_on_disk(tmp_path):
    shared = torch.rand(3, 2)
    stats = {
        "a.b": SiteStats(count=7, mean=torch.rand(2), moment=torch.rand(2, 2).T, fisher=shared),
        "c": SiteStats(lookups=torch.rand(5), fisher=shared, saliency={1: torch.rand(4), 2: torch.rand(2)}),
        "d": SiteStats(influence=0.25),
    }
    write_statistics(stats, tmp_path)
    found = read_statistics(tmp_path)
    assert found.keys() == stats.keys()
    for name, one in stats.items():
        assert_same(found[name], one)
        assert found[name].saliency.keys() == one.saliency.keys()
        assert all(torch.equal(found[name].saliency[size], one.saliency[size]) for size in one.saliency)
