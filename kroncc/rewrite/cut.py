"""Make a model narrower: cut the same units out of every tensor that has them, on meta or with weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kroncc.graph.axes import Span

FOLLOWED = (nn.Linear, nn.Embedding, nn.Conv2d, nn.LayerNorm, nn.RMSNorm, Conv1D)
"""Modules whose attributes follow from their own tensors."""


class Narrowed(BaseModel):
    """What becomes of one module: new sizes of its tensors (None: as it was), new values of attributes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tensors: dict[str, tuple[int | None, ...]] = {}
    attributes: dict[str, int | tuple[int, ...]] = {}


@dataclass(frozen=True)
class Cut:
    """`keep` of the `size` units at `spans` stay; `units` says which, in order, where it is known."""

    spans: tuple[Span, ...]
    size: int
    keep: int
    units: tuple[int, ...] | None = None


def narrowed(model: nn.Module, cuts: Iterable[Cut]) -> dict[str, Narrowed]:
    """Return the new sizes of every module that holds a tensor with a cut dimension, by FQN, in model order.

    A module with several names has the first one.
    """
    sizes: dict[str, dict[str, list[int | None]]] = {}
    held = {
        f"{fqn}.{name}".lstrip("."): (fqn, name, tensor.dim())
        for fqn, module in model.named_modules()
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]
        if tensor is not None
    }
    for cut in cuts:
        places = [(span, name) for span in cut.spans for name in span.names if name in held]
        for span, path in places:
            fqn, name, rank = held[path]
            shape = sizes.setdefault(fqn, {}).setdefault(name, [None] * rank)
            assert shape[span.dim] is None, f"{path} is cut twice in dimension {span.dim}"
            shape[span.dim] = span.outer * cut.keep * span.inner
    return {
        fqn: Narrowed(tensors={name: tuple(shape) for name, shape in sizes[fqn].items()})
        for fqn, _ in model.named_modules()
        if fqn in sizes
    }


def apply_cuts(
    model: nn.Module,
    sites: Sequence[str],
    modules: Sequence[Narrowed],
    choice: Sequence[Cut] | None = None,
) -> None:
    """Narrow the modules `sites` of `model` in place, each as its entry in `modules` says.

    With `choice`, which names the units that stay, tensors keep their values; without, only sizes count.
    Modules that this model lacks (of another head) are passed over. Ties stay.
    """
    chosen = _by_name(choice or ())
    made: dict[int, Tensor] = {}
    originals: list[Tensor] = []  # held, so that no new tensor gets the id of an old one
    names = dict(model.named_modules(remove_duplicate=False))
    for fqn, change in zip(sites, modules, strict=True):
        module = names.get(fqn)
        if module is None:
            continue
        for name, shape in change.tensors.items():
            old = getattr(module, name, None)
            if old is None:
                continue
            if id(old) not in made:
                originals.append(old)
                made[id(old)] = _cut(old, shape, chosen.get(f"{fqn}.{name}".lstrip(".")))
            setattr(module, name, made[id(old)])
        _follow_sizes(module)
        for name, value in change.attributes.items():
            setattr(module, name, value)


def _by_name(choice: Iterable[Cut]) -> dict[str, list[tuple[Span, tuple[int, ...]]]]:
    found: dict[str, list[tuple[Span, tuple[int, ...]]]] = {}
    for cut in choice:
        for span in cut.spans:
            for name in span.names:
                found.setdefault(name, []).append((span, cut.units or ()))
    return found


def _cut(
    old: Tensor, shape: Sequence[int | None], places: Sequence[tuple[Span, tuple[int, ...]]] | None
) -> Tensor:
    """Return a narrower tensor of the same kind: the chosen units of `old`, or only their sizes."""
    new = [size if given is None else given for size, given in zip(old.shape, shape, strict=True)]
    value = old.data.new_empty(new)
    if places is not None and not old.is_meta:
        value = old.data
        for span, units in places:
            value = keep_units(value, span, units)
    if not isinstance(old, nn.Parameter):
        return value
    return nn.Parameter(value.contiguous(), requires_grad=old.requires_grad)


def keep_units(value: Tensor, span: Span, units: Sequence[int]) -> Tensor:
    """Return `value` with only `units` of the `span.size` that its dimension `span.dim` is made of."""
    before, after = value.shape[: span.dim], value.shape[span.dim + 1 :]
    apart = value.reshape(*before, span.outer, span.size, span.inner, *after)
    picked = apart.index_select(span.dim + 1, torch.tensor(list(units), device=value.device))
    return picked.reshape(*before, span.outer * len(units) * span.inner, *after)


def _follow_sizes(module: nn.Module) -> None:
    """Set the attributes that tell the sizes of a module's own tensors."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, Conv1D):
        module.nx, module.nf = module.weight.shape
    elif isinstance(module, nn.Conv2d):
        module.out_channels, module.in_channels = module.weight.shape[:2]
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm) and module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)


def with_attributes(
    modules: Mapping[str, Narrowed], attributes: Mapping[tuple[str, str], int | tuple[int, ...]]
) -> dict[str, Narrowed]:
    """Return `modules` with new values of attributes, given by module and name, added."""
    made = dict(modules)
    for (fqn, name), value in attributes.items():
        old = made.get(fqn, Narrowed())
        made[fqn] = old.model_copy(update={"attributes": {**old.attributes, name: value}})
    return made
