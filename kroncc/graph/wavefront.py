"""Run a model graph node by node over many batches at once, keeping only what later nodes still read.

    wave = Wavefront(graph, batches)
    wave.advance(node)               # every batch has run up to, and not including, `node`
    wave.values(node.args[0])        # one tensor a batch: what `node` is about to read
    Rewriter(graph).swap(...)        # modules may be swapped between two advances
    wave.advance(None)               # to the end
    wave.outputs()                   # one dict a batch

Two wavefronts over the same batches go in lockstep by `call_sites`: the call of a module in one graph and in
the other have the same key.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from kroncc.graph.model_graph import ModelGraph
from kroncc.graph.spill import Spill, held_bytes, storage_of
from kroncc.graph.storage import Storage

Batch = Mapping[str, Tensor]
Values = dict[fx.Node, Any]
Site = tuple[str, int]
"""The FQN of a module, and the how-manieth of its calls (from 0)."""


def call_sites(graph: fx.Graph) -> dict[Site, fx.Node]:
    """Return every call of a module by (FQN, index of the call), in graph order."""
    counts: Counter[str] = Counter()
    sites: dict[Site, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            target = str(node.target)
            sites[target, counts[target]] = node
            counts[target] += 1
    return sites


class Wavefront:
    """Runs the graph of `graph` over all `batches` at once, in eval mode and without gradients.

    `batches` may make its items when they are asked for; what the graph takes no input for is left out.
    Values are kept on `device` (default: where the batches are). What they take above `limit` bytes lies in
    memory-mapped files of `directory`, which changes no bit. A module is looked up when it is called, so one
    that was swapped in between is seen; any other change of the graph is not.
    """

    def __init__(
        self,
        graph: ModelGraph,
        batches: Sequence[Batch],
        *,
        device: torch.device | str | None = None,
        limit: int | None = None,
        directory: Path | None = None,
    ) -> None:
        self.module = graph.module
        self.batches = batches
        self.device = torch.device(device) if device is not None else None
        self.limit = limit
        self.directory = directory
        self._nodes = list(self.module.graph.nodes)
        self._order = {node: place for place, node in enumerate(self._nodes)}
        self._storage = Storage(self._nodes)
        self._ends = _ends(self._nodes)
        self._held: set[fx.Node] = set()
        self._live: list[Values] = [{} for _ in batches]  # what later nodes read
        self._kept: list[Values] = [{} for _ in batches]  # what is held, also beyond that
        self._bytes = [0 for _ in batches]
        self._cursor = 0

    @property
    def position(self) -> fx.Node:
        """The node that runs next; the output node at the end."""
        node: fx.Node = self._nodes[self._cursor]
        return node

    @property
    def memory(self) -> int:
        """Bytes of memory that the kept values take, mapped files and the model's own tensors left out."""
        return sum(self._bytes)

    def hold(self, node: fx.Node) -> None:
        """Keep the values of a node that has not run yet until `release`, also after their last use.

        A value that a later node writes into is kept as it is when `node` has run.
        """
        self._held.add(node)

    def release(self, node: fx.Node) -> None:
        """Let go of the values of a held node, unless they are still to be used."""
        self._held.discard(node)
        for kept in self._kept:
            kept.pop(node, None)
        self._account_all()

    def advance(self, until: fx.Node | None = None) -> None:
        """Run every batch up to and not including `until`; to the end for None.

        Raises ValueError where the wavefront is past `until`.
        """
        stop = len(self._nodes) - 1 if until is None else self._order[until]
        if stop < self._cursor:
            raise ValueError(f"the wavefront is at {self.position}, past {until}")
        if stop == self._cursor:
            return
        with evaluating(self.module), torch.no_grad():
            own = self._own()
            for index in range(len(self._live)):
                self._run(index, self._nodes[self._cursor : stop])
                self._account(index, own)
        self._cursor = stop

    def values(self, node: fx.Node) -> list[Any]:
        """Return a node's value of every batch, usually tensors; ValueError where they are not kept."""
        return [self.value(node, index) for index in range(len(self._live))]

    def value(self, node: fx.Node, index: int) -> Any:
        """Return a node's value of one batch. Raises ValueError where it is not kept."""
        kept = self._kept[index]
        return self._moved(kept[node]) if node in kept else self._read(node, index, None)

    def replace(self, node: fx.Node, values: Sequence[Any]) -> None:
        """Give a node other values, one a batch, for all that read it from here on.

        Views that were made of the old values before keep those. Raises ValueError for another count.
        """
        if len(values) != len(self._live):
            raise ValueError(f"{len(values)} values for {len(self._live)} batches")
        for live, kept, value in zip(self._live, self._kept, values, strict=True):
            live[node] = value
            kept.update({node: value} if node in self._held else {})
        self._account_all()

    def live(self) -> list[fx.Node]:
        """Return the nodes whose values later nodes read, in graph order."""
        return sorted(self._live[0], key=self._order.__getitem__) if self._live else []

    def outputs(self) -> list[dict[str, Tensor]]:
        """Return the model's outputs by name, one dict a batch, after `advance(None)`."""
        named: Any = self._nodes[-1].args[0]
        return [
            fx.map_arg(dict(named), lambda node, at=index: self.value(node, at))  # type: ignore[misc]
            for index in range(len(self._live))
        ]

    def _run(self, index: int, nodes: Sequence[fx.Node]) -> None:
        live, kept = self._live[index], self._kept[index]
        batch = self.batches[index]
        for place, node in enumerate(nodes, self._cursor):
            if node.op in ("placeholder", "get_attr"):
                continue  # read where they are used
            live[node] = self._call(node, index, batch)
            if node in self._held:
                written = self._storage.written_after(node)
                kept[node] = _map_tensors(live[node], torch.clone) if written else live[node]
            for operand in (*node.all_input_nodes, node):
                if self._ends[operand] <= place:
                    live.pop(operand, None)

    def _call(self, node: fx.Node, index: int, batch: Batch) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda one: self._read(one, index, batch))
        if node.op == "call_module":
            value = self.module.get_submodule(str(node.target))(*args, **kwargs)
        elif node.op == "call_method":
            value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            value = node.target(*args, **kwargs)  # type: ignore[operator]
        return _detached(value)

    def _read(self, node: fx.Node, index: int, batch: Batch | None) -> Any:
        live = self._live[index]
        if node in live:
            return self._moved(live[node])
        if node.op == "get_attr":
            return _attribute(self.module, str(node.target))
        if node.op == "placeholder":
            return self._input(node, batch if batch is not None else self.batches[index])
        raise ValueError(f"the values of {node} are not kept (the wavefront is at {self.position})")

    def _input(self, node: fx.Node, batch: Batch) -> Any:
        name = str(node.target)
        if name not in batch:
            raise ValueError(f"the graph takes an input {name!r}, and the batch has {', '.join(batch)}")
        value = self._moved(batch[name])
        return value.clone() if self._storage.written_after(node) else value

    def _moved(self, value: Any) -> Any:
        if self.device is None:
            return value
        return _map_tensors(value, lambda tensor: tensor.to(self.device))

    def _account_all(self) -> None:
        own = self._own()
        for index in range(len(self._live)):
            self._account(index, own)

    def _account(self, index: int, own: frozenset[int]) -> None:
        """Count the bytes of a batch's kept values; move them into files where all take more than allowed."""
        foreign = own | self._given(index)
        self._bytes[index] = held_bytes(self._tensors(index), foreign)
        if self.limit is not None and self.memory > self.limit:
            self._spill(index, foreign)
            self._bytes[index] = held_bytes(self._tensors(index), foreign)

    def _spill(self, index: int, foreign: Container[int]) -> None:
        spill = Spill(self.directory)

        def moved(tensor: Tensor) -> Tensor:
            return tensor if storage_of(tensor) in foreign else spill(tensor)

        for values in (self._live[index], self._kept[index]):
            for node in values:
                if not self._storage.written_after(node):
                    values[node] = _map_tensors(values[node], moved)

    def _tensors(self, index: int) -> list[Tensor]:
        found: list[Tensor] = []
        _map_tensors([*self._live[index].values(), *self._kept[index].values()], found.append)
        return found

    def _own(self) -> frozenset[int]:
        """Return the storages of the model itself."""
        return frozenset(map(storage_of, (*self.module.parameters(), *self.module.buffers())))

    def _given(self, index: int) -> set[int]:
        """Return the storages of a batch that is kept anyway: batches may also be made when asked for."""
        given = self.batches[index].values() if isinstance(self.batches, list | tuple) else ()
        return {storage_of(tensor) for tensor in given}


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Set eval mode for a while; every part gets its own mode back."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _ends(nodes: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """Return the place of each node's last reader; of a node that nobody reads, its own."""
    ends: dict[fx.Node, int] = {}
    for place, node in enumerate(nodes):
        for operand in (*node.all_input_nodes, node):
            ends[operand] = place
    return ends


def _attribute(root: nn.Module, target: str) -> Any:
    owner, _, name = target.rpartition(".")
    return getattr(root.get_submodule(owner), name)


def _map_tensors(value: Any, change: Any) -> Any:
    return map_aggregate(value, lambda item: change(item) if isinstance(item, Tensor) else item)


def _detached(value: Any) -> Any:
    return _map_tensors(value, lambda tensor: tensor.detach() if tensor.requires_grad else tensor)
