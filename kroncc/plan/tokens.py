"""Whose tokens every model reads: the models of a step get the same batches, so they must read the same."""

from __future__ import annotations

from collections.abc import Mapping

from kroncc.errors import PlanError
from kroncc.recipe.names import BASE
from kroncc.recipe.schema import Action, Compress, inputs_of
from kroncc.rewrite.base import TreePass
from kroncc.rewrite.registry import get_pass


def tokens_of(name: str, action: Action, known: Mapping[str, str]) -> str:
    """Return the step whose tokens the model of step `name` reads: the last that changed them, or `base`.

    `known` says it of the models before. Raises PlanError K764 where the models of the step differ in it.
    """
    read = {model: known.get(model, BASE) for model in inputs_of(action)}
    if len(set(read.values())) > 1:
        told = ", ".join(f"{model} those of {source!r}" for model, source in read.items())
        raise PlanError(
            f"the models of step {name!r} read different tokens: {told}",
            code="K764",
            expected="models with one tokenizer in a step",
            remedy="change the vocabulary first, and make teacher and student from that model",
        )
    if isinstance(action, Compress) and any(changes_tokens(call.name) for call in action.passes):
        return name
    return next(iter(read.values()), BASE)


def changes_tokens(name: str) -> bool:
    """Say whether a pass may change the tokenizer."""
    cls = get_pass(name)
    return issubclass(cls, TreePass) and cls.reads_tokenizer
