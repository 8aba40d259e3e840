"""Statistics of modules against references: one row at a time, no padding, autograd, numpy in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kroncc.errors import KronccError
from kroncc.rewrite.base import Calibration, SiteStats
from kroncc.run import meters
from kroncc.run.calibrate import collect
from kroncc.run.distance import task_loss
from kroncc.run.example_losses import Draws, example_losses

CLASSIFIER, MASKED, CAUSAL = (
    "AutoModelForSequenceClassification",
    "AutoModelForMaskedLM",
    "AutoModelForCausalLM",
)
MOMENTS, FISHER = Calibration(moments=True), Calibration(fisher=True)
LENGTHS = (9, 4, 7, 2, 6)
Batch = dict[str, Tensor]


def rows(seed: int = 0, labels: str = "") -> list[Batch]:
    """Five rows without padding, batches of one; `labels` of a class or of tokens."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in LENGTHS:
        ids = torch.randint(3, 100, (1, length), generator=generator)
        row = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if labels == "class":
            row["labels"] = torch.randint(0, 2, (1,), generator=generator)
        if labels == "tokens":
            row["labels"] = ids.masked_fill(torch.arange(length) % 2 == 1, -100)
        made.append(row)
    return made


def padded(singles: list[Batch], sizes: tuple[int, ...] = (3, 2)) -> Iterator[Batch]:
    """The rows in batches, padded on the right."""
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    remaining = list(singles)
    for size in sizes:
        part, remaining = remaining[:size], remaining[size:]
        width = max(row["input_ids"].shape[1] for row in part)
        yield {
            name: torch.cat(
                [
                    nn.functional.pad(row[name], (0, width - row[name].shape[1]), value=fill[name])
                    if row[name].dim() == 2
                    else row[name]
                    for row in part
                ]
            )
            for name in part[0]
        }


def inputs_of(model: Any, fqn: str, singles: list[Batch]) -> np.ndarray[Any, Any]:
    """All inputs of a module, row after row, as float64."""
    seen: list[Any] = []
    hook = model.get_submodule(fqn).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for row in singles:
            model(**row)
    hook.remove()
    return np.concatenate([x.double().numpy().reshape(-1, x.shape[-1]) for x in seen])


Loss = Callable[[Any, Batch], Tensor]


def by_labels(causal: bool = False) -> Loss:
    return lambda output, row: task_loss(output.logits, row["labels"], causal)


def fisher_of(model: Any, weight: nn.Parameter, singles: list[Batch], loss: Loss) -> Tensor:
    """The mean squared gradient of a weight, by one backward pass of autograd an example."""
    total = torch.zeros_like(weight, dtype=torch.float64)
    for row in singles:
        inputs = {name: value for name, value in row.items() if name != "labels"}
        (gradient,) = torch.autograd.grad(loss(model(**inputs), row), weight)
        total += gradient.double().square()
    return total / len(singles)


def saliency_of(model: Any, fqn: str, size: int, singles: list[Batch], loss: Loss) -> Tensor:
    """The mean absolute gradient of gates of 1 that multiply groups of a module's inputs."""
    module, total = model.get_submodule(fqn), 0
    for row in singles:
        gates: list[Tensor] = []

        def gated(_: nn.Module, args: tuple[Tensor], gates: list[Tensor] = gates) -> Tensor:
            if not gates:
                gates.append(torch.ones(args[0].shape[-1] // size, requires_grad=True))
            return args[0] * gates[0].repeat_interleave(size)

        hook = module.register_forward_pre_hook(gated)
        inputs = {name: value for name, value in row.items() if name != "labels"}
        (gradient,) = torch.autograd.grad(loss(model(**inputs), row), gates)
        hook.remove()
        total = total + gradient.double().abs()
    return total / len(singles)


def measured(
    model: Any, batches: Any, requests: Mapping[str, Calibration], task: str, seed: int = 0
) -> dict[str, SiteStats]:
    return collect(model, batches, requests, task=task, device="cpu", seed=seed)


def close(got: Tensor | None, want: Any, tolerance: float = 1e-5) -> None:
    assert got is not None
    assert got.dtype == torch.float32
    want = torch.as_tensor(want)
    assert got.shape == want.shape
    scale = want.abs().max()
    assert scale > 0
    assert (got.double() - want).abs().max() <= tolerance * scale


@pytest.mark.parametrize(
    ("family", "fqn"),
    [
        ("bert", "encoder.layer.0.attention.self.query"),
        ("bert", "encoder.layer.1.output.dense"),
        ("bert", "pooler.dense"),
        ("gpt2", "h.1.mlp.c_proj"),
        ("albert", "encoder.albert_layer_groups.0.albert_layers.0.ffn"),
    ],
)
def test_moments_are_those_of_all_real_inputs(tiny, family, fqn):
    model, singles = tiny(family), rows()
    x = inputs_of(model, fqn, singles)
    stats = measured(model, padded(singles), {fqn: MOMENTS}, "feature-extraction")[fqn]
    assert stats.count == len(x)
    close(stats.mean, x.mean(0))
    close(stats.moment, x.T @ x / len(x))
    assert stats.lookups is None
    assert stats.fisher is None
    assert stats.influence is None
    assert not stats.saliency


def test_maps_that_read_one_value_get_its_moments_each(tiny):
    model, singles = tiny("bert"), rows()
    names = [f"encoder.layer.{layer}.attention.self.{name}" for layer in (0, 1) for name in ("query", "key")]
    stats = measured(model, padded(singles), dict.fromkeys(names, MOMENTS), "feature-extraction")
    for name in names:
        x = inputs_of(model, name, singles)
        close(stats[name].moment, x.T @ x / len(x))


def test_a_module_that_a_pass_made_is_measured_too(tiny):
    model, singles, fqn = tiny("bert"), rows(), "encoder.layer.0.intermediate"
    old = model.get_submodule(fqn).dense
    model.get_submodule(fqn).dense = nn.Sequential(nn.Linear(32, 4, bias=False), nn.Linear(4, 64))
    x = inputs_of(model, f"{fqn}.dense", singles)
    asked = Calibration(moments=True, fisher=True)
    stats = measured(model, padded(singles), {f"{fqn}.dense": asked}, "feature-extraction")[f"{fqn}.dense"]
    close(stats.moment, x.T @ x / len(x))
    assert stats.fisher is None
    assert old.weight.requires_grad


def test_lookups_count_the_ids_of_real_positions(tiny):
    model, singles = tiny("bert"), rows()
    names = {part: f"embeddings.{part}_embeddings" for part in ("word", "position", "token_type")}
    stats = measured(model, padded(singles), dict.fromkeys(names.values(), MOMENTS), "feature-extraction")
    ids = np.concatenate([row["input_ids"].numpy().ravel() for row in singles])
    places = np.concatenate([np.arange(length) for length in LENGTHS])
    close(stats[names["word"]].lookups, np.bincount(ids, minlength=100).astype(float), 0)
    close(stats[names["position"]].lookups, np.bincount(places, minlength=40).astype(float), 0)
    close(stats[names["token_type"]].lookups, np.array([28.0, 0.0]), 0)
    assert stats[names["word"]].count == sum(LENGTHS)


@pytest.mark.parametrize(
    ("family", "auto", "task", "labels", "fqns"),
    [
        (
            "bert",
            CLASSIFIER,
            "text-classification",
            "class",
            [
                "bert.encoder.layer.0.attention.self.key",
                "bert.encoder.layer.1.output.dense",
                "bert.pooler.dense",
                "classifier",
                "bert.embeddings.word_embeddings",
            ],
        ),
        ("bert", MASKED, "fill-mask", "tokens", ["bert.embeddings.word_embeddings"]),
        ("gpt2", CAUSAL, "text-generation", "tokens", ["transformer.h.0.attn.c_attn", "transformer.wte"]),
        (
            "albert",
            CLASSIFIER,
            "text-classification",
            "class",
            ["albert.encoder.albert_layer_groups.0.albert_layers.0.attention.dense"],
        ),
    ],
)
def test_fisher_is_the_mean_squared_gradient_of_an_example(tiny, family, auto, task, labels, fqns):
    model, singles = tiny(family, auto), rows(labels=labels)
    loss = by_labels(task == "text-generation")
    stats = measured(model, padded(singles), dict.fromkeys(fqns, FISHER), task)
    for fqn in fqns:
        close(stats[fqn].fisher, fisher_of(model, model.get_parameter(f"{fqn}.weight"), singles, loss))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_fisher_in_chunks_is_the_same(tiny, monkeypatch):
    model, singles, fqn = tiny("bert", CLASSIFIER), rows(labels="class"), "bert.encoder.layer.0.output.dense"
    whole = measured(model, padded(singles), {fqn: FISHER}, "text-classification")[fqn].fisher
    monkeypatch.setattr(meters, "CHUNK", 1)
    close(measured(model, padded(singles), {fqn: FISHER}, "text-classification")[fqn].fisher, whole, 1e-6)


def test_fisher_of_a_table_that_all_examples_share(tiny):
    """BERT looks positions up once for the whole batch, so examples are told apart by running them alone."""
    model, singles, fqn = (
        tiny("bert", CLASSIFIER),
        rows(labels="class"),
        "bert.embeddings.position_embeddings",
    )
    stats = measured(model, padded(singles), {fqn: FISHER}, "text-classification")[fqn]
    weight = model.get_parameter(f"{fqn}.weight")
    close(stats.fisher, fisher_of(model, weight, singles, by_labels()))


@pytest.mark.parametrize(
    ("family", "auto", "task", "labels", "fqn", "size"),
    [
        (
            "bert",
            CLASSIFIER,
            "text-classification",
            "class",
            "bert.encoder.layer.0.attention.output.dense",
            8,
        ),
        ("bert", CLASSIFIER, "text-classification", "class", "bert.encoder.layer.1.output.dense", 1),
        ("bert", CLASSIFIER, "text-classification", "class", "bert.encoder.layer.1.attention.self.value", 1),
        (
            "albert",
            CLASSIFIER,
            "text-classification",
            "class",
            "albert.encoder.albert_layer_groups.0.albert_layers.0.attention.dense",
            8,
        ),
        ("gpt2", CAUSAL, "text-generation", "tokens", "transformer.h.0.attn.c_proj", 8),
    ],
)
def test_saliency_is_the_absolute_gradient_of_gates(tiny, family, auto, task, labels, fqn, size):
    model, singles = tiny(family, auto), rows(labels=labels)
    asked = Calibration(saliency=frozenset({size, 32}))
    stats = measured(model, padded(singles), {fqn: asked}, task)[fqn]
    loss = by_labels(task == "text-generation")
    close(stats.saliency[size], saliency_of(model, fqn, size, singles, loss))
    close(stats.saliency[32], saliency_of(model, fqn, 32, singles, loss))


def test_influence_is_how_far_a_layer_turns_its_input(tiny):
    model, singles, fqn = tiny("bert"), rows(), "encoder.layer.1"
    before, after = inputs_of(model, fqn, singles), []
    hook = model.get_submodule(fqn).register_forward_hook(
        lambda _, args, output: after.append(output[0] if isinstance(output, tuple) else output)
    )
    for row in singles:
        model(**row)
    hook.remove()
    y = np.concatenate([one.detach().double().numpy().reshape(-1, 32) for one in after])
    cos = (before * y).sum(1) / np.linalg.norm(before, axis=1) / np.linalg.norm(y, axis=1)
    stats = measured(model, padded(singles), {fqn: Calibration(influence=True)}, "feature-extraction")[fqn]
    assert stats.influence == pytest.approx((1 - cos).mean(), rel=1e-6)
    assert stats.count == sum(LENGTHS)


@pytest.mark.parametrize(
    ("auto", "task"),
    [
        (CLASSIFIER, "text-classification"),
        (MASKED, "fill-mask"),
        (CAUSAL, "text-generation"),
        ("AutoModel", "feature-extraction"),
    ],
)
def test_what_is_drawn_depends_on_the_seed_alone(tiny, auto, task):
    """Without labels: the same numbers in any batches, others by another seed, and those of the reference."""
    model, singles = tiny("bert", auto), rows()
    prefix = "" if auto == "AutoModel" else "bert."
    fqn = f"{prefix}encoder.layer.1.output.dense"
    found = [
        measured(model, padded(singles, sizes), {fqn: FISHER}, task)[fqn].fisher for sizes in ((3, 2), (1, 4))
    ]
    close(found[0], found[1])
    other = measured(model, padded(singles), {fqn: FISHER}, task, seed=1)[fqn].fisher
    assert not torch.allclose(other, found[0], rtol=1e-3)
    draws = Draws(0)

    def loss(output: Any, row: Batch) -> Tensor:
        draws.next(1)
        return example_losses(output, row, task, draws)[0]

    close(found[0], fisher_of(model, model.get_parameter(f"{fqn}.weight"), singles, loss))


def test_drawn_labels_give_the_true_fisher_information(tiny):
    """Of a head: E_y [(p - e_y) (p - e_y)] is p (1 - p), over labels y of the model's own distribution."""
    model, singles = tiny("bert", CLASSIFIER), rows()
    want = 0.0
    for row in singles:
        seen: list[Tensor] = []
        hook = model.classifier.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        p = model(**row).logits.detach().double().softmax(-1)[0]
        hook.remove()
        want = want + torch.outer(p * (1 - p), seen[0][0].detach().double().square())
    got = [
        measured(model, padded(singles), {"classifier": FISHER}, "text-classification", seed)[
            "classifier"
        ].fisher
        for seed in range(60)
    ]
    close(torch.stack(got).mean(0), want / len(singles), 0.15)


def test_a_projection_stands_for_all_entries_of_the_embedding(tiny):
    """On average over signs, the squared gradient is the sum over entries of the embedding."""
    model, singles, fqn = tiny("bert"), rows()[:2], "encoder.layer.1.output.dense"
    want = sum(
        fisher_of(
            model,
            model.get_parameter(f"{fqn}.weight"),
            singles,
            lambda output, row, entry=entry: output.last_hidden_state.mean(1)[0, entry],
        )
        for entry in range(32)
    )
    got = [
        measured(model, padded(singles, (2,)), {fqn: FISHER}, "feature-extraction", seed)[fqn].fisher
        for seed in range(80)
    ]
    mean = torch.stack(got).mean()
    assert mean.item() == pytest.approx(want.mean().item(), rel=0.2)


def test_a_head_of_one_output_is_regression(tiny):
    model, singles = tiny("bert", CLASSIFIER, num_labels=1), rows()
    for row, value in zip(singles, (0.5, -1.0, 2.0, 0.25, 3.0), strict=True):
        row["labels"] = torch.tensor([value])
    stats = measured(model, padded(singles), {"classifier": FISHER}, "text-classification")
    want = fisher_of(model, model.classifier.weight, singles, by_labels())
    close(stats["classifier"].fisher, want)
    for row in singles:
        del row["labels"]
    drawn = measured(model, padded(singles), {"classifier": FISHER}, "text-classification")
    assert (drawn["classifier"].fisher > 0).all()


def test_everything_at_once_equals_each_alone(tiny):
    model, singles = tiny("bert", CLASSIFIER), rows(labels="class")
    fqn, layer = "bert.encoder.layer.0.attention.output.dense", "bert.encoder.layer.0"
    asked = {
        fqn: Calibration(moments=True, fisher=True, saliency=frozenset({8})),
        layer: Calibration(influence=True),
        "bert.embeddings.word_embeddings": Calibration(moments=True, fisher=True),
    }
    stats = measured(model, padded(singles), asked, "text-classification")
    alone = measured(model, padded(singles), {fqn: MOMENTS}, "text-classification")[fqn]
    close(stats[fqn].moment, alone.moment, 1e-6)
    close(stats[fqn].saliency[8], saliency_of(model, fqn, 8, singles, by_labels()))
    close(stats[fqn].fisher, fisher_of(model, model.get_parameter(f"{fqn}.weight"), singles, by_labels()))
    assert stats[layer].influence is not None


@contextmanager
def raises(code: str) -> Iterator[None]:
    with pytest.raises(KronccError) as caught:
        yield
    assert caught.value.problems[0].code == code


def test_mistakes(tiny):
    model, fqn = tiny("bert"), "encoder.layer.0.output.dense"
    with raises("K605"):
        measured(model, [], {fqn: MOMENTS}, "feature-extraction")
    with raises("K418"):
        measured(model, padded(rows()), {fqn: Calibration(saliency=frozenset({7}))}, "feature-extraction")
    with torch.no_grad():
        model.get_submodule("encoder.layer.0.intermediate.dense").bias[3] = float("nan")
    with raises("K830"):
        measured(model, padded(rows()), {fqn: MOMENTS}, "feature-extraction")
