"""The terms of a distillation put together: layers, weights, projections, and what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kroncc.errors import DataError, PlanError
from kroncc.recipe.schema import LossSpec
from kroncc.run.losses import Losses, build_losses, shapes_of

B, L = 2, 4
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
BATCH = {"attention_mask": MASK, "labels": torch.tensor([0, 2])}


@dataclass
class Given:
    outputs: Mapping[str, Tensor]
    taps: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)


def given(layers: int = 2, width: int = 6, heads: int = 2, classes: int = 3, seed: int = 0) -> Given:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    return Given(
        {"logits": draw(B, classes)},
        {
            "hidden": [draw(B, L, width) for _ in range(layers)],
            "attention.scores": [draw(B, heads, L, L) for _ in range(layers)],
            "attention.values": [draw(B, heads, L, width // heads) for _ in range(layers)],
            "embeddings": [draw(B, L, width)],
            "sentence": [draw(B, width)],
        },
    )


def built(student: Given, teacher: Given | None, *specs: dict[str, Any], **options: Any) -> Losses:
    models = [LossSpec.model_validate(spec) for spec in specs]
    return build_losses(models, shapes_of(student), shapes_of(teacher) if teacher else None, **options)


def real_mse(first: Tensor, second: Tensor) -> Tensor:
    return ((first - second) ** 2)[MASK != 0].mean()


def test_layers_add_up_and_terms_are_weighted() -> None:
    student, teacher = given(), given(seed=1)
    losses = built(student, teacher, {"kind": "mse", "at": "hidden", "weight": 3.0}, {"kind": "task"})
    total, values = losses(student, teacher, BATCH)
    pairs = zip(student.taps["hidden"], teacher.taps["hidden"], strict=True)
    hidden = sum(real_mse(mine, theirs) for mine, theirs in pairs)
    task = F.cross_entropy(student.outputs["logits"], BATCH["labels"])
    torch.testing.assert_close(values["mse(hidden)"], hidden.detach())
    torch.testing.assert_close(values["task"], task.detach())
    torch.testing.assert_close(total, 3 * hidden + task)
    assert not list(losses.parameters())


def test_uniform_layers_of_a_deeper_teacher() -> None:
    student, teacher = given(2), given(4, seed=1)
    _, values = built(student, teacher, {"kind": "mse", "at": "hidden"})(student, teacher, BATCH)
    expected = sum(
        real_mse(student.taps["hidden"][at], teacher.taps["hidden"][to]) for at, to in ((0, 1), (1, 3))
    )
    torch.testing.assert_close(values["mse(hidden)"], expected.detach())


def test_a_schedule_moves_the_weight() -> None:
    student, teacher = given(), given(seed=1)
    spec = {"kind": "mse", "at": "embeddings", "weight": [[0.0, 2.0], [1.0, 0.0]]}
    losses = built(student, teacher, spec)
    totals = [losses(student, teacher, BATCH, progress)[0].item() for progress in (0.0, 0.5, 1.0)]
    value = losses(student, teacher, BATCH, 0.0)[1]["mse(embeddings)"].item()
    assert totals == pytest.approx([2 * value, value, 0.0])


def test_only_the_student_gets_gradients() -> None:
    student, teacher = given(), given(seed=1)
    specs = [
        {"kind": "kl", "temperature": 2.0},
        {"kind": "mse", "at": "attention.scores"},
        {"kind": "cosine", "at": "sentence"},
    ]
    total, values = built(student, teacher, *specs)(student, teacher, BATCH)
    total.backward()
    assert student.outputs["logits"].grad is not None
    assert all(layer.grad is not None for layer in student.taps["attention.scores"])
    assert teacher.outputs["logits"].grad is None
    assert all(layer.grad is None for layer in teacher.taps["attention.scores"])
    assert not any(value.requires_grad for value in values.values())


def test_widths_are_joined_by_maps_that_learn() -> None:
    student, teacher = given(width=6), given(width=8, seed=1)
    losses = built(student, teacher, {"kind": "mse", "at": "hidden"}, {"kind": "mse", "at": "embeddings"})
    assert [tuple(weight.shape) for weight in losses.parameters()] == [(8, 6)] * 3
    optimizer = torch.optim.SGD(losses.parameters(), lr=0.5)
    values = []
    for _ in range(50):
        optimizer.zero_grad()
        total, _ = losses(student, teacher, BATCH)
        total.backward()
        optimizer.step()
        values.append(total.item())
    assert values[-1] < 0.8 * values[0]


def test_projection_is_the_linear_map_that_it_says() -> None:
    student, teacher = given(1, width=6), given(1, width=8, seed=1)
    losses = built(student, teacher, {"kind": "mse", "at": "hidden"})
    (weight,) = losses.parameters()
    expected = real_mse(student.taps["hidden"][0] @ weight.T, teacher.taps["hidden"][0])
    torch.testing.assert_close(losses(student, teacher, BATCH)[0], expected)


def test_projections_follow_the_seed_and_leave_the_random_state_alone() -> None:
    student, teacher = given(width=6), given(width=8, seed=1)
    spec = {"kind": "mse", "at": "hidden"}
    before = torch.random.get_rng_state()
    weights = [next(built(student, teacher, spec, seed=seed).parameters()) for seed in (0, 0, 1)]
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_state_is_restored() -> None:
    student, teacher = given(width=6), given(width=8, seed=1)
    spec = {"kind": "mse", "at": "hidden"}
    first, second = built(student, teacher, spec, seed=0), built(student, teacher, spec, seed=1)
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(second(student, teacher, BATCH)[0], first(student, teacher, BATCH)[0])


def test_causal_losses_look_at_the_past_alone() -> None:
    student, teacher = given(1), given(1, seed=1)
    spec = {"kind": "mse", "at": "attention.scores"}
    value = built(student, teacher, spec, causal=True)(student, teacher, BATCH)[0]
    future = torch.ones(L, L, dtype=torch.bool).triu(1)
    changed = student.taps["attention.scores"][0].masked_fill(future, 9.0)
    again = Given(student.outputs, {**student.taps, "attention.scores": [changed]})
    torch.testing.assert_close(built(again, teacher, spec, causal=True)(again, teacher, BATCH)[0], value)
    assert built(again, teacher, spec)(again, teacher, BATCH)[0] > 1.5 * value


def test_causal_task_loss_shifts() -> None:
    logits = torch.randn(B, L, 5)
    student = Given({"logits": logits})
    labels = torch.tensor([[1, 2, 3, 4], [1, 0, -100, -100]])
    losses = built(student, None, {"kind": "task"}, causal=True)
    expected = F.cross_entropy(logits[:, :-1].reshape(-1, 5), labels[:, 1:].reshape(-1), ignore_index=-100)
    assert not losses.needs_teacher
    torch.testing.assert_close(losses(student, None, {"labels": labels})[0], expected)


@pytest.mark.parametrize(
    "spec",
    [
        {"kind": kind, "at": at}
        for kind in ("kl", "soft-ce", "mse", "mae", "cosine")
        for at in ("logits", "hidden", "attention.scores", "embeddings", "sentence")
    ],
)
def test_every_kind_at_every_tap(spec: dict[str, Any]) -> None:
    student, teacher = given(), given(seed=1)
    total, values = built(student, teacher, spec)(student, teacher, BATCH)
    total.backward()
    assert torch.isfinite(total)
    assert total > 0
    assert list(values) == [f"{spec['kind']}({spec['at']})"]


def test_labels_missing() -> None:
    student = given()
    with pytest.raises(DataError, match="K612"):
        built(student, None, {"kind": "task"})(student, None, {"attention_mask": MASK})


def test_heads_that_differ() -> None:
    with pytest.raises(PlanError, match="K741") as caught:
        built(given(heads=2), given(heads=4), {"kind": "mse", "at": "attention.scores"})
    assert "hidden" in caught.value.problems[0].remedy


def test_a_tap_that_the_run_does_not_give() -> None:
    student, teacher = given(), given(seed=1)
    losses = built(student, teacher, {"kind": "mse", "at": "hidden"})
    with pytest.raises(PlanError, match="K742"):
        losses(Given(student.outputs), teacher, BATCH)


def relation_by_hand(mine: Tensor, theirs: Tensor, heads: int) -> Tensor:
    """KL of the relations of each head and real token, one token at a time."""
    terms = []
    for row in range(B):
        real = int(MASK[row].sum())
        sides = []
        for value in (mine, theirs):
            flat = torch.cat(list(value[row]), dim=-1)[:real]  # [length, width], heads side by side
            parts = flat.split(flat.shape[-1] // heads, dim=-1)
            sides.append([(part @ part.T / part.shape[-1] ** 0.5).softmax(-1) for part in parts])
        for one, other in zip(*sides, strict=True):
            terms += [(q * (q.log() - p.log())).sum() for p, q in zip(one, other, strict=True)]
    return torch.stack(terms).mean()


@pytest.mark.parametrize("heads", [None, 1, 3])
def test_relation_compares_how_tokens_relate(heads: int | None) -> None:
    student, teacher = given(heads=2), given(heads=3, width=12, seed=1)
    spec = {"kind": "relation", "at": "attention.values", "layers": "last", "heads": heads}
    losses = built(student, teacher, spec)
    assert not list(losses.parameters())
    _, values = losses(student, teacher, BATCH)
    expected = relation_by_hand(
        student.taps["attention.values"][-1], teacher.taps["attention.values"][-1], heads or 3
    )
    torch.testing.assert_close(values["relation(attention.values)"], expected.detach())


def test_relation_of_equal_values_is_zero_and_padding_has_no_say() -> None:
    student = given(heads=2)
    other = Given(student.outputs, {**student.taps, "attention.values": []})
    changed = [value.detach().clone() for value in student.taps["attention.values"]]
    for value in changed:
        value[1, :, 2:] = 99.0
    other.taps["attention.values"] = changed  # type: ignore[index]
    total, _ = built(student, other, {"kind": "relation", "at": "attention.values"})(student, other, BATCH)
    assert total.item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("spec", "code", "match"),
    [
        ({"kind": "relation", "at": "attention.values", "heads": 4}, "K741", "divides both widths"),
        ({"kind": "relation", "at": "attention.scores"}, "K748", "vectors"),
        ({"kind": "mse", "at": "attention.values"}, "K741", "relation"),
    ],
)
def test_relations_that_do_not_compare(spec: dict[str, Any], code: str, match: str) -> None:
    student, teacher = given(heads=2), given(heads=2, width=10, seed=1)
    with pytest.raises(PlanError, match=match) as caught:
        built(student, teacher, spec)
    assert caught.value.problems[0].code == code
