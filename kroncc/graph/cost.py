"""What a model costs: parameters, stored bytes, FLOPs and activation memory for any batch and length."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import nn

from kroncc.graph.flops import Counter
from kroncc.graph.flow import find_flow
from kroncc.graph.memory import Memory
from kroncc.graph.model_graph import ModelGraph
from kroncc.graph.ops import module_of
from kroncc.graph.roles import roles_of
from kroncc.graph.symbolic import symbols
from kroncc.graph.walk import Walker


@dataclass(frozen=True)
class Flops:
    """FLOPs of one forward pass: of the layers' linear maps (attention and FFN), and of all counted."""

    linear: int
    total: int


@dataclass(frozen=True)
class ModuleCost:
    """One module of a model. `params` leaves out what an earlier module already counted (ties)."""

    fqn: str
    type: str
    shape: str
    params: int
    graph: Graph = field(repr=False, compare=False)

    def flops(self, batch: int, length: int) -> int:
        """Return the FLOPs of all calls of the module in one forward pass, 2 a multiply-add."""
        return self.graph.by_target(batch, length).get(self.fqn, 0)


@dataclass(frozen=True)
class ModelCost:
    """What a model costs. `params` counts tied weights once; `bytes` is what a checkpoint stores."""

    params: int
    bytes: int
    modules: tuple[ModuleCost, ...]
    graph: Graph = field(repr=False, compare=False)

    def flops(self, batch: int, length: int) -> Flops:
        """Return the FLOPs of one forward pass, 2 a multiply-add; a decoder reads `length` tokens too."""
        targets = self.graph.by_target(batch, length)
        linear = sum(targets.get(fqn, 0) for fqn in self.graph.linear)
        return Flops(linear=linear, total=sum(targets.values()))

    def training_flops(self, batch: int, length: int) -> int:
        """Estimate the FLOPs of one training step: forward, and twice as much backward."""
        return 3 * self.flops(batch, length).total

    def activation_peak(self, batch: int, length: int, train: bool = False) -> int:
        """Return bytes: the peak of inference, or with `train` what is kept for the backward pass."""
        memory = Memory(self.graph.walker, self.graph.counter(batch, length))
        return memory.saved_for_backward() if train else memory.inference_peak()


class Graph:
    """A graph with what its costs are computed from. The modules are those of now, also after a swap."""

    def __init__(self, mg: ModelGraph) -> None:
        flow = find_flow(mg.graph)
        self.walker: Walker = flow.walker
        self.names = symbols(mg.graph)
        called = {node: module_of(node) for node in self.walker.nodes}
        self.modules = {node: module for node, module in called.items() if module is not None}
        roles = roles_of(flow)
        self.linear = [fqn for fqn, role in roles.items() if role.name.startswith(("attention.", "ffn."))]
        self.by_target = lru_cache(maxsize=8)(self._by_target)

    def counter(self, batch: int, length: int) -> Counter:
        """Return a counter for these sizes; a target is as long as a source."""
        return Counter(self.names, {"batch": batch, "length": length, "target_length": length}, self.modules)

    def _by_target(self, batch: int, length: int) -> dict[str, int]:
        """Return FLOPs by called module; functions are counted under ''."""
        counter = self.counter(batch, length)
        found: dict[str, int] = {}
        for node in self.walker.nodes:
            target = str(node.target) if node.op == "call_module" else ""
            found[target] = found.get(target, 0) + counter.count(node)
        return found


def model_cost(mg: ModelGraph) -> ModelCost:
    """Return the costs of a model as it is now; nothing is run and no weight is read."""
    graph = Graph(mg)
    return ModelCost(
        params=_weights(mg.model, set()),
        bytes=_stored_bytes(mg.model),
        modules=tuple(_modules(mg, graph)),
        graph=graph,
    )


def _unique(tensors: Iterable[torch.Tensor], seen: set[int]) -> int:
    """Return how many numbers the tensors hold that are not among `seen`, and add them to it."""
    count = 0
    for tensor in tensors:
        count += 0 if id(tensor) in seen else tensor.numel()
        seen.add(id(tensor))
    return count


def _weights(module: nn.Module, seen: set[int]) -> int:
    """Return how many weights `module` has whose tensors are not all among `seen`, and add them to it.

    A module that keeps weights in another form (packed, masked) says by `weights()` how many they are.
    """
    own = getattr(module, "weights", None)
    if callable(own):
        return int(own()) if _unique(module.parameters(), seen) else 0
    count = _unique(module.parameters(recurse=False), seen)
    return count + sum(_weights(child, seen) for child in module.children())


def _stored_bytes(model: nn.Module) -> int:
    stored = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in stored.values())


def _modules(mg: ModelGraph, graph: Graph) -> list[ModuleCost]:
    """Return a row for every called module with parameters or FLOPs, then for parameters outside of them."""
    seen: set[int] = set()
    rows = []
    for fqn in mg.fqns():
        module = mg.get(fqn)
        params = _weights(module, seen)
        row = ModuleCost(fqn, type(module).__name__, shape_text(module), params, graph)
        rows += [row] if params or row.flops(1, 8) else []
    return rows + _outside(mg.model, "", seen, graph)


def _outside(module: nn.Module, fqn: str, seen: set[int], graph: Graph) -> list[ModuleCost]:
    """Return a row for every Parameter, or module with `weights()`, that no called module holds."""
    if callable(getattr(module, "weights", None)):
        params = _weights(module, seen)
        return [ModuleCost(fqn, type(module).__name__, shape_text(module), params, graph)] if params else []
    rows = []
    for name, parameter in module.named_parameters(prefix=fqn, recurse=False):
        if params := _unique([parameter], seen):
            rows.append(ModuleCost(name, "Parameter", _extents(parameter.shape), params, graph))
    for name, child in module.named_children():
        rows += _outside(child, f"{fqn}.{name}".lstrip("."), seen, graph)
    return rows


def shape_text(module: nn.Module) -> str:
    """Return a module's shape: its own `shape_text()`, out x in of a linear map, or those of its matrices."""
    own = getattr(module, "shape_text", None)
    if callable(own):
        return str(own())
    held = [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.numel() > 1]
    matrices = [tensor for tensor in held if tensor.dim() > 1]
    weight = getattr(module, "weight", None)
    # Conv1D keeps its weight as in x out.
    if len(matrices) == 1 and matrices[0] is weight and getattr(module, "nf", None) == weight.shape[-1]:
        return _extents(weight.shape[::-1])
    return " + ".join(_extents(tensor.shape) for tensor in matrices or held[:1])


def _extents(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))
