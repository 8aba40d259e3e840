"""The pass `share-layers`: several layers of a stack have one set of weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from kroncc.api import LayerStack, ModelGraph, PassError, Resolved, Site, SiteStats, Skip, TreePass
from kroncc_passes._stacks import per_stack, stacks_of

Count = Annotated[int, Field(gt=0, strict=True)]
Layer = Annotated[int, Field(ge=0, strict=True)]
Group = Annotated[tuple[Layer, ...], Field(min_length=1)]
Groups = Annotated[tuple[Group, ...], Field(min_length=1)]


class ShareLayers(TreePass):
    """Give groups of layers one set of weights.

    ## What it does

    The layers of a group hold the same Parameters: they are stored once, and training sums the gradients of
    all layers that use them. Each layer remains a module of its own, called at its own place, so that caches
    of decoders, taps and targets by layer work as before. `groups: 1` (the default) makes one group of a
    stack, `groups: 3` three of consecutive layers, as even as can be; or list them, `[[0, 2], [1, 3]]`. What
    the group starts from: its `first` layer, the `mean` of all, or the layer at that place in the group.
    Targets choose what is shared: the modules they match; without targets, whole layers of all stacks.

    ## When it helps

    Where a model must be small to store and send. ALBERT shares all layers. The weights of a trained model
    differ from layer to layer, so distil or fine-tune afterwards; groups of neighbours lose less than one
    group of all.

    ## When it is skipped

    A stack whose groups hold one layer each. Modules that not all layers of a group have (the position bias
    of T5's first block), or that differ in shape, remain their own.

    ## Cost

    Parameters and bytes of one layer a group; FLOPs and time are those of all layers.

    ## Example

        - share-layers: {}
        - share-layers: {groups: 3, start: mean}
        - share-layers: {groups: [[0, 1], [2, 3, 4, 5]], start: first}
        - share-layers: {targets: ["@ffn.*"], groups: 2}

    ## References

    Lan et al., ALBERT, ICLR 2020. Dehghani et al., Universal Transformers, ICLR 2019. Takase and Kiyono,
    Lessons on parameter sharing across layers in Transformers, 2021 (cycles). Ganesh et al., TACL 2021.
    """

    kind: ClassVar[str] = "share-layers"

    groups: Count | Groups | tuple[Groups, ...] = Field(
        1,
        description="how many groups of neighbours, or the layers of each group; lists of these, one a stack",
    )
    start: Literal["first", "mean"] | Layer = Field(
        "first", description="weights that a group starts from: first, mean, or a place in the group (from 0)"
    )

    @model_validator(mode="after")
    def _apart(self) -> Self:
        for groups in _per_stack(self.groups):
            layers = [layer for group in groups for layer in group]
            if len(set(layers)) != len(layers):
                raise ValueError("a layer may stand in one group only, once")
            if any(list(group) != sorted(group) for group in groups):
                raise ValueError("list the layers of a group in order")
        return self

    def resolve_tree(
        self,
        graph: ModelGraph,
        sites: Sequence[Site],
        stats: Mapping[str, SiteStats] | None,  # noqa: ARG002
        seed: int,  # noqa: ARG002
    ) -> Resolved:
        """Return the pass with all groups listed; its sites are the stacks, then what is shared of them.

        Raises PassError K490 to K492 (stacks and layers), K499 (groups or `start` that a stack cannot have).
        """
        stacks = stacks_of(graph, sites, self.kind)
        parts = _parts(graph, stacks, sites)
        self._refuse_packed(graph, stacks)
        skipped: dict[str, Skip] = {}
        chosen: dict[str, Groups] = {}
        for stack, groups in zip(stacks, self._groups(stacks), strict=True):
            self._check_start(stack, groups)
            several = tuple(group for group in groups if len(group) > 1)
            skipped |= _unshareable(graph.model, stack, several)
            skipped |= {} if several else {stack.fqn: Skip("every group holds one layer")}
            alone = _alone(graph.model, stack, several, parts)
            skipped |= alone
            if several and not alone.keys() >= _meant(graph, stack, several, parts):
                chosen[stack.fqn] = several
        explicit = self.model_copy(update={"groups": tuple(chosen.values())}) if chosen else self
        kept = [part for part in parts if any(part.startswith(f"{fqn}.") for fqn in chosen)]
        return Resolved(explicit, (*chosen, *kept) if chosen else (), skipped)

    def rewrite(self, model: nn.Module, sites: Sequence[str], choice: Any = None) -> None:  # noqa: ARG002
        """Let the layers of every group hold the Parameters of its first one, set to what they start from."""
        stacks = [fqn for fqn in sites if isinstance(model.get_submodule(fqn), nn.ModuleList)]
        parts = [fqn for fqn in sites if fqn not in stacks]
        for fqn, groups in zip(stacks, _per_stack(self.groups), strict=True):
            layers = model.get_submodule(fqn)
            mine = [part.removeprefix(f"{fqn}.") for part in parts if part.startswith(f"{fqn}.")]
            assert isinstance(layers, nn.ModuleList)
            for group in groups:
                for same in _same(layers, group, mine).values():
                    _share(same, self.start)

    def _groups(self, stacks: Sequence[LayerStack]) -> list[Groups]:
        if isinstance(self.groups, int):
            return [_even(stack, self.groups) for stack in stacks]
        given = _per_stack(self.groups)
        nested = not isinstance(self.groups[0][0], int)
        if not nested:
            given = given * len(stacks)
        per_stack(tuple(tuple(n for group in groups for n in group) for groups in given), stacks, "groups")
        return given

    def _refuse_packed(self, graph: ModelGraph, stacks: Sequence[LayerStack]) -> None:
        layers = (graph.model.get_submodule(stack.fqn) for stack in stacks)
        whole = all(parameter.is_floating_point() for one in layers for parameter in one.parameters())
        if self.start == "mean" and not whole:
            raise PassError(
                "share-layers: packed weights have no mean",
                code="K408",
                expected="share-layers first, then the pass that packs",
                remedy="move share-layers before it, or start: first",
            )

    def _check_start(self, stack: LayerStack, groups: Groups) -> None:
        shortest = min(len(group) for group in groups)
        if isinstance(self.start, int) and self.start >= shortest:
            raise PassError(
                f"share-layers: a group of {shortest} layers of {stack.fqn} has no place {self.start}",
                code="K499",
                expected=f"start: first, mean, or a place from 0 to {shortest - 1}",
                remedy="mend `start`",
            )


def _per_stack(groups: Any) -> list[Groups]:
    """Return the listed groups of each stack; nothing for a number."""
    if isinstance(groups, int):
        return []
    return list(groups) if isinstance(groups[0][0], tuple) else [groups]


def _even(stack: LayerStack, count: int) -> Groups:
    """Return `count` groups of consecutive layers whose sizes differ by one at most, longer ones first."""
    if count > stack.size:
        raise PassError(
            f"share-layers: {stack.fqn} has {stack.size} layers, too few for {count} groups",
            code="K499",
            expected=f"1 to {stack.size} groups",
            remedy="lower `groups`, or choose stacks by `targets`",
        )
    short, longer = divmod(stack.size, count)
    starts = [place * short + min(place, longer) for place in range(count + 1)]
    return tuple(tuple(range(*ends)) for ends in pairwise(starts))


def _parts(graph: ModelGraph, stacks: Sequence[LayerStack], sites: Sequence[Site]) -> tuple[str, ...]:
    """Return the modules of the stacks that the targets match; nothing where they match whole layers."""
    names = dict.fromkeys(name for site in sites for name in (site.fqn, *site.tied))
    inside = [fqn for fqn in graph.fqns() if any(stack.index(fqn) is not None for stack in stacks)]
    holding = [fqn for fqn in inside if next(graph.get(fqn).parameters(), None) is not None]
    if not names or names.keys() >= set(holding):
        return ()
    return tuple(name for name in names if name in holding)


def _same(
    layers: nn.ModuleList, group: Sequence[int], parts: Sequence[str]
) -> dict[str, list[tuple[nn.Module, str]]]:
    """Return where each Parameter of a layer stands in all layers of the group: (module, attribute), by name.

    With `parts` (layer.path) only what lies in them. What one of the layers has no equal of is left out.
    """
    found: dict[str, list[tuple[nn.Module, str]]] = {}
    shapes: dict[str, set[Any]] = {}
    for index in group:
        for path, name in _held(layers[index]):
            if parts and not _lies_in(f"{index}.{path}", parts):
                continue
            module = layers[index].get_submodule(path)
            value = module.get_parameter(name)
            full = f"{path}.{name}".lstrip(".")
            found.setdefault(full, []).append((module, name))
            shapes.setdefault(full, set()).add((value.shape, value.dtype))
    return {
        name: places for name, places in found.items() if len(places) == len(group) and len(shapes[name]) == 1
    }


def _held(layer: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield path and name of every Parameter of a layer, those of several names under each."""
    for name, _ in layer.named_parameters(remove_duplicate=False):
        path, _, attribute = name.rpartition(".")
        yield path, attribute


@torch.no_grad()
def _share(places: Sequence[tuple[nn.Module, str]], start: str | int) -> None:
    """Make the first place's Parameter that of all, with the values it starts from."""
    held = [module.get_parameter(name) for module, name in places]
    owner = held[0]
    if not owner.is_meta and len({id(parameter) for parameter in held}) > 1:
        if start == "mean" and owner.is_floating_point():
            owner.copy_(torch.stack([parameter.double() for parameter in held]).mean(0))
        elif isinstance(start, int):
            owner.copy_(held[start])
    for module, name in places[1:]:
        setattr(module, name, owner)


def _meant(graph: ModelGraph, stack: LayerStack, groups: Groups, parts: Sequence[str]) -> set[str]:
    """Return the modules with Parameters of their own that are to be shared."""
    layers = graph.model.get_submodule(stack.fqn)
    assert isinstance(layers, nn.ModuleList)
    inside = {
        f"{stack.entry(index)}.{path}".rstrip(".")
        for index in (index for group in groups for index in group)
        for path, _ in _held(layers[index])
    }
    return {name for name in inside if not parts or _lies_in(name, parts)}


def _lies_in(name: str, parts: Sequence[str]) -> bool:
    return any(f"{name}.".startswith(f"{part}.") for part in parts)


def _alone(model: nn.Module, stack: LayerStack, groups: Groups, parts: Sequence[str]) -> dict[str, Skip]:
    """Return the modules that were meant and remain their own, for want of an equal in some other layer."""
    layers = model.get_submodule(stack.fqn)
    assert isinstance(layers, nn.ModuleList)
    mine = [part.removeprefix(f"{stack.fqn}.") for part in parts]
    left: dict[str, Skip] = {}
    for group in groups:
        shared = _same(layers, group, mine)
        held = [(at, path, name) for at in group for path, name in _held(layers[at])]
        for at, path, name in held:
            if f"{path}.{name}".lstrip(".") in shared or (mine and not _lies_in(f"{at}.{path}", mine)):
                continue
            among = "targeted modules of " if mine else ""
            reason = f"{among}layers {', '.join(map(str, group))} do not all have its {name} in one shape"
            left[f"{stack.entry(at)}.{path}".rstrip(".")] = Skip(reason)
    return left


def _unshareable(model: nn.Module, stack: LayerStack, groups: Groups) -> dict[str, Skip]:
    """Return the modules that keep what they compute from in buffers, such as packed weights."""
    found: dict[str, Skip] = {}
    for name in (stack.entry(at) for group in groups for at in group):
        for path, part in model.get_submodule(name).named_modules(prefix=name):
            saved = [key for key in part._buffers if key not in part._non_persistent_buffers_set]
            packed = [
                key for key in saved if part.get_buffer(key).dim() and not hasattr(part, "running_mean")
            ]
            if packed:
                found[path] = Skip(f"keeps its {packed[0]} in a buffer, which layers cannot share")
    return found
