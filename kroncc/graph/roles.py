"""Roles of modules, found from the data flow: no class and no module is known by name.

| role | what it is |
|---|---|
| attention.q, .k, .v | the linear map that feeds that operand of an attention; `.qkv` feeds several of them |
| attention.out | the first linear map that takes an attention's output |
| ffn.up, .down | two linear maps, elementwise functions between, the second added to the residual stream |
| ffn.gate | of two maps up, the one whose branch is activated; a map that gives both branches is `ffn.up` |
| embedding.word, .type | a table indexed by token ids, by segment ids, whose rows enter the first layer |
| embedding.position | a table indexed by what does not depend on the tokens themselves |
| norm | a normalisation module |
| pooler | a linear map after the last layer that takes one vector a sequence and does not give an output |
| head | any other linear map after the last layer |

Cross-attention has the roles of attention. A module that serves several layers has a role and no layer.
Linear maps between tables and the first layer, and those of position biases, have no role.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from kroncc.graph.flow import Flow, find_flow
from kroncc.graph.model_graph import ModelGraph
from kroncc.graph.ops import ARITHMETIC, SHAPE, module_of, op_name, value_of
from kroncc.graph.walk import Walker
from kroncc.recipe.targets import ModuleInfo

DIRECT = SHAPE | {"clamp", "masked_fill", "where", "gather"}
CONSTANT = {"zeros", "zeros_like", "new_zeros", "full", "full_like", "new_full"}


@dataclass(frozen=True)
class Role:
    """What a module is for, and in which layer (from 0, encoder first; None: in none, or in several)."""

    name: str
    layer: int | None = None


def find_roles(mg: ModelGraph) -> dict[str, Role]:
    """Return the role of every module that has one, by FQN, in the order of the graph."""
    return roles_of(find_flow(mg.graph))


def roles_of(flow: Flow) -> dict[str, Role]:
    """Return the role of every module that has one, from a flow that is already known."""
    found: dict[fx.Node, Role] = {}
    for place, layer in enumerate(flow.layers):
        for attention in layer.attentions:
            found |= {linear: Role(f"attention.{name}", place) for linear, name in attention.maps.items()}
            found |= {attention.out: Role("attention.out", place)} if attention.out else {}
        for pair in layer.feeds:
            found |= {up: Role("ffn.up", place) for up in pair.ups}
            found |= {gate: Role("ffn.gate", place) for gate in pair.gates}
            found[pair.down] = Role("ffn.down", place)
    for node in flow.walker.nodes:
        if node not in found and (role := _outside(flow, node)) is not None:
            found[node] = role
    return _by_module(flow.walker, found)


def _outside(flow: Flow, node: fx.Node) -> Role | None:
    """Return the role of a node that is no part of an attention or a feed-forward pair."""
    kind = flow.walker.kind(node)
    if kind == "norm":
        return Role("norm", _layer_of_norm(flow, node))
    if kind == "embedding":
        return _embedding(flow, node)
    return _linear(flow, node) if kind == "linear" else None


def _layer_of_norm(flow: Flow, node: fx.Node) -> int | None:
    """Return the layer whose stream the norm takes; what follows a pre-norm stack has none."""
    for place in reversed(range(len(flow.layers))):
        layer, enters = flow.layers[place], flow.layers[place].stream()
        if enters is None or node is enters or not flow.walker.depends(node, enters):
            continue
        after = flow.walker.depends(node, layer.end())
        return (
            place if not after or (layer.is_post_norm(flow.walker) and flow.hidden[place] is node) else None
        )
    return None


def _embedding(flow: Flow, node: fx.Node) -> Role | None:
    """Return the role of a table whose rows enter a stack; others (relative position biases) have none."""
    if flow.entries and not any(flow.walker.depends(entry, node) for entry in flow.entries):
        return None
    return Role(f"embedding.{_indexed_by(flow.walker, node)}")


def _indexed_by(walker: Walker, node: fx.Node) -> str:
    index = node.all_input_nodes[0]
    while op_name(index) in DIRECT and walker.operands(index):
        index = walker.operands(index)[0]
    if index.op == "placeholder":
        name = str(index.target)
        return "word" if name.endswith("input_ids") else "type" if "type" in name else "position"
    if op_name(index) in CONSTANT or (index.op == "get_attr" and _fewer_rows(node, index)):
        return "type"
    return "position"


def _fewer_rows(node: fx.Node, index: fx.Node) -> bool:
    """Say whether the table is too short for a constant index to count positions: it is one segment."""
    rows, indices = getattr(module_of(node), "num_embeddings", None), value_of(index)
    return rows is not None and indices is not None and rows < indices.numel()


def _linear(flow: Flow, node: fx.Node) -> Role | None:
    """Return head or pooler for a map that follows a stack and feeds no layer of any stack."""
    walker = flow.walker
    ends = [last for last in flow.lasts if walker.depends(node, last)]
    feeds_layer = any(walker.depends(layer.end(), node) for layer in flow.layers)
    if feeds_layer or (flow.layers and not ends):
        return None
    return Role("pooler" if ends and _pools(ends[-1], node) and not _gives_output(node) else "head")


def _pools(last: fx.Node, node: fx.Node) -> bool:
    """Say whether the map takes fewer vectors a sequence than the last hidden state has."""
    hidden, given = value_of(last), value_of(node.all_input_nodes[0])
    if hidden is None or given is None:
        return False
    if given.dim() != hidden.dim():
        return given.dim() < hidden.dim()
    return str(given.shape[1]) != str(hidden.shape[1])


def _gives_output(node: fx.Node) -> bool:
    """Say whether the map's value is an output as it is, or after views and arithmetic only."""
    return any(
        user.op == "output" or (op_name(user) in SHAPE | ARITHMETIC and _gives_output(user))
        for user in node.users
    )


def _by_module(walker: Walker, found: dict[fx.Node, Role]) -> dict[str, Role]:
    """Join the roles of a module's calls: the first one names it; calls in several layers leave no layer."""
    roles: dict[str, Role] = {}
    for node in walker.nodes:
        if node not in found:
            continue
        fqn, role = str(node.target), found[node]
        if fqn not in roles:
            roles[fqn] = role
        elif roles[fqn].layer != role.layer:
            roles[fqn] = Role(roles[fqn].name)
    return roles


def module_infos(mg: ModelGraph) -> list[ModuleInfo]:
    """Return what targets may ask of every module that the graph calls, in the order of first call."""
    roles = find_roles(mg)
    return [
        ModuleInfo(
            fqn=fqn,
            type=type(mg.get(fqn)).__name__,
            roles=(roles[fqn].name,) if fqn in roles else (),
            layer=roles[fqn].layer if fqn in roles else None,
        )
        for fqn in mg.fqns()
    ]
