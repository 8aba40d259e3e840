"""What the passes over whole layers share: which stacks a call means, cutting a stack to some layers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from torch import nn

from kroncc.api import (
    LayerStack,
    ModelGraph,
    PassError,
    Site,
    config_of,
    find_stacks,
    has_cache,
    lenders,
    watch_call,
)

COUNTS = re.compile(r"(layer|block)_?(idx|id|index|num|number)")  # attributes that say which layer this is
Kept = tuple[int, ...]
Way = Literal["top", "bottom", "alternate", "importance"]  # which layers go


def stacks_of(graph: ModelGraph, sites: Sequence[Site], kind: str) -> list[LayerStack]:
    """Return the stacks that hold a site, all of the model's where no targets are given.

    Raises PassError K490: there is none.
    """
    stacks = find_stacks(graph)
    names = [name for site in sites for name in (site.fqn, *site.tied)]
    meant = [stack for stack in stacks if not names or any(stack.index(name) is not None for name in names)]
    if meant:
        return meant
    if not stacks:
        raise PassError(
            f"{type(graph.model).__name__} holds its layers in no list: {kind} has nothing to work on",
            code="K490",
            expected="an nn.ModuleList with one layer an entry (not one module that is called repeatedly)",
            remedy="take this pass out of the recipe",
        )
    raise PassError(
        f"{kind}: the targets lie in no stack of layers",
        code="K490",
        expected=f"modules of {', '.join(stack.fqn for stack in stacks)}",
        remedy=f"target {stacks[0].fqn}.**, or leave `targets` out to mean all stacks",
    )


def per_stack(
    given: Sequence[int] | Sequence[Sequence[int]], stacks: Sequence[LayerStack], what: str
) -> list[Kept]:
    """Return the layers listed for each stack: one list for all, or a list of lists, one a stack.

    Raises PassError K491 (as many lists as stacks) and K492 (no such layer).
    """
    flat = tuple(one for one in given if isinstance(one, int))
    lists = [tuple(one) for one in given if not isinstance(one, int)] or [flat] * len(stacks)
    if len(lists) != len(stacks):
        raise PassError(
            f"{what}: {len(lists)} lists of layers for {len(stacks)} stacks",
            code="K491",
            expected=f"one list each for {', '.join(stack.fqn for stack in stacks)}",
            remedy="give one flat list for all, or choose stacks by `targets`",
        )
    for stack, layers in zip(stacks, lists, strict=True):
        beyond = [layer for layer in layers if layer >= stack.size]
        if beyond:
            raise PassError(
                f"{what}: {stack.fqn} has no layer {beyond[0]}",
                code="K492",
                expected=f"layers from 0 to {stack.size - 1}",
                remedy="mend the list",
            )
    return lists


def choose(
    graph: ModelGraph, stack: LayerStack, count: int, way: Way, influence: Sequence[float] | None = None
) -> Kept:
    """Return `count` layers of `stack` that stay; those that lend values to others are always among them.

    `importance` goes by `influence`, one number a layer; without it (while planning) the first ones stay.
    Raises PassError K495 (more than there are).
    """
    if count > stack.size:
        raise too_few(stack, count)
    if way == "importance" and influence is None:
        return tuple(range(count))
    fixed = lenders(graph, stack)
    order = _order(stack.size, count, way, influence or ())
    return tuple(sorted(sorted(order, key=lambda layer: layer not in fixed)[:count]))


def _order(size: int, count: int, way: Way, influence: Sequence[float]) -> list[int]:
    """Return all layers, those that should stay first."""
    if way == "importance":
        return sorted(range(size), key=lambda layer: (-influence[layer], layer))
    if way == "top":
        return list(range(size))
    if way == "bottom":
        return list(reversed(range(size)))
    stay = [place * size // count for place in range(count)]
    return [*stay, *(layer for layer in range(size) if layer not in stay)]


def too_few(stack: LayerStack, count: int) -> PassError:
    """Return the error for a stack that cannot keep `count` layers."""
    return PassError(
        f"{stack.fqn} has {stack.size} layers; {count} cannot stay",
        code="K495",
        expected=f"1 to {stack.size} layers",
        remedy="mend the number or list of layers, or choose stacks by `targets`",
    )


def check_kept(graph: ModelGraph, stack: LayerStack, kept: Kept) -> None:
    """Refuse layers that cannot stand without those that are dropped. Raises PassError K493, K494."""
    missing = sorted(lenders(graph, stack) - set(kept))
    if missing:
        raise PassError(
            f"{stack.entry(missing[0])} computes values that other layers read: it cannot be dropped",
            code="K493",
            expected=f"layer {missing[0]} of {stack.fqn} among those that stay",
            remedy=f"keep layer {missing[0]} in place of another one",
        )
    for name, values in _by_place(graph, stack).items():
        moved = [at for at, layer in enumerate(kept) if values[layer] != values[at]]
        if moved:
            at = moved[0]
            raise PassError(
                f"layer {kept[at]} of {stack.fqn} is {values[kept[at]]!r} in {name} of the config, and would "
                f"stand at place {at}, which {type(graph.model).__name__} runs as {values[at]!r}",
                code="K494",
                expected=f"layers of these kinds: {', '.join(map(str, values[: len(kept)]))}",
                remedy="list layers of the right kinds under `keep`, such as whole periods from the start",
            )


def _by_place(graph: ModelGraph, stack: LayerStack) -> Mapping[str, Sequence[object]]:
    """Return the config's lists that settle what the layer at a place is: read by the loop, or by a cache."""
    config = config_of(graph.model, stack)
    lists = {
        name: values
        for name, values in vars(config or object).items()
        if isinstance(values, list | tuple) and len(values) == stack.size and len(set(map(str, values))) > 1
    }
    if not lists:
        return {}
    seen = watch_call(graph, stack)
    read = lists.keys() if seen is None else seen.by_place.keys()
    caches = {"layer_types"} if has_cache(graph.model, stack) else set()
    return {name: values for name, values in lists.items() if name in {*read, *caches}}


def cut(model: nn.Module, fqn: str, kept: Kept) -> None:
    """Keep only the layers `kept` of the list at `fqn`, and number them anew where they know their place."""
    stack = model.get_submodule(fqn)
    assert isinstance(stack, nn.ModuleList)
    numbers = _numbers(list(stack))
    layers = [stack[layer] for layer in kept]
    for (path, name), first in numbers.items():
        for place, layer in enumerate(layers):
            setattr(layer.get_submodule(path), name, first + place)
    del stack[:]
    stack.extend(layers)


def _numbers(layers: Sequence[nn.Module]) -> dict[tuple[str, str], int]:
    """Return the attributes (path in a layer, name) that count the layers, with the first one's value.

    A decoder finds its part of the cache by them, so that they must go on counting from the same number.
    """
    parts = [dict(layer.named_modules()) for layer in layers]
    found = {}
    for path, part in parts[0].items():
        for name, first in vars(part).items():
            if type(first) is not int or not COUNTS.search(name):
                continue
            values = [getattr(other.get(path), name, None) for other in parts]
            if values == list(range(first, first + len(layers))):
                found[path, name] = first
    return found
