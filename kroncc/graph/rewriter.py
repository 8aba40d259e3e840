"""The only place that changes a model graph: swaps show in the graph and in the tree at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch._guards import detect_fake_mode
from torch.func import functional_call

from kroncc.errors import PassError, did_you_mean
from kroncc.graph.model_graph import ModelGraph
from kroncc.graph.propagate import call_trial, tensor_difference, trial_sizes


class Rewriter:
    """Changes one model graph. `by` names the pass that asks, for messages."""

    def __init__(self, mg: ModelGraph, by: str = "") -> None:
        self.mg = mg
        self.by = f"pass {by!r}" if by else "a pass"

    def swap(self, fqn: str, module: nn.Module, tied: Mapping[str, nn.Module] | None = None) -> None:
        """Put `module` at `fqn`, and the modules of `tied` at theirs, in both views and at every call.

        The new module takes over the old one's training mode. Nothing is changed if one of them does not fit.
        Raises PassError: K430 no such module, K431 its parameters are read from outside, K432 it fails on the
        shapes of the site, K433 other shapes or dtype come out, K435 its parameters have another dtype.
        """
        swaps = {fqn: module, **(tied or {})}
        for name, new in swaps.items():
            self._check_place(name)
            self._check_dtype(name, new)
            self._check_calls(name, new)
        for name, new in swaps.items():
            self._put(name, new)

    def _check_place(self, fqn: str) -> None:
        names = dict(self.mg.model.named_modules(remove_duplicate=False))
        if not fqn or fqn not in names:
            raise PassError(
                f"{self.by} swaps {fqn!r}, which the model does not have",
                code="K430",
                expected="the FQN of a module",
                remedy=did_you_mean(fqn, names),
            )
        for node in self.mg.graph.find_nodes(op="get_attr"):
            if str(node.target).startswith(f"{fqn}."):
                raise PassError(
                    f"{self.by} swaps {fqn!r}, but other code reads its {node.target!r}",
                    code="K431",
                    expected="a module whose parameters only its own forward reads",
                    remedy="exclude this module",
                )

    def _check_dtype(self, fqn: str, module: nn.Module) -> None:
        old, new = _dtypes(self.mg.model.get_submodule(fqn)), _dtypes(module)
        if old and new and not old & new:  # meta tensors of two dtypes multiply without complaint
            raise PassError(
                f"{self.by} puts {type(module).__name__} at {fqn!r}, which holds {' and '.join(sorted(new))}",
                code="K435",
                expected=f"parameters in {' or '.join(sorted(old))}",
                remedy="make the new parameters in the dtype of the old ones",
            )

    def _check_calls(self, fqn: str, module: nn.Module) -> None:
        for node in self.mg.calls(fqn):
            for sizes in trial_sizes(self.mg.graph):
                try:
                    got, expected = call_trial(node, module, sizes)
                except Exception as error:
                    raise PassError(
                        f"{self.by} puts {type(module).__name__} at {fqn!r}, which fails at {sizes}: {error}",
                        code="K432",
                        expected="a module that runs on meta at any batch and length",
                        remedy="mend its forward, or exclude this module",
                    ) from error
                difference = tensor_difference(expected, got)
                if difference:
                    raise PassError(
                        f"{self.by} puts {type(module).__name__} at {fqn!r}, which {difference}",
                        code="K433",
                        expected="the shapes and dtype of the module it replaces",
                        remedy="correct the shapes, or exclude this module",
                    )

    def _put(self, fqn: str, module: nn.Module) -> None:
        old = self.mg.model.get_submodule(fqn)
        module.train(old.training)
        aliases = [n for n, m in self.mg.model.named_modules(remove_duplicate=False) if m is old]
        for alias in aliases:
            _set(self.mg.model, alias, module)
            if self.mg.calls(alias):
                _set(self.mg.module, alias, module)

    def adopt(self, captured: ModelGraph) -> None:
        """Take over the graph of `captured`, made for the tree as it is now, in the place of the old one."""
        fresh = captured.bind(self.mg.model)
        self.mg.module, self.mg.extras, self.mg.limits = fresh.module, fresh.extras, fresh.limits

    def insert_call(self, after: fx.Node, name: str, module: nn.Module, args: tuple[Any, ...]) -> fx.Node:
        """Add a module to the graph view under `name` and call it right after a node; return the call.

        Its value is found from the values of `args`. Raises PassError (K434) where the name is taken.
        """
        if name in self.mg.extras or name in dict(self.mg.model.named_modules(remove_duplicate=False)):
            raise PassError(
                f"{self.by} adds {name!r}, which is taken",
                code="K434",
                expected="a name of its own",
                remedy="choose another name",
            )
        self.mg.extras[name] = module.train(self.mg.module.training)
        self.mg.module.add_submodule(name, module)
        with self.mg.graph.inserting_after(after):
            call = self.mg.graph.call_module(name, args)
        call.meta = {"val": _value(call, module), "fqn": after.meta["fqn"], "stack": after.meta["stack"]}
        self.mg.module.recompile()
        return call

    def replace_uses(self, old: fx.Node, new: fx.Node) -> None:
        """Let every reader of `old` but `new` itself read `new`."""
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        self.mg.module.recompile()

    def erase(self, node: fx.Node) -> None:
        """Remove a node that nothing reads."""
        self.mg.graph.erase_node(node)
        self.mg.module.recompile()

    def add_output(self, name: str, node: fx.Node) -> None:
        """Return one more value from the graph, under `name`."""
        self.mg.graph.output_node().args = ({**self.mg.outputs, name: node},)
        self.mg.module.recompile()


def _dtypes(module: nn.Module) -> set[str]:
    return {str(parameter.dtype) for parameter in module.parameters() if parameter.is_floating_point()}


def _set(root: nn.Module, fqn: str, module: nn.Module) -> None:
    parent, _, name = fqn.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def _value(call: fx.Node, module: nn.Module) -> Any:
    args, kwargs = fx.map_arg((call.args, call.kwargs), lambda node: node.meta["val"])
    mode = detect_fake_mode((args, kwargs))
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    if mode is None:
        return functional_call(module, tensors, args, kwargs)
    fake: dict[str, torch.Tensor] = {
        name: mode.from_tensor(torch.empty_like(t, device="meta")) for name, t in tensors.items()
    }
    with mode, torch.no_grad():
        return functional_call(module, fake, args, kwargs)
