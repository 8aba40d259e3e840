"""Weights kept in another form than a matrix of floats: packed integers, a bitmask with values, code books.

`stored(module, {"weight": store})` gives a module that computes as `module` does, from what the store
returns. It works on any module, also on one that another pass made (`a`, `b` of Kronecker factors), and on
what a store itself holds (`stores.weight.values`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kroncc.api import PassError


class Store(nn.Module):
    """Stands for one weight; calling it returns the weight as floats.

    What it keeps must be Parameters, so that two modules can share it (integers with requires_grad=False),
    all in row-major order. A store that trains defines `finalise() -> nn.Module` (the store that takes its
    place) and may define `set_progress`, `penalty`. Subclasses define `forward()`, `text()` and `shape`.
    """

    shape: tuple[int, ...]

    def forward(self) -> Tensor:
        """Return the weight."""
        raise NotImplementedError

    def rows(self, index: Tensor) -> Tensor:
        """Return the rows of the weight at integer `index` [...]; override where that is cheaper."""
        return F.embedding(index, self())

    def weights(self) -> int:
        """Return how many weights the store stands for."""
        return math.prod(self.shape)

    def text(self) -> str:
        """Return what the plan shows, such as `4 bits`."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Return the shape and the form for `print`."""
        return f"{'x'.join(map(str, self.shape))}, {self.text()}"


class Stored(nn.Module):
    """Base of the modules that `stored` makes: a subclass of the original class whose weights are properties.

    Nothing is changed by a call, so threads may share a model. `stores` maps a weight's name to its store.
    """

    made_of: ClassVar[tuple[type[nn.Module], tuple[str, ...]]]
    stores: nn.ModuleDict

    def tied_to(self, module: nn.Module) -> nn.Module:
        """Return what takes the place of `module`, which shares the weights: the same stores, its own bias.

        Raises PassError K470 for a module that lacks weights of these names and shapes.
        """
        stores = {name: cast("Store", store) for name, store in self.stores.items()}
        for name, store in stores.items():
            held = dict(module.named_parameters(recurse=False)).get(name)
            shape = _store_of(module, name).shape if held is None else tuple(held.shape)
            if shape != store.shape:
                raise PassError(
                    f"a {type(module).__name__} cannot share the stored weight {name!r} {list(store.shape)}",
                    code="K470",
                    expected="a module with a weight of that name and shape",
                    remedy="leave the weight and what is tied to it out with `exclude`",
                )
        return stored(module, stores).train(module.training)

    def shape_text(self) -> str:
        """Return the shape of the original module with the form of its weights: `64x32, 4 bits`."""
        return f"{_shape_text(self)}, {_forms(self)}"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the class by what it is made of."""
        base, names = type(self).made_of
        state: Any = super().__getstate__()  # type: ignore[no-untyped-call]
        return _blank, (base, names, is_live(self)), state


def stored(module: nn.Module, stores: Mapping[str, nn.Module]) -> nn.Module:
    """Return a copy of `module` in which each named weight is what its store returns.

    Names may have dots (`stores.weight.values`): then the sub-module is copied and treated. All other
    Parameters, buffers and sub-modules are the same objects as in `module`, which stays as it was. Where a
    store has `finalise`, so has the copy.
    """
    new = copy.copy(module)
    for kind in ("_parameters", "_buffers", "_modules"):
        new.__dict__[kind] = dict(module.__dict__[kind])
    new.__dict__["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
    deeper = dict.fromkeys(name.partition(".")[0] for name in stores if "." in name)
    for child in deeper:
        inside = {
            name.removeprefix(f"{child}."): s for name, s in stores.items() if name.startswith(f"{child}.")
        }
        new._modules[child] = stored(module.get_submodule(child), inside)
    here = {name: store for name, store in stores.items() if "." not in name}
    held = (dict(new.stores.items()) if isinstance(new, Stored) else {}) | here
    for name in here:
        new._parameters.pop(name, None)
    if held:
        base = type(new).made_of[0] if isinstance(new, Stored) else type(new)
        new._modules["stores"] = nn.ModuleDict(held).train(module.training)
        new.__class__ = _class(base, tuple(held), any(map(is_live, held.values())))
    return new


def is_live(module: nn.Module) -> bool:
    """Say whether `module` is there for training and becomes another one after it."""
    return callable(getattr(module, "finalise", None))


def weight_names(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the floating Parameters of `module` by dotted name: what a pass over weights may look at."""
    return {name: p for name, p in module.named_parameters() if p.is_floating_point()}


def _store_of(module: nn.Module, name: str) -> Any:
    stores = getattr(module, "stores", None)
    missing = torch.empty(0)
    return stores[name] if isinstance(stores, nn.ModuleDict) and name in stores else missing


def _shape_text(module: Stored) -> str:
    base = type(module).made_of[0]
    own = getattr(base, "shape_text", None)
    if callable(own):
        return str(own(module))
    shapes = [cast("Store", store).shape for store in module.stores.values()]
    if hasattr(module, "nf"):  # Conv1D keeps its weight as in x out
        shapes = [shape[::-1] for shape in shapes]
    return " + ".join("x".join(map(str, shape)) for shape in shapes)


def _forms(module: Stored) -> str:
    """Return the forms of the weights, each with those of what its store holds."""
    texts = [
        f"{cast('Store', store).text()}, {_forms(store)}"
        if isinstance(store, Stored)
        else cast("Store", store).text()
        for store in module.stores.values()
    ]
    return " and ".join(dict.fromkeys(texts))


def _embed(self: Any, index: Tensor) -> Tensor:
    """Look up only the rows that are asked for; what `padding_idx` looks up sends no gradient."""
    out: Tensor = self.stores["weight"].rows(index)
    if self.padding_idx is None:
        return out
    return torch.where((index == self.padding_idx).unsqueeze(-1), out.detach(), out)


def _finalise(self: Stored) -> nn.Module:
    """Return the module with each store that trains replaced by what it becomes."""
    return stored(self, {name: cast("Any", s).finalise() for name, s in self.stores.items() if is_live(s)})


_CLASSES: dict[tuple[Any, ...], type[Stored]] = {}


def _class(base: type[nn.Module], names: tuple[str, ...], live: bool) -> type[Stored]:
    """Return the one subclass of `base` whose `names` are properties that ask the stores."""
    key = (base, names, live)
    if key in _CLASSES:
        return _CLASSES[key]
    members: dict[str, Any] = {name: _weight(name) for name in names}
    members |= {"made_of": (base, names), "__module__": __name__}
    if base is nn.Embedding:
        members["forward"] = _embed
    if live:
        members["finalise"] = _finalise
    return _CLASSES.setdefault(key, type(f"Stored{base.__name__}", (Stored, base), members))


def _weight(name: str) -> property:
    return property(lambda self: self.stores[name]())


def _blank(base: type[nn.Module], names: tuple[str, ...], live: bool) -> Stored:
    cls = _class(base, names, live)
    return cls.__new__(cls)
