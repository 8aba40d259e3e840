"""A copy of a model's graph in the making, from which values are read out."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from kroncc.errors import PlanError, did_you_mean
from kroncc.graph.attention import ExplicitAttention
from kroncc.graph.flow import AttentionFlow, find_flow
from kroncc.graph.model_graph import ModelGraph
from kroncc.graph.modules import Attention
from kroncc.graph.ops import module_of, value_of
from kroncc.graph.storage import sweep
from kroncc.graph.walk import only

OPERANDS = ("attention.queries", "attention.keys", "attention.values")
NAMED = (
    "embeddings",
    "hidden",
    "ffn.output",
    "attention.scores",
    "attention.probs",
    *OPERANDS,
    "logits",
    "sentence",
)
MISSING = {
    "embeddings": "no layer was found whose input they would be",
    "hidden": "no layer was found",
    "ffn.output": "no feed-forward pair was found",
    "attention.scores": "no attention was found",
    "attention.probs": "no attention was found",
    **dict.fromkeys(OPERANDS, "no attention was found"),
    "logits": "it has no such output",
    "sentence": "no last hidden state was found",
}


def masked_mean(hidden: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Return the mean `[B, d]` of `hidden [B, L, d]` over the positions where `mask [B, L]` is not 0."""
    if mask is None:
        return hidden.mean(1)
    weights = mask.to(hidden.dtype).unsqueeze(-1)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


class Draft:
    """A copy of the graph of `mg`; `read` finds the values of a tap, `close` makes them outputs."""

    def __init__(self, mg: ModelGraph) -> None:
        self.mg = mg
        self.flow = find_flow(mg.graph)
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, fx.Node] = {}
        self.outputs: Any = self.graph.graph_copy(mg.graph, self.copies)
        self.extras = dict(mg.extras)
        self.explicit: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}

    def has(self, tap: str) -> bool:
        """Say whether the model has the values of a named tap."""
        origins = self._origins(tap)
        if tap not in OPERANDS:
            return bool(origins)
        return bool(origins) and all(_has_heads(_operand(one, tap)) for one in self._attentions())

    def read(self, tap: str) -> list[fx.Node]:
        """Return the nodes of this copy that hold a tap's values, in order. Raises `PlanError` K710, K711."""
        if tap not in NAMED:
            return [self._kept(node) for node in self._module_outputs(tap)]
        origins = self._origins(tap)
        if not origins:
            raise self._missing(tap)
        if tap == "sentence":
            return [self._sentence(self.copies[origins[0]])]
        if tap in OPERANDS:
            return [self._operand(one, tap) for one in self._attentions()]
        if tap.startswith("attention."):
            place = 0 if tap == "attention.scores" else 1
            return [self._attention(one)[place] for one in self._attentions()]
        return [self._kept(node) for node in origins]

    def close(self, values: Mapping[str, Sequence[fx.Node]], outputs: bool) -> fx.GraphModule:
        """Return the finished module: it gives a pair (outputs by name, lists of tap values by name)."""
        self.graph.output(
            (self.outputs if outputs else {}, {tap: list(nodes) for tap, nodes in values.items()})
        )
        sweep(self.graph)
        self.graph.lint()
        return ModelGraph(self.graph, self.mg.model, self.extras, self.mg.dtype).module

    def _attentions(self) -> list[AttentionFlow]:
        return [one for layer in self.flow.layers for one in layer.attentions]

    def _origins(self, tap: str) -> list[fx.Node]:
        """Return the nodes of the model's graph that a named tap is about."""
        flow, outputs = self.flow, self.mg.outputs
        if tap == "embeddings":
            return flow.entries
        if tap == "hidden":
            return flow.hidden
        if tap == "ffn.output":
            return [pair.down for layer in flow.layers for pair in layer.feeds]
        if tap == "logits":
            return [outputs[tap]] if tap in outputs else []
        if tap == "sentence":
            named = [
                outputs[name]
                for name in ("last_hidden_state", "encoder_last_hidden_state")
                if name in outputs
            ]
            return (named[-1:] or flow.lasts)[:1]
        return [one.node for one in self._attentions()]

    def _missing(self, tap: str) -> PlanError:
        have = [name for name in NAMED if self.has(name)]
        remedy = "tap 'sentence', or give the model a task with a head" if tap == "logits" else ""
        return PlanError(
            f"{type(self.mg.model).__name__} has no {tap!r}: {MISSING[tap]}",
            code="K711",
            expected=f"one of {', '.join(have)}" if have else "the FQN of a module",
            remedy=remedy,
        )

    def _module_outputs(self, fqn: str) -> list[fx.Node]:
        """Return what each call of a module gives: a leaf's node, or the value that leaves a container."""
        calls = [node for node in self.mg.calls(fqn) if value_of(node) is not None]
        calls = calls or [last for last in map(_leaving, self._inside(fqn)) if last is not None]
        if calls:
            return calls
        known = dict(self.mg.model.named_modules())
        if fqn in known:
            raise PlanError(
                f"module {fqn!r} gives no tensor, or several",
                code="K711",
                expected="a module that is called and returns one tensor",
            )
        raise PlanError(
            f"no tap and no module is called {fqn!r}",
            code="K710",
            expected=f"a tap ({', '.join(NAMED)}) or the FQN of a module",
            remedy=did_you_mean(fqn, [*NAMED, *filter(None, known)]),
        )

    def _inside(self, fqn: str) -> list[list[fx.Node]]:
        """Return the nodes of each call of a container module; the keys of the stack tell calls apart."""
        groups: dict[str, list[fx.Node]] = {}
        for node in self.mg.graph.nodes:
            for key, entry in (node.meta.get("nn_module_stack") or {}).items():
                if entry[0] == fqn and fqn:
                    groups.setdefault(key, []).append(node)
        return list(groups.values())

    def _kept(self, origin: fx.Node) -> fx.Node:
        """Return the node's copy, or a clone of its value where a later node writes into it."""
        node = self.copies[origin]
        if not self.flow.walker.storage.written_after(origin):
            return node
        return self._after(node, torch.ops.aten.clone.default, (node,), value_of(node))

    def _after(
        self, node: fx.Node, target: Callable[..., Any], args: tuple[Any, ...], value: torch.Tensor | None
    ) -> fx.Node:
        with self.graph.inserting_after(node):
            added = self.graph.call_function(target, args)
        added.meta = {**node.meta, "val": value}
        return added

    def _sentence(self, hidden: fx.Node) -> fx.Node:
        mask = next(
            (n for n in self.graph.find_nodes(op="placeholder") if n.target == "attention_mask"), None
        )
        value = value_of(hidden)
        mean = None if value is None else masked_mean(value)
        return self._after(hidden, masked_mean, (hidden, mask), mean)

    def _attention(self, one: AttentionFlow) -> tuple[fx.Node, fx.Node]:
        """Return the nodes of scores and probabilities `[B, H, L, S]` of one attention."""
        if one.node not in self.explicit:
            self.explicit[one.node] = self._computed(one) if one.scores is not None else self._unfused(one)
        return self.explicit[one.node]

    def _operand(self, one: AttentionFlow, tap: str) -> fx.Node:
        """Return the node of queries, keys or values `[B, H, L, d]`; computed scores take keys as columns."""
        origin = _operand(one, tap)
        node, value = self._kept(origin), value_of(origin)
        if value is None or not _has_heads(origin):
            raise PlanError(
                f"{type(self.mg.model).__name__} folds its heads: no {tap!r} [batch, heads, length, size]",
                code="K711",
                expected="an attention whose heads are a dimension of their own",
                remedy="read 'hidden' or the FQN of a linear map",
            )
        if tap == "attention.keys" and one.scores is not None:
            return self._after(node, torch.ops.aten.transpose.int, (node, -2, -1), value.transpose(-2, -1))
        return node

    def _computed(self, one: AttentionFlow) -> tuple[fx.Node, fx.Node]:
        """Read what the source computes itself; its heads may be folded into the batch."""
        assert one.scores is not None
        assert one.probs is not None
        scores, probs = self._kept(one.scores), self._kept(one.probs)
        given, wanted = value_of(scores), value_of(probs)
        if given is not None and wanted is not None and given.dim() != wanted.dim():
            scores = self._after(probs, torch.Tensor.reshape_as, (scores, probs), wanted)
        return scores, probs

    def _unfused(self, one: AttentionFlow) -> tuple[fx.Node, fx.Node]:
        """Replace a fused attention by explicit maths; return its scores and probabilities."""
        node, fused = self.copies[one.node], module_of(one.node)
        assert isinstance(fused, Attention)
        explicit = ExplicitAttention.like(fused)
        target = f"{node.target}_explicit"
        self.extras[target] = explicit
        given = [value_of(operand) for operand in (one.q, one.k, one.v)]
        with self.graph.inserting_before(node):
            call = self.graph.call_module(target, node.args, node.kwargs)
        values = explicit(*given)
        call.meta = {**node.meta, "val": values}
        parts = [self._after(call, operator.getitem, (call, place), values[place]) for place in (2, 1, 0)]
        node.replace_all_uses_with(parts[2])
        self.copies[one.node] = parts[2]
        self.graph.erase_node(node)
        return parts[1], parts[0]


def _operand(one: AttentionFlow, tap: str) -> fx.Node:
    return dict(zip(OPERANDS, (one.q, one.k, one.v), strict=True))[tap]


def _has_heads(node: fx.Node) -> bool:
    value = value_of(node)
    return value is not None and value.dim() == 4


def _leaving(nodes: list[fx.Node]) -> fx.Node | None:
    """Return the one of `nodes` whose tensor is used by a node outside of them; None where several are."""
    inside = set(nodes)
    leaving = [node for node in nodes if set(node.users) - inside]
    return only(
        node for node in leaving if (value := value_of(node)) is not None and value.is_floating_point()
    )
