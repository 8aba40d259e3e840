"""Weights that several modules share: find them, make them, and tell transformers about them.

transformers ties by names: `all_tied_weights_keys` maps target to source for loading, `_tied_weights_keys`
says which names to leave out when saving. A rewrite changes the names: both are then written anew.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from kroncc.graph.model_graph import is_whole


def tied_modules(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return for every leaf module that shares a Parameter the FQNs of the others, in model order.

    A module that a pass made to be tied as a whole counts as a leaf.
    """
    owners: dict[int, list[str]] = defaultdict(list)
    for fqn, module in _leaves(model, ""):
        for parameter in {id(p): p for p in module.parameters()}.values():
            owners[id(parameter)].append(fqn)
    tied: dict[str, tuple[str, ...]] = {}
    for group in owners.values():
        for fqn in group if len(group) > 1 else ():
            others = (name for name in group if name != fqn)
            tied[fqn] = tuple(dict.fromkeys((*tied.get(fqn, ()), *others)))
    return tied


def _leaves(
    module: nn.Module, fqn: str, seen: set[nn.Module] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    seen = set() if seen is None else seen
    if module in seen:
        return
    seen.add(module)
    if is_whole(module) or next(module.children(), None) is None:
        yield fqn, module
        return
    for name, child in module.named_children():
        yield from _leaves(child, f"{fqn}.{name}".lstrip("."), seen)


def tie_declared(model: Any) -> None:
    """Share the Parameters that the model's class and config declare as tied.

    `from_pretrained` builds its skeleton with ties switched off; passes must see the model as it will be.
    """
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        owner, _, name = target.rpartition(".")
        setattr(model.get_submodule(owner), name, model.get_parameter_or_buffer(source))


def declare_ties(model: nn.Module) -> None:
    """Write the names of all shared Parameters of `model` where transformers looks for them."""
    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        ties = _ties(module)
        if ties != module.all_tied_weights_keys:
            module.all_tied_weights_keys = ties
            module._tied_weights_keys = _patterns(module, ties)


def _ties(model: PreTrainedModel) -> dict[str, str]:
    """Return target -> source for all Parameters of `model` that have several names."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    sources = {_owner(name) for name in model.all_tied_weights_keys.values()}
    ties: dict[str, str] = {}
    for group in names.values():
        # the module that gave its weight before gives its factors now: names stay those of the base model
        source = next((name for name in group if _owner(name) in sources), group[0])
        ties |= {name: source for name in group if name != source}
    return ties


def _patterns(model: PreTrainedModel, ties: dict[str, str]) -> dict[str, str]:
    """Return `ties` as the prefix regexes that transformers matches names by."""
    everything = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    everything += [name for name, _ in model.named_buffers(remove_duplicate=False)]
    return {_pattern(target, everything): _pattern(source, everything) for target, source in ties.items()}


def _pattern(name: str, everything: list[str]) -> str:
    """Return a pattern that matches `name` alone: plain where that suffices, as FSDP reads it as a name."""
    return name if list(_prefixed(name, everything)) == [name] else re.escape(name) + "$"


def _prefixed(pattern: str, names: list[str]) -> Iterator[str]:
    return (name for name in names if re.match(pattern, name))


def _owner(name: str) -> str:
    return name.rpartition(".")[0]
