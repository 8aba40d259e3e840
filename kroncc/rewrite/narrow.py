"""Find what must change in a model when dimensions are cut: tensors, and attributes its forwards read."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from kroncc.errors import PassError
from kroncc.graph.atoms import Atom, Extent, Shape, extent_size, leaves
from kroncc.graph.axes import Axes
from kroncc.graph.capture import capture
from kroncc.graph.compare import difference
from kroncc.graph.inputs import example_inputs
from kroncc.graph.model_graph import ModelGraph
from kroncc.graph.quiet import quiet
from kroncc.graph.trace import Reshape, skeleton_of
from kroncc.rewrite.cut import FOLLOWED, Cut, Narrowed, apply_cuts, narrowed, with_attributes

Value = int | tuple[int, ...]
Attributes = dict[tuple[str, str], Value]
"""New values by module and attribute."""

MOST_TRIALS = 40


@dataclass(frozen=True)
class Group:
    """An atom and how many of its units stay; `units` says which, where it is known."""

    atom: Atom
    keep: int
    units: tuple[int, ...] | None = None


def narrow(graph: ModelGraph, axes: Axes, groups: Sequence[Group]) -> tuple[dict[str, Narrowed], list[Cut]]:
    """Return what becomes of every module when all groups are cut at once, and the cuts themselves.

    The source's own forwards must run with the new sizes: where they read old ones from attributes of the
    modules around, the smallest set of attributes is found with which the model, captured again, is the same
    program but for sizes. Raises PassError K485 where there is none.
    """
    cuts = [Cut(axes.spans(one.atom), int(one.atom.root().size), one.keep, one.units) for one in groups]
    plain = narrowed(graph.model, cuts)
    if all(cut.keep == cut.size for cut in cuts):
        return plain, cuts
    trial = _Trial(graph, axes, groups, plain)
    counts, others = _candidates(graph.model, axes, groups, cuts)
    for tried, attributes in enumerate(_sets(counts, others)):
        if tried == MOST_TRIALS:
            break
        if trial.works(attributes):
            return with_attributes(plain, attributes), cuts
    raise PassError(
        f"{type(graph.model).__name__} does not run narrower: {trial.reason}",
        code="K485",
        expected="forwards that take their sizes from weights or from attributes of their modules",
        remedy="keep all units there, or exclude these modules",
    )


class _Trial:
    """Captures narrower copies of a model on meta and compares each with what is due."""

    def __init__(
        self, graph: ModelGraph, axes: Axes, groups: Sequence[Group], plain: Mapping[str, Narrowed]
    ) -> None:
        self.graph = graph
        self.axes = axes
        self.keeps = {id(group.atom.root()): group.keep for group in groups}
        self.plain = plain
        self.reason = ""
        self.quick = self._runs_now()

    def works(self, attributes: Attributes) -> bool:
        """Say whether the model runs narrower with these attributes, as the same program."""
        modules = with_attributes(self.plain, attributes)

        def again(tree: Any) -> None:
            _become(tree, self.graph.model)
            apply_cuts(tree, list(modules), list(modules.values()))

        try:
            if self.quick:
                self._run(again)
            found = capture(self.graph.model, self.graph.inputs, again)
        except Exception as error:  # of the source's own forwards, whatever they raise
            self.reason = self.reason or f"{type(error).__name__}: {error}"
            return False
        said = difference(self.graph, found, self._sizes)
        self.reason = self.reason or said
        return not said

    def _runs_now(self) -> bool:
        try:
            self._run(lambda tree: _become(tree, self.graph.model))
        except Exception:  # then captures alone must tell
            return False
        return True

    def _run(self, again: Reshape) -> None:
        """Run a model once on meta, which is quicker than capturing what does not run."""
        tree = skeleton_of(self.graph.model, again)
        with torch.no_grad(), quiet(), _Blind():
            tree(**example_inputs(self.graph.model, self.graph.inputs))

    def _sizes(self, node: fx.Node) -> list[list[Any]]:
        return [
            [extent_size(self._cut(atom) for atom in leaves(extent)) for extent in shape]
            for shape in self.axes.parts(node)
        ]

    def _cut(self, atom: Atom) -> Atom:
        return Atom(self.keeps.get(id(atom), atom.size))


class _Blind(TorchFunctionMode):
    """Answers no where the source looks at the values of a tensor on meta."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        looks = func in (torch.Tensor.item, torch.Tensor.__bool__)
        return False if looks and args[0].is_meta else func(*args, **(kwargs or {}))


def _become(tree: Any, model: nn.Module) -> None:
    """Give `tree`, a fresh model of the same class on meta, the modules that `model` has, as they are."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
    memo |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in model.buffers()}
    twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        config = getattr(module, "config", None)
        if config is not None:  # as in the fresh tree
            config.use_cache = False
            config._attn_implementation = tree.config._attn_implementation
    for name in ("_modules", "_parameters", "_buffers"):
        setattr(tree, name, getattr(twin, name))


def _sets(counts: Attributes, others: Mapping[tuple[type, str], Attributes]) -> Iterator[Attributes]:
    """Yield sets of attributes to try: those that tell the count, then with few others, then without."""
    bases: list[Attributes] = [counts, {}] if counts else [{}]
    for extra in range(min(3, len(others)) + 1):
        for base in bases:
            for names in combinations(others, extra):
                joined = dict(base)
                for name in names:
                    joined |= others[name]
                yield joined


def _candidates(
    model: nn.Module, axes: Axes, groups: Sequence[Group], cuts: Sequence[Cut]
) -> tuple[Attributes, dict[tuple[type, str], Attributes]]:
    """Return attributes that surely tell the number of units, and those that may tell an old size.

    The latter are grouped by class and name: what one module needs, its siblings need too.
    """
    modules = dict(model.named_modules())
    counts: Attributes = {}
    others: dict[tuple[type, str], Attributes] = {}
    for group, cut in zip(groups, cuts, strict=True):
        for fqn in _owners(modules, cut):
            for name, value in _numbers(modules[fqn]):
                new = _shrunk(value, cut)
                if new is None:
                    continue
                if value == cut.size and _tells_count(modules, axes, fqn, name, group):
                    counts[fqn, name] = new
                else:
                    others.setdefault((type(modules[fqn]), name), {})[fqn, name] = new
    return counts, others


def _owners(modules: Mapping[str, nn.Module], cut: Cut) -> list[str]:
    """Return the modules that hold the cut tensors' modules, or the tensors themselves."""
    found: dict[str, None] = {}
    for path in (name for span in cut.spans for name in span.names):
        leaf = path.rpartition(".")[0]
        if leaf not in modules:
            continue
        if not isinstance(modules[leaf], FOLLOWED):
            found[leaf] = None
        if leaf:
            found[leaf.rpartition(".")[0]] = None
    return list(found)


def _numbers(module: nn.Module) -> list[tuple[str, Value]]:
    """Return the attributes of a module that are whole numbers, or tuples of them."""
    return [
        (name, value)
        for name, value in vars(module).items()
        if type(value) is int or (type(value) is tuple and value and all(type(one) is int for one in value))
    ]


def _shrunk(value: Value, cut: Cut) -> Value | None:
    """Return what an attribute becomes if it tells an old size; None if it does not."""
    sizes = {cut.size: cut.keep}
    for span in cut.spans:
        for factor in (span.inner, span.outer * span.inner):
            sizes[cut.size * factor] = cut.keep * factor
    if isinstance(value, int):
        return sizes.get(value)
    new = tuple(sizes.get(one, one) for one in value)
    return new if new != value else None


def _tells_count(modules: Mapping[str, nn.Module], axes: Axes, fqn: str, name: str, group: Group) -> bool:
    """Say whether an attribute can only be the number of units.

    No other extent inside the module is as large, and in all modules of the class the attribute is the extent
    at the same place: one that means something else, as the number of a layer does, differs in some.
    """
    atom, owner = group.atom.root(), modules[fqn]
    held = {path: axes.tensor(tensor) for path, tensor in owner.named_parameters()}
    place = next((at for path, shape in held.items() for at in _places(path, shape, atom)), None)
    if place is None or any(_has_like(extent, atom) for shape in held.values() for extent in shape):
        return False
    peers = [module for module in modules.values() if type(module) is type(owner)]
    return all(_size_at(axes, peer, *place) == getattr(peer, name, None) for peer in peers)


def _places(path: str, shape: Shape, atom: Atom) -> Iterator[tuple[str, int, int]]:
    for dim, extent in enumerate(shape):
        if atom in leaves(extent):
            yield path, dim, leaves(extent).index(atom)


def _has_like(extent: Extent, atom: Atom) -> bool:
    """Say whether consecutive factors of a dimension, other than the atom itself, have its size."""
    flat = leaves(extent)
    runs = (flat[start:end] for start in range(len(flat)) for end in range(start + 1, len(flat) + 1))
    return any(extent_size(run) == atom.size and run != [atom] for run in runs)


def _size_at(axes: Axes, module: nn.Module, path: str, dim: int, index: int) -> Any:
    """Return the size of a factor of a parameter of `module`; None where it has no such one."""
    tensor = dict(module.named_parameters()).get(path)
    if tensor is None or tensor.dim() <= dim:
        return None
    flat = leaves(axes.tensor(tensor)[dim])
    return flat[index].size if index < len(flat) else None
