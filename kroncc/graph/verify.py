"""What must hold of a model graph after every pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from kroncc.errors import PassError
from kroncc.graph.model_graph import ModelGraph
from kroncc.graph.propagate import ShapeRun, trial_sizes
from kroncc.graph.symbolic import shape_text, symbols

Ties = frozenset[frozenset[str]]


@dataclass(frozen=True)
class GraphStructure:
    """What a graph promises: tensors (name -> shape, dtype), tied modules, signature, what it never calls."""

    tensors: dict[str, tuple[tuple[int, ...], str]]
    ties: Ties
    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str], ...]
    uncalled: frozenset[str]  # parameters that the graph does not reach, such as those of an unused pooler


def structure_of(mg: ModelGraph) -> GraphStructure:
    """Return the structure of a model graph; the same on meta and with weights."""
    tensors = mg.model.state_dict(keep_vars=True)
    return GraphStructure(
        tensors={name: (tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors.items()},
        ties=frozenset(frozenset(group) for group in mg.ties()),
        inputs=_signature(mg, {str(n.target): n for n in mg.graph.find_nodes(op="placeholder")}),
        outputs=_signature(mg, mg.outputs),
        uncalled=frozenset(uncalled(mg)),
    )


def _signature(mg: ModelGraph, nodes: dict[str, fx.Node]) -> tuple[tuple[str, str], ...]:
    names = symbols(mg.graph)
    return tuple(
        (name, f"{node.meta['val'].dtype}{shape_text(node.meta['val'], names)}")
        for name, node in nodes.items()
    )


def uncalled(mg: ModelGraph) -> list[str]:
    """Return the model's parameters that the graph does not reach."""
    reached = {id(parameter) for parameter in mg.module.parameters()}
    return [name for name, parameter in mg.model.named_parameters() if id(parameter) not in reached]


def verify(
    mg: ModelGraph, before: GraphStructure | None = None, ties: Iterable[Iterable[str]] | None = None
) -> None:
    """Check a model graph; with `before`, also that a pass kept the signature and the ties.

    `ties` declares the groups of modules that share parameters; without it they must be those of `before`.
    Raises PassError: K440 the graph is broken, K441 the views differ, K442 shapes, K443 signature, K444 ties,
    K445 parameters that nothing reads.
    """
    _check_graph(mg)
    _check_views(mg)
    _check_shapes(mg)
    if before is None:
        return
    now = structure_of(mg)
    if (before.inputs, before.outputs) != (now.inputs, now.outputs):
        raise _broken(
            "K443",
            "the inputs or outputs of the graph changed",
            f"{_text(before.inputs)} -> {_text(before.outputs)}",
            f"got {_text(now.inputs)} -> {_text(now.outputs)}",
        )
    _check_ties(before.ties if ties is None else frozenset(frozenset(group) for group in ties), now.ties)
    lost = sorted(now.uncalled - before.uncalled)
    if lost:
        raise _broken("K445", f"nothing reads {', '.join(lost[:5])}", "no orphan parameters", "remove them")


def verify_reshaped(mg: ModelGraph, before: GraphStructure, *, unread: bool = False) -> None:
    """Check a model graph that was captured again after its tree changed.

    Inputs stay; outputs keep their names and types, and may differ in the last extent alone (a narrower
    hidden state). Ties are those that the new tree has. With `unread`, parameters may lose their last reader.
    Raises PassError as `verify`.
    """
    verify(mg)
    now = structure_of(mg)
    loose = [tuple((name, text.rpartition(",")[0]) for name, text in side.outputs) for side in (before, now)]
    if before.inputs != now.inputs or loose[0] != loose[1]:
        raise _broken(
            "K443",
            "the inputs or outputs of the model changed",
            f"{_text(before.inputs)} -> {_text(before.outputs)}",
            f"got {_text(now.inputs)} -> {_text(now.outputs)}",
        )
    had = before.tensors.keys() - before.uncalled
    lost = sorted(name for name in now.uncalled - before.uncalled if name in had)
    if lost and not unread:
        raise _broken("K445", f"nothing reads {', '.join(lost[:5])}", "no orphan parameters", "remove them")


def _broken(
    code: str, message: str, expected: str, remedy: str = "report this to the owner of the pass"
) -> PassError:
    return PassError(message, code=code, expected=expected, remedy=remedy)


def _text(signature: tuple[tuple[str, str], ...]) -> str:
    return ", ".join(f"{name}: {text}" for name, text in signature)


def _check_graph(mg: ModelGraph) -> None:
    try:
        mg.graph.lint()
    except Exception as error:
        raise _broken(
            "K440", f"the graph is broken: {error}", "a graph that fx.Graph.lint accepts"
        ) from error


def _check_views(mg: ModelGraph) -> None:
    for fqn in mg.fqns():
        if mg.module.get_submodule(fqn) is not mg.get(fqn):
            raise _broken(
                "K441", f"{fqn!r} is not the same module in graph and tree", "one module in both views"
            )
    known = {id(parameter) for parameter in mg.model.parameters()}
    known |= {
        id(p) for extra in mg.extras.values() if hasattr(extra, "parameters") for p in extra.parameters()
    }
    for name, parameter in mg.module.named_parameters():
        if id(parameter) not in known:
            raise _broken(
                "K441", f"the graph trains {name!r}, which the model does not hold", "one set of parameters"
            )


def _check_shapes(mg: ModelGraph) -> None:
    for sizes in trial_sizes(mg.graph):
        try:
            wrong = ShapeRun(mg.module, sizes).run_on_meta()
        except Exception as error:
            raise _broken(
                "K442", f"the graph does not run at {sizes}: {error}", "a graph that runs on meta"
            ) from error
        if wrong:
            raise _broken("K442", f"at {sizes}, {wrong[0]}", "the shapes and dtypes that the graph carries")


def _check_ties(declared: Ties, now: Ties) -> None:
    if declared == now:
        return
    gone = [" = ".join(sorted(group)) for group in sorted(declared - now, key=sorted)]
    new = [" = ".join(sorted(group)) for group in sorted(now - declared, key=sorted)]
    said = [f"no longer tied: {', '.join(gone)}"] if gone else []
    said += [f"tied without being declared: {', '.join(new)}"] if new else []
    raise _broken(
        "K444", "; ".join(said), "modules tied exactly where declared", "declare the ties that the pass makes"
    )


def same_structure(promised: GraphStructure, real: GraphStructure) -> None:
    """Check that the rewrite of real weights gave what the run on meta promised. Raises PassError (K446)."""
    if promised.tensors == real.tensors and promised.ties == real.ties:
        return
    names = sorted(promised.tensors.keys() | real.tensors.keys())
    lines = [
        f"{name}: promised {promised.tensors.get(name, 'nothing')}, got {real.tensors.get(name, 'nothing')}"
        for name in names
        if promised.tensors.get(name) != real.tensors.get(name)
    ]
    lines = lines or ["other modules are tied"]
    raise _broken("K446", "; ".join(lines[:5]), "on real weights, the tensors that the plan shows")
