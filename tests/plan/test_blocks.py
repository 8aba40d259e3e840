"""A student's blocks pair up with its teacher's, or the plan says what differs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from torch import nn

from kroncc.errors import PlanError
from kroncc.graph.capture import capture
from kroncc.graph.model_graph import ModelGraph
from kroncc.graph.rewriter import Rewriter
from kroncc.plan.blocks import NOTHING, batch_count, block_steps, fitted_count, pair_blocks
from kroncc.recipe.schema import PassCall, Reconstruct, Scope
from kroncc.rewrite.pipeline import compress_graph


@pytest.fixture(scope="module")
def bert(tiny: Any) -> ModelGraph:
    return capture(tiny("bert"))


def _twin(graph: ModelGraph) -> ModelGraph:
    return graph.bind(copy.deepcopy(graph.model))


def _low_rank(*targets: str) -> list[PassCall]:
    return [PassCall(name="low-rank", scope=Scope(targets=list(targets)), options={"rank": 4})]


def test_embeddings_are_fitted_where_they_were_rewritten(bert: ModelGraph) -> None:
    student, teacher = _twin(bert), bert
    compress_graph(student, _low_rank("@ffn.*"))
    assert [(pair.name, pair.idle) for pair in pair_blocks(student, teacher)] == [
        ("embeddings", "not rewritten"),
        ("layer 0", ""),
        ("layer 1", ""),
        ("head", ""),
    ]
    assert fitted_count(student, teacher) == 3
    compress_graph(student, _low_rank("@embedding.word"))
    pair = pair_blocks(student, teacher)[0]
    assert pair.idle == ""
    assert "embeddings.LayerNorm.weight" in pair.trained


def test_every_parameter_is_trained_in_one_block(tiny: Any) -> None:
    """The head of GPT-2 is tied to the embeddings, whether these are fitted or not."""
    teacher = capture(tiny("gpt2", "AutoModelForCausalLM"))
    student = _twin(teacher)
    assert pair_blocks(student, teacher)[-1].idle == NOTHING
    compress_graph(student, _low_rank("@embedding.word"))
    pairs = pair_blocks(student, teacher)
    assert (pairs[0].idle, pairs[-1].idle) == ("", NOTHING)
    named = dict(student.module.named_parameters(remove_duplicate=False))
    trained = [id(named[name]) for pair in pairs for name in pair.trained]
    assert len(trained) == len(set(trained)) == len(list(student.model.parameters()))


def test_albert_is_one_block_fitted_after_every_call(tiny: Any) -> None:
    teacher = capture(tiny("albert", num_hidden_layers=3))
    pairs = pair_blocks(_twin(teacher), teacher)
    assert [pair.name for pair in pairs] == ["embeddings", "layers 0-2", "head"]
    assert len(pairs[1].student.ends) == len(pairs[1].teacher.ends) == 3


def test_packed_parts_are_not_trained(bert: ModelGraph) -> None:
    student, teacher = _twin(bert), bert
    for parameter in student.get("encoder.layer.0.intermediate.dense").parameters():
        parameter.requires_grad_(False)
    names = pair_blocks(student, teacher)[1].trained
    assert "encoder.layer.0.output.dense.weight" in names
    assert not [name for name in names if "intermediate" in name]
    student.model.requires_grad_(False)
    with pytest.raises(PlanError, match="K814"):
        fitted_count(student, teacher)


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        ({"num_hidden_layers": 3}, "K761", "the student has 3 layers and the teacher 2"),
        ({"hidden_size": 16}, "K762", "embeddings gives 16 values a position, the teacher's 32"),
    ],
)
def test_what_does_not_pair_up(
    tiny: Any, bert: ModelGraph, changes: dict[str, int], code: str, said: str
) -> None:
    with pytest.raises(PlanError) as caught:
        pair_blocks(capture(tiny("bert", **changes)), bert)
    (problem,) = caught.value.problems
    assert problem.code == code
    assert said in problem.message
    assert "`distill`, with `layers`" in problem.remedy


def test_a_model_without_layers_is_refused(bert: ModelGraph) -> None:
    student = _twin(bert)
    for node in student.graph.find_nodes(op="call_module"):
        if str(node.target).endswith(("sdpa", "dense")):
            node.replace_all_uses_with(node.args[0])
    with pytest.raises(PlanError, match=r"K760: no layer was found in the student.*at student"):
        pair_blocks(student, bert)


def test_a_head_without_a_target_is_left(tiny: Any) -> None:
    student = capture(tiny("bert", "AutoModelForSequenceClassification", num_labels=3))
    teacher = capture(tiny("bert", "AutoModelForSequenceClassification"))
    assert pair_blocks(student, teacher)[-1].idle == "the teacher has other outputs"
    Rewriter(student).swap("classifier", nn.Linear(32, 3))
    assert fitted_count(student, teacher) == 2


@pytest.mark.parametrize(
    ("rows", "epochs", "steps"), [(100, 3.0, 12), (5000, 3.0, 24), (100, 0.5, 2), (3, 0.1, 1)]
)
def test_steps_of_a_block(rows: int, epochs: float, steps: int) -> None:
    action = Reconstruct(student="a", teacher="b", data="d", rows=256, epochs=epochs, batch_size=32)
    assert block_steps(action, batch_count(action, rows)) == steps
