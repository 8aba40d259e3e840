"""One model in two views: the graph that passes analyse and the executor runs, the tree the user loads."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx, nn

from kroncc.errors import CaptureError

Extras = dict[str, nn.Module | torch.Tensor]


class ModelGraph:
    """A graph over the sub-modules of a model, kept together with the model.

    `module` is the graph view: call it with keyword inputs, it returns a dict from output name to tensor.
    `model` is the tree view and holds the same sub-module objects. `extras` exist in the graph view only, by
    name: attention and dropout that the source calls as functions, regions under `no_grad`, constant tensors.
    `dtype` is the floating dtype that the graph was traced in; `limits` are the largest sizes it holds for,
    by name (`length`, ...), where there are any.
    """

    def __init__(
        self,
        graph: fx.Graph,
        model: nn.Module,
        extras: Extras,
        dtype: torch.dtype,
        limits: Mapping[str, int] | None = None,
    ) -> None:
        held = getattr(model, "dtype", dtype)
        if held != dtype:
            raise CaptureError(
                f"the graph was captured in {dtype}, and {type(model).__name__} holds {held}",
                code="K309",
                expected=f"a model in {dtype}",
                remedy="cast the model first, or capture it as it is",
            )
        self.model = model
        self.limits = dict(limits or {})
        self.extras = extras
        self.dtype = dtype
        self.module = _graph_module(graph, model, extras)
        shared = set(model.modules())
        for part in self.module.modules():
            if part not in shared:
                part.training = model.training

    @property
    def graph(self) -> fx.Graph:
        """The fx graph; change it through `graph/rewriter.py` only."""
        return self.module.graph

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs, all keyword."""
        return tuple(str(node.target) for node in self.graph.find_nodes(op="placeholder"))

    @property
    def outputs(self) -> dict[str, fx.Node]:
        """Output nodes by name."""
        return dict(self.graph.output_node().args[0])  # type: ignore[arg-type]

    def calls(self, fqn: str) -> list[fx.Node]:
        """Return the nodes that call a module, in order."""
        return list(self.graph.find_nodes(op="call_module", target=fqn))

    def fqns(self) -> list[str]:
        """Return the model's modules that the graph calls, in order of first call."""
        called = (str(node.target) for node in self.graph.find_nodes(op="call_module", sort=True))
        return [fqn for fqn in dict.fromkeys(called) if fqn not in self.extras]

    def get(self, fqn: str) -> nn.Module:
        """Return the module at `fqn`, of the tree or of the graph view alone."""
        extra = self.extras.get(fqn)
        return extra if isinstance(extra, nn.Module) else self.model.get_submodule(fqn)

    def ties(self) -> tuple[tuple[str, ...], ...]:
        """Return the groups of modules that share a parameter, each in model order."""
        owners: dict[int, dict[str, None]] = {}
        named = self.model.named_modules(remove_duplicate=False)
        called = set(self.fqns()) | {fqn for fqn, module in named if is_whole(module)}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            owners.setdefault(id(parameter), {})[_owner(name, called)] = None
        groups: list[dict[str, None]] = []
        for shared in owners.values():
            joined = dict(shared)
            apart = []
            for group in groups:
                if group.keys() & joined.keys():
                    joined = group | joined
                else:
                    apart.append(group)
            groups = [*apart, joined]
        return tuple(sorted(tuple(group) for group in groups if len(group) > 1))

    def tied(self, fqn: str) -> tuple[str, ...]:
        """Return the other modules that share a parameter with the one at `fqn`."""
        group = next((group for group in self.ties() if fqn in group), ())
        return tuple(other for other in group if other != fqn)

    def bind(self, model: nn.Module) -> ModelGraph:
        """Return the same graph over another tree of the same architecture, compressed or not.

        Raises CaptureError: K307 where the graph names a module or a tensor that `model` lacks, K309 where
        the model holds another dtype than the graph was captured in.
        """
        return ModelGraph(copy_graph(self.graph), model, copy.deepcopy(self.extras), self.dtype, self.limits)

    def copy(self) -> ModelGraph:
        """Return a graph and a tree of their own that hold the very same parameters and buffers."""
        tensors: Iterable[torch.Tensor] = [*self.model.parameters(), *self.model.buffers()]
        memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
        return self.bind(copy.deepcopy(self.model, memo))

    def train(self, mode: bool = True) -> ModelGraph:
        """Set training mode in both views."""
        self.model.train(mode)
        self.module.train(mode)
        return self

    def eval(self) -> ModelGraph:
        """Set evaluation mode in both views."""
        return self.train(False)

    def to(self, device: torch.device | str) -> ModelGraph:
        """Move both views to a device."""
        self.model.to(device)
        self.module.to(device)
        return self


def is_whole(module: nn.Module) -> bool:
    """Say whether a pass made `module` to be tied as a whole, with what is inside it."""
    return callable(getattr(module, "tied_to", None))


def _owner(parameter: str, called: set[str]) -> str:
    """Return the outermost called (or whole) module that a parameter lies in, or its direct owner."""
    parts = parameter.split(".")[:-1]
    for end in range(1, len(parts) + 1):
        if ".".join(parts[:end]) in called:
            return ".".join(parts[:end])
    return ".".join(parts)


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """Return a copy with fresh node names and the same (shallow) node meta."""
    fresh = fx.Graph()
    fresh.output(fresh.graph_copy(graph, {}))
    fresh.output_node().meta = dict(graph.output_node().meta)
    return fresh


def _graph_module(graph: fx.Graph, model: nn.Module, extras: Extras) -> fx.GraphModule:
    root: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            target = str(node.target)
            root[target] = extras[target] if target in extras else _resolve(model, target, node)
    module = fx.GraphModule(root, graph, class_name=f"{type(model).__name__}Graph")
    _mark_transient(module, model)
    return module


def _resolve(model: nn.Module, target: str, node: fx.Node) -> Any:
    value: Any = model
    for part in target.split("."):
        value = getattr(value, part, None)
    if value is None:
        raise CaptureError(
            f"the graph reads {target!r}, which {type(model).__name__} does not have (node {node.name})",
            code="K307",
            expected="a model of the architecture that was captured",
            remedy="capture this model itself",
        )
    return value


def _mark_transient(module: fx.GraphModule, model: nn.Module) -> None:
    """Keep buffers out of the graph's state_dict where the model keeps them out of its own."""
    saved = model.state_dict(keep_vars=True).keys()
    for name, _ in list(module.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        if name not in saved:
            module.get_submodule(owner)._non_persistent_buffers_set.add(leaf)
