"""A recipe as it is written: from the resolved model back to the form that files have."""

from __future__ import annotations

from typing import Any

from kroncc.recipe.schema import STEP_KINDS, Recipe

_CALLS = ("passes", "during")  # lists of - NAME: {...}, a pass each


def as_written(recipe: Recipe) -> dict[str, Any]:
    """Return plain data that the loader reads as `recipe`; what is at its default is left out."""
    whole = recipe.model_dump(mode="json", exclude_defaults=True)
    kinds = {cls: kind for kind, cls in STEP_KINDS.items()}
    steps = {
        name: {kinds[type(action)]: _body(whole["steps"][name])} for name, action in recipe.steps.items()
    }
    return {**whole, "steps": steps}


def _body(body: dict[str, Any]) -> dict[str, Any]:
    calls = {key: [_call(call) for call in body[key]] for key in _CALLS if key in body}
    losses = {"losses": [_loss(loss) for loss in body["losses"]]} if "losses" in body else {}
    return {**body, **calls, **losses}


def _call(call: dict[str, Any]) -> dict[str, Any]:
    return {call["name"]: {**call["scope"], **call["options"]}}


def _loss(loss: dict[str, Any]) -> dict[str, Any]:
    return {loss["kind"]: {key: value for key, value in loss.items() if key != "kind"}}
