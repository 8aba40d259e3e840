"""The lists that hold a model's layers, found from the data flow, and what the layers lend each other."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from kroncc.graph.flow import Layer, find_flow
from kroncc.graph.model_graph import ModelGraph
from kroncc.graph.ops import value_of
from kroncc.graph.propagate import meta_value, trial_sizes
from kroncc.graph.quiet import quiet
from kroncc.graph.symbolic import symbols


@dataclass(frozen=True)
class LayerStack:
    """One `nn.ModuleList` of layers: its FQN, how many it holds, and the width of the stream through them.

    `places` holds for each entry the layer that it is, as roles count them; None where no role tells.
    """

    fqn: str
    size: int
    width: int
    places: tuple[int | None, ...]

    def entry(self, index: int) -> str:
        """Return the FQN of one layer."""
        return f"{self.fqn}.{index}"

    def index(self, fqn: str) -> int | None:
        """Return which layer a module is, or lies in; None for a module outside of the stack."""
        head, dot, rest = fqn.removeprefix(f"{self.fqn}.").partition(".")
        return (
            int(head) if fqn.startswith(f"{self.fqn}.") and head.isdecimal() and (dot or not rest) else None
        )


@dataclass(frozen=True)
class LayerCall:
    """What is seen of a stack while the model runs: what a layer returns, which settings are read by place.

    `values` is None where a layer returns a tensor, else the length of the tuple it returns. `by_place` holds
    the lists of the config, one entry a layer, that the loop over the layers reads by the layer's place.
    """

    values: int | None
    by_place: dict[str, tuple[Any, ...]]


@dataclass(frozen=True)
class LayerEnds:
    """The value of the residual stream that enters a layer, and the one that leaves it."""

    enters: fx.Node
    leaves: fx.Node


def find_stacks(mg: ModelGraph) -> list[LayerStack]:
    """Return the lists that hold the model's layers, in model order.

    A list is one where every layer of the data flow lies in one entry of it and no entry holds two; of lists
    within lists, the outermost such. A model that calls one module repeatedly has none.
    """
    flow = find_flow(mg.graph)
    holders: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for place, layer in enumerate(flow.layers):
        for fqn in _modules_of(layer):
            for holder, index in _lists_around(mg.model, fqn):
                holders[holder][index].add(place)
    found: dict[str, LayerStack] = {}
    for holder in sorted(holders, key=lambda name: name.count(".")):
        entries = holders[holder]
        if _is_one_to_one(entries) and not any(holder.startswith(f"{outer}.") for outer in found):
            size = len(mg.model.get_submodule(holder))  # type: ignore[arg-type]
            places = tuple(min(entries[index]) if index in entries else None for index in range(size))
            found[holder] = LayerStack(holder, size, _width(flow.layers, places), places)
    order = {fqn: at for at, (fqn, _) in enumerate(mg.model.named_modules())}
    return sorted(found.values(), key=lambda stack: order[stack.fqn])


def _modules_of(layer: Layer) -> Iterator[str]:
    for attention in layer.attentions:
        yield from (
            str(node.target) for node in (*attention.maps, *([attention.out] if attention.out else []))
        )
    for pair in layer.feeds:
        yield from (str(node.target) for node in (*pair.ups, *pair.gates, pair.down))


def _lists_around(model: nn.Module, fqn: str) -> Iterator[tuple[str, int]]:
    """Yield the lists that a module lies in, outermost first, with its entry in each."""
    parts = fqn.split(".")
    for end in range(1, len(parts)):
        holder = ".".join(parts[:end])
        if isinstance(model.get_submodule(holder), nn.ModuleList):
            yield holder, int(parts[end])


def _is_one_to_one(entries: dict[int, set[int]]) -> bool:
    layers = [place for found in entries.values() for place in found]
    return all(len(found) == 1 for found in entries.values()) and len(set(layers)) == len(layers)


def _width(layers: list[Layer], places: tuple[int | None, ...]) -> int:
    """Return the width of the residual stream, 0 where it is not known."""
    streams = (layers[place].stream() for place in places if place is not None)
    value = next((value_of(node) for node in streams if node is not None), None)
    return value.shape[-1] if value is not None and isinstance(value.shape[-1], int) else 0


def lenders(mg: ModelGraph, stack: LayerStack) -> frozenset[int]:
    """Return the layers that compute more for others than the stream: T5's first one, a position bias.

    Without them the others would read something else. A value that skips over the next layer counts too.
    """
    inside = _nodes_by_entry(mg, stack)
    lent: dict[int, dict[fx.Node, set[int]]] = defaultdict(lambda: defaultdict(set))
    for node, at in inside.items():
        for reader in {inside[user] for user in node.users if user in inside} - {at}:
            if value_of(node) is not None:
                lent[at][node].add(reader)
    return frozenset(
        at
        for at, nodes in lent.items()
        if len(nodes) > 1 or any(readers != {at + 1} for readers in nodes.values())
    )


def _nodes_by_entry(mg: ModelGraph, stack: LayerStack) -> dict[fx.Node, int]:
    inside = {}
    for node in mg.graph.nodes:
        if node.op not in ("call_module", "call_function", "call_method"):
            continue
        found = (stack.index(fqn) for fqn in (*node.meta.get("stack", ()), str(node.target)))
        index = next((index for index in found if index is not None), None)
        if index is not None:
            inside[node] = index
    return inside


def layer_ends(mg: ModelGraph, stack: LayerStack) -> list[LayerEnds | None]:
    """Return for each layer the stream's value before and after it; None where the graph does not tell."""
    flow, inside = find_flow(mg.graph), _nodes_by_entry(mg, stack)
    ends: list[LayerEnds | None] = []
    for index, place in enumerate(stack.places):
        enters = flow.layers[place].stream() if place is not None else None
        given = value_of(enters) if enters is not None else None
        leaving = [
            node
            for node, at in inside.items()
            if at == index
            and given is not None
            and any(inside.get(user) != index for user in node.users)
            and (value := value_of(node)) is not None
            and (value.dtype, str(value.shape)) == (given.dtype, str(given.shape))
        ]
        known = enters is not None and len(leaving) == 1
        ends.append(LayerEnds(enters, leaving[0]) if known and enters is not None else None)
    return ends


class _SeenError(Exception):
    """The stack has run; the rest of the model is of no interest."""


class _Watched(list[Any]):
    """A list that notes whether an entry was read by its index."""

    read = False

    def __getitem__(self, index: Any) -> Any:
        self.read = self.read or isinstance(index, int)
        return super().__getitem__(index)


def watch_call(mg: ModelGraph, stack: LayerStack) -> LayerCall | None:
    """Run the model on fake tensors to the end of `stack`; say what was seen of the calls of its layers.

    None where the model does not run so far: it branches on values.
    """
    returned: list[Any] = []

    def note(_module: nn.Module, _args: Any, output: Any) -> None:
        returned.append(output)
        if len(returned) == stack.size:
            raise _SeenError

    entries = list(mg.model.get_submodule(stack.fqn).children())
    handles = [entry.register_forward_hook(note) for entry in entries]
    with _lists_watched(mg.model, stack) as lists:
        try:
            _call_fake(mg)
        except _SeenError:
            pass
        except Exception:  # whatever a model raises on tensors without values: nothing was seen
            return None
        finally:
            for handle in handles:
                handle.remove()
    first = returned[0] if returned else None
    return LayerCall(
        values=len(first) if isinstance(first, tuple) else None,
        by_place={name: tuple(values) for name, values in lists.items() if values.read},
    )


def _call_fake(mg: ModelGraph) -> None:
    """Call the model, all of its tensors and inputs fake: transformers takes that for a trace."""
    names, sizes = symbols(mg.graph), trial_sizes(mg.graph)[0]
    accepts = inspect.signature(type(mg.model).forward).parameters
    options = {"use_cache": False} if "use_cache" in accepts else {}
    tensors = {**dict(mg.model.named_parameters()), **dict(mg.model.named_buffers())}
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # tensors that a module keeps as plain attributes

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        return mode.from_tensor(torch.empty_like(tensor, device="meta"))

    given = {
        str(node.target): fake(meta_value(node.meta["val"], names, sizes))
        for node in mg.graph.find_nodes(op="placeholder")
    }
    held = {name: fake(tensor) for name, tensor in tensors.items()}
    with quiet(), mode, torch.no_grad():
        functional_call(mg.model, held, (), {**given, **options})


@contextmanager
def _lists_watched(model: nn.Module, stack: LayerStack) -> Iterator[dict[str, _Watched]]:
    """Put lists that note how they are read in the place of the config's lists with one entry a layer."""
    config = config_of(model, stack)
    settings: dict[str, Any] = {} if config is None else vars(config)
    kept = {
        name: values
        for name, values in settings.items()
        if isinstance(values, list | tuple) and len(values) == stack.size
    }
    watched = {name: _Watched(values) for name, values in kept.items()}
    settings.update(watched)
    try:
        yield watched
    finally:
        settings.update(kept)


def config_of(model: nn.Module, stack: LayerStack) -> Any:
    """Return the config of the module that loops over a stack; None where it has none."""
    owner = model.get_submodule(stack.fqn.rpartition(".")[0])
    return getattr(owner, "config", None)


def has_cache(model: nn.Module, stack: LayerStack) -> bool:
    """Say whether the module that loops over a stack can keep keys and values of past tokens."""
    owner = model.get_submodule(stack.fqn.rpartition(".")[0])
    return "past_key_values" in inspect.signature(type(owner).forward).parameters


def is_causal(mg: ModelGraph, stack: LayerStack) -> bool:
    """Say whether the layers of a stack may not read ahead, or read another stack: a decoder's."""
    parts = list(mg.model.get_submodule(stack.fqn).modules())
    told = [part.is_causal for part in parts if isinstance(getattr(part, "is_causal", None), bool)]
    if told:
        return any(told)
    return _is_decoder(getattr(mg.model, "config", None))


def _is_decoder(config: Any) -> bool:
    """Say whether the family of a config knows language modelling from left to right, and no other."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    kind = getattr(config, "model_type", "")
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
