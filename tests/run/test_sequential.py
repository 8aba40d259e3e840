"""Sequential statistics against a plain loop: rewrite a site, run the whole model again, look at the next."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kroncc.graph.capture import capture
from kroncc.graph.wavefront import Wavefront
from kroncc.recipe.schema import PassCall, Scope
from kroncc.rewrite import registry
from kroncc.rewrite.base import Calibration, SitePass, SiteStats
from kroncc.rewrite.pipeline import compress_graph
from kroncc.run.sequential import Sequential

SEEN: dict[str, SiteStats | None] = {}
LENGTHS = (9, 4, 7, 2, 6)
Batch = dict[str, Tensor]


class Coarse(SitePass):
    """Round a weight, and note which statistics came with the site."""

    kind: ClassVar[str] = "coarse"
    accepts: ClassVar[Any] = (nn.Linear, Conv1D, nn.Embedding)
    step: float = 0.2

    def needs(self):
        return Calibration(moments=True, sequential=True)

    def replace(self, site):
        new = copy.deepcopy(site.module)
        if new.weight.is_meta:
            return new
        SEEN[site.fqn] = site.stats
        with torch.no_grad():
            new.weight.copy_((new.weight / self.step).round() * self.step)
        return new


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    table, broken = registry._table()
    entry = registry.Entry("coarse", "a test", "nowhere:Coarse", Coarse)
    monkeypatch.setattr(registry, "_table", lambda: ({**table, "coarse": entry}, broken))
    SEEN.clear()


def coarse(*targets: str) -> PassCall:
    return PassCall(name="coarse", scope=Scope(targets=list(targets)), options={})


def rows(model: Any) -> list[Batch]:
    """Five rows without padding."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for length in LENGTHS:
        ids = torch.randint(3, 100, (1, length), generator=generator)
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return made


def padded(singles: list[Batch], sizes: tuple[int, ...]) -> list[Batch]:
    batches, remaining = [], list(singles)
    for size in sizes:
        part, remaining = remaining[:size], remaining[size:]
        width = max(row["input_ids"].shape[1] for row in part)
        batches.append(
            {
                name: torch.cat(
                    [nn.functional.pad(row[name], (0, width - row[name].shape[1])) for row in part]
                )
                for name in part[0]
            }
        )
    return batches


def inputs_of(model: Any, fqn: str, singles: list[Batch]) -> np.ndarray[Any, Any]:
    seen: list[Any] = []
    hook = model.get_submodule(fqn).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for row in singles:
            model(**row)
    hook.remove()
    return np.concatenate([x.double().numpy().reshape(-1, x.shape[-1]) for x in seen])


def close(got: Tensor | None, want: np.ndarray[Any, Any], tolerance: float = 1e-5) -> None:
    assert got is not None
    assert (got.double().numpy() - want).__abs__().max() <= tolerance * np.abs(want).max()


def run(model: Any, batches: list[Batch], *targets: str, **stats: SiteStats) -> list[str]:
    graph = capture(model, ["input_ids", "attention_mask"])
    sequential = Sequential(graph.copy(), batches)
    done = compress_graph(graph, [coarse(*targets)], stats=stats, sequential=sequential)
    return [site for applied in done.structure.passes for site in applied.sites]


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("bert", ["@attention.*", "@ffn.*", "@pooler"]),
        ("gpt2", ["@attention.*", "@ffn.*"]),
        ("llama", ["@attention.*", "@ffn.*"]),
    ],
)
def test_each_site_sees_what_the_rewritten_part_gives(tiny, family, targets, monkeypatch):
    ran: list[str] = []
    plain = Wavefront._call
    monkeypatch.setattr(
        Wavefront, "_call", lambda self, node, *rest: (ran.append(node.name), plain(self, node, *rest))[1]
    )
    model = tiny(family)
    teacher, student, singles = copy.deepcopy(model), copy.deepcopy(model), rows(model)
    sites = run(model, padded(singles, (3, 2)), *targets)
    assert len(sites) >= 8
    assert len(ran) <= 2 * 2 * len(set(ran))  # once a batch in student and teacher, for all sites
    for fqn in sites:
        x, t = inputs_of(student, fqn, singles), inputs_of(teacher, fqn, singles)
        stats = SEEN[fqn]
        assert stats is not None
        assert stats.count == len(x)
        close(stats.mean, x.mean(0))
        close(stats.cross_mean, t.mean(0))
        close(stats.moment, x.T @ x / len(x))
        close(stats.cross, t.T @ x / len(x))
        weight = student.get_submodule(fqn).weight
        weight.data = (weight.data / 0.2).round() * 0.2
    last = SEEN[sites[-1]]
    assert last is not None
    assert not torch.allclose(last.cross, last.moment, rtol=1e-2)  # the two models do differ by then


def test_batches_change_rounding_only_and_maps_of_one_value_share_it(tiny):
    found = []
    for sizes in ((5,), (1, 1, 1, 1, 1)):
        model = tiny("bert")
        run(model, padded(rows(model), sizes), "@attention.*", "@ffn.*")
        found.append(dict(SEEN))
    for fqn, stats in found[0].items():
        close(found[1][fqn].moment, stats.moment.double().numpy())
        close(found[1][fqn].cross, stats.cross.double().numpy())
    for layer in (0, 1):
        same = [SEEN[f"encoder.layer.{layer}.attention.self.{name}"] for name in ("query", "key", "value")]
        assert same[0].moment is same[1].moment is same[2].moment


def test_a_shared_module_counts_all_its_calls(tiny):
    """ALBERT: the second call sees the first one's output, of the old module."""
    model = tiny("albert")
    teacher, student, singles = copy.deepcopy(model), copy.deepcopy(model), rows(model)
    sites = run(model, padded(singles, (3, 2)), "@attention.*", "@ffn.*")
    assert len(sites) == 6
    for fqn in sites:
        x, t = inputs_of(student, fqn, singles), inputs_of(teacher, fqn, singles)
        assert SEEN[fqn].count == len(x) == 2 * sum(LENGTHS)
        close(SEEN[fqn].moment, x.T @ x / len(x))
        close(SEEN[fqn].cross, t.T @ x / len(x))
        weight = student.get_submodule(fqn).weight
        weight.data = (weight.data / 0.2).round() * 0.2


def test_tables_and_what_was_measured_before_stay(tiny):
    model = tiny("bert")
    before = {
        "embeddings.word_embeddings": SiteStats(lookups=torch.ones(100)),
        "encoder.layer.0.output.dense": SiteStats(fisher=torch.ones(32, 64)),
    }
    run(model, padded(rows(model), (5,)), "@embedding.word", "@ffn.*", **before)
    assert SEEN["embeddings.word_embeddings"] is before["embeddings.word_embeddings"]
    assert SEEN["encoder.layer.0.output.dense"].fisher is before["encoder.layer.0.output.dense"].fisher
    assert SEEN["encoder.layer.0.output.dense"].cross is not None


def test_a_tied_head_is_met_where_its_table_is(tiny):
    model = tiny("gpt2", "AutoModelForCausalLM")
    run(model, padded(rows(model), (5,)), "@ffn.down", "lm_head")
    assert list(SEEN) == ["transformer.wte", *(f"transformer.h.{layer}.mlp.c_proj" for layer in (0, 1))]
