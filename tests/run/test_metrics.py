"""Figures of an evaluation against direct formulas, however the rows are batched."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kroncc.errors import DataError, PlanError
from kroncc.plan.measures import FITS, check_metrics
from kroncc.recipe.names import FIDELITY_PARTS, METRICS
from kroncc.run.metrics import Evaluation, Outputs

ROWS = 60


def logits_of(classes: int, seed: int = 0, rows: int = ROWS) -> Tensor:
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))


def evaluate(
    metrics: list[str],
    task: str,
    outputs: dict[str, Tensor],
    batch: dict[str, Tensor],
    reference: dict[str, Tensor] | None = None,
    size: int = 7,
) -> dict[str, float]:
    evaluation = Evaluation(metrics, task, data="mine")
    count = len(next(iter(outputs.values())))
    for start in range(0, count, size):
        rows = slice(start, start + size)
        parts = [
            {name: value[rows] for name, value in side.items()} for side in (outputs, batch, reference or {})
        ]
        evaluation.update(parts[0], parts[1], parts[2] if reference is not None else None)
    return evaluation.result()


def confusion(
    predicted: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], count: int
) -> np.ndarray[Any, Any]:
    table = np.zeros((count, count))
    np.add.at(table, (labels, predicted), 1)
    return table


@pytest.mark.parametrize("classes", [2, 4])
def test_classes_against_the_confusion_matrix(classes: int) -> None:
    logits = logits_of(classes)
    labels = torch.randint(0, classes, (ROWS,), generator=torch.Generator().manual_seed(1))
    figures = evaluate(
        ["accuracy", "f1", "mcc"], "text-classification", {"logits": logits}, {"labels": labels}
    )
    table = confusion(logits.argmax(-1).numpy(), labels.numpy(), classes)
    f1 = 2 * table.diagonal() / (table.sum(0) + table.sum(1))
    total, right = table.sum(), table.trace()
    predicted, true = table.sum(0), table.sum(1)
    mcc = (right * total - predicted @ true) / math.sqrt(
        (total**2 - predicted @ predicted) * (total**2 - true @ true)
    )
    expected = {"accuracy": right / total, "f1": f1[1] if classes == 2 else f1.mean(), "mcc": mcc}
    assert figures == pytest.approx(expected)


def test_numbers_against_numpy() -> None:
    logits = logits_of(1)
    labels = (logits[:, 0] + 0.5 * logits_of(1, seed=2)[:, 0]).exp()
    figures = evaluate(["pearson", "spearman"], "text-classification", {"logits": logits}, {"labels": labels})
    ranks = [np.argsort(np.argsort(values)) for values in (logits[:, 0].numpy(), labels.numpy())]
    assert figures["pearson"] == pytest.approx(np.corrcoef(logits[:, 0], labels)[0, 1], rel=1e-5)
    assert figures["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])


@pytest.mark.parametrize("task", ["fill-mask", "text-generation"])
def test_tokens_against_a_loop(task: str) -> None:
    logits = torch.randn(6, 5, 11, dtype=torch.float64)
    labels = torch.randint(0, 11, (6, 5))
    labels[torch.rand(6, 5) < 0.4] = -100
    labels[0, :2] = 3
    figures = evaluate(["accuracy", "perplexity"], task, {"logits": logits}, {"labels": labels}, size=4)
    losses, right = [], []
    for row in range(6):
        for at in range(5):
            wanted = at + (task == "text-generation")
            if wanted < 5 and labels[row, wanted] >= 0:
                probabilities = np.exp(logits[row, at].numpy()) / np.exp(logits[row, at].numpy()).sum()
                losses.append(-np.log(probabilities[labels[row, wanted]]))
                right.append(probabilities.argmax() == labels[row, wanted].item())
    assert figures["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert figures["accuracy"] == pytest.approx(np.mean(right))


def test_perplexity_of_a_uniform_model_is_its_vocabulary() -> None:
    figures = evaluate(
        ["perplexity"],
        "text-generation",
        {"logits": torch.zeros(2, 5, 11)},
        {"labels": torch.ones(2, 5).long()},
    )
    assert figures["perplexity"] == pytest.approx(11)


def test_fidelity_of_a_classifier_needs_no_labels() -> None:
    mine, theirs = logits_of(3), logits_of(3, seed=5)
    figures = evaluate(["fidelity"], "text-classification", {"logits": mine}, {}, {"logits": theirs})
    p, q = (np.exp(side) / np.exp(side).sum(-1, keepdims=True) for side in (theirs.numpy(), mine.numpy()))
    assert figures == pytest.approx(
        {
            "fidelity.agreement": (p.argmax(-1) == q.argmax(-1)).mean(),
            "fidelity.kl": (p * np.log(p / q)).sum(-1).mean(),
        },
        rel=1e-5,
    )


def test_fidelity_of_a_language_model_leaves_padding_out() -> None:
    mine, theirs = torch.randn(4, 5, 7), torch.randn(4, 5, 7)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    figures = [
        evaluate(
            ["fidelity"],
            "text-generation",
            {"logits": torch.where(mask[:, :, None] > 0, mine, filler)},
            {"attention_mask": mask},
            {"logits": theirs},
            size=2,
        )
        for filler in (0.0, math.nan)
    ]
    same = mine.argmax(-1) == theirs.argmax(-1)
    assert figures[0]["fidelity.agreement"] == pytest.approx(same[mask > 0].float().mean().item())
    assert figures[0] == figures[1]


def test_fidelity_of_a_score_is_its_rank_correlation() -> None:
    scores = logits_of(1)
    figures = evaluate(["fidelity"], "text-classification", {"logits": scores}, {}, {"logits": scores.exp()})
    assert figures == pytest.approx({"fidelity.rank_correlation": 1.0})


def test_fidelity_of_embeddings() -> None:
    hidden, other = torch.randn(20, 5, 8), torch.randn(20, 5, 8)
    mask = (torch.arange(5)[None] < torch.randint(1, 6, (20, 1))).long()
    batch = {"attention_mask": mask}
    figures = evaluate(
        ["fidelity"], "feature-extraction", {"last_hidden_state": hidden}, batch, {"last_hidden_state": other}
    )
    means = [
        np.stack([side[row, : int(mask[row].sum())].double().numpy().mean(0) for row in range(20)])
        for side in (hidden, other)
    ]
    units = [mean / np.linalg.norm(mean, axis=1, keepdims=True) for mean in means]
    pairs = [[unit[i] @ unit[j] for i in range(20) for j in range(i)] for unit in units]
    ranks = [np.argsort(np.argsort(values)) for values in pairs]
    assert figures["fidelity.cosine"] == pytest.approx((units[0] * units[1]).sum(-1).mean(), rel=1e-5)
    assert figures["fidelity.rank_correlation"] == pytest.approx(np.corrcoef(*ranks)[0, 1], rel=1e-5)


def test_a_model_is_faithful_to_itself() -> None:
    hidden = torch.randn(20, 5, 8)
    batch = {"attention_mask": torch.ones(20, 5)}
    outputs = {"last_hidden_state": hidden}
    figures = evaluate(["fidelity"], "feature-extraction", outputs, batch, outputs)
    assert figures == pytest.approx({"fidelity.cosine": 1.0, "fidelity.rank_correlation": 1.0})
    logits = {"logits": logits_of(3)}
    figures = evaluate(["fidelity"], "text-classification", logits, {}, logits)
    assert figures == pytest.approx({"fidelity.agreement": 1.0, "fidelity.kl": 0.0}, abs=1e-6)


def test_the_sentence_tap_is_read_where_there_is_one() -> None:
    evaluation = Evaluation(["fidelity"], "feature-extraction")
    assert evaluation.taps == ("sentence",)
    sentence = torch.randn(6, 4)
    given = Outputs({"last_hidden_state": torch.zeros(6, 3, 4)}, {"sentence": [sentence]})
    evaluation.update(given, {"attention_mask": torch.ones(6, 3)}, Outputs({"sentence": -sentence}))
    assert evaluation.result()["fidelity.cosine"] == pytest.approx(-1.0)
    assert Evaluation(["accuracy", "fidelity"], "text-classification").taps == ()


def test_rows_of_batches_do_not_matter() -> None:
    outputs, reference = {"logits": logits_of(3)}, {"logits": logits_of(3, seed=1)}
    batch = {"labels": torch.randint(0, 3, (ROWS,))}
    metrics = ["accuracy", "f1", "mcc", "fidelity"]
    runs = [evaluate(metrics, "text-classification", outputs, batch, reference, size) for size in (1, 13, 60)]
    assert runs[0] == pytest.approx(runs[1])
    assert runs[0] == pytest.approx(runs[2])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_outputs_that_are_not_finite_have_no_figure(value: float) -> None:
    logits = logits_of(3)
    logits[3, 1] = value
    outputs, batch = {"logits": logits}, {"labels": torch.zeros(ROWS).long()}
    figures = evaluate(
        ["accuracy", "f1", "mcc", "fidelity"], "text-classification", outputs, batch, {"logits": logits_of(3)}
    )
    assert all(math.isnan(figure) for figure in figures.values())
    tokens = torch.zeros(2, 4, 3)
    tokens[0, 1] = value
    labels = {"labels": torch.ones(2, 4).long()}
    figures = evaluate(["accuracy", "perplexity"], "fill-mask", {"logits": tokens}, labels)
    assert all(math.isnan(figure) for figure in figures.values())


def test_constant_scores_have_no_correlation() -> None:
    batch = {"labels": torch.rand(ROWS)}
    figures = evaluate(["pearson", "spearman"], "text-classification", {"logits": torch.ones(ROWS, 1)}, batch)
    assert all(math.isnan(figure) for figure in figures.values())


def test_labels_that_do_not_fit_the_head() -> None:
    with pytest.raises(DataError, match=r"K611.*'mine'.*largest label is 2.*2 outputs") as caught:
        evaluate(
            ["accuracy"], "text-classification", {"logits": logits_of(2)}, {"labels": torch.full((ROWS,), 2)}
        )
    assert "labels: 3" in caught.value.problems[0].remedy


@pytest.mark.parametrize(
    ("metric", "classes", "labels", "code"),
    [
        ("accuracy", 2, torch.rand(ROWS), "K618"),
        ("accuracy", 1, torch.rand(ROWS), "K623"),
        ("pearson", 2, torch.ones(ROWS).long(), "K623"),
    ],
)
def test_metrics_that_do_not_fit_the_labels(metric: str, classes: int, labels: Tensor, code: str) -> None:
    with pytest.raises(DataError, match=code):
        evaluate([metric], "text-classification", {"logits": logits_of(classes)}, {"labels": labels})


def test_labels_missing() -> None:
    with pytest.raises(DataError, match="K612"):
        evaluate(["accuracy"], "text-classification", {"logits": logits_of(2)}, {})


def test_no_rows() -> None:
    with pytest.raises(DataError, match="K605"):
        Evaluation(["fidelity"], "feature-extraction").result()


def test_fidelity_without_a_reference() -> None:
    with pytest.raises(PlanError, match="K753"):
        evaluate(["fidelity"], "text-classification", {"logits": logits_of(2)}, {})


def test_fidelity_of_other_labels() -> None:
    with pytest.raises(PlanError, match="K754"):
        evaluate(["fidelity"], "text-classification", {"logits": logits_of(2)}, {}, {"logits": logits_of(3)})


@pytest.mark.parametrize(
    ("metric", "task", "code"),
    [
        ("acuracy", "text-classification", "K750"),
        ("perplexity", "text-classification", "K751"),
        ("accuracy", "feature-extraction", "K751"),
        ("f1", "fill-mask", "K751"),
        ("accuracy", "question-answering", "K752"),
    ],
)
def test_metrics_that_do_not_fit_the_task(metric: str, task: str, code: str) -> None:
    with pytest.raises(PlanError, match=code):
        check_metrics([metric], task)


def test_names_are_those_of_the_recipe() -> None:
    assert {metric for metrics in FITS.values() for metric in metrics} == set(METRICS) - {"latency"}
    seen = set()
    for task, outputs in (("text-classification", logits_of(2)), ("text-classification", logits_of(1))):
        seen |= set(evaluate(["fidelity"], task, {"logits": outputs}, {}, {"logits": outputs}))
    hidden = {"last_hidden_state": torch.randn(4, 3, 2)}
    seen |= set(evaluate(["fidelity"], "feature-extraction", hidden, {}, hidden))
    assert seen == {f"fidelity.{part}" for part in FIDELITY_PARTS}
