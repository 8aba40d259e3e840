"""Where a model has an entry a token, and what its configs say of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from kroncc.api import ModelGraph, Span


def spans(graph: ModelGraph, table: nn.Parameter, rows: int) -> tuple[Span, ...]:
    """Return where the model has an entry a token: the table and its ties, the output head.

    A Parameter that nothing reads has one if its last extent says so, as the second bias of an untied head.
    """
    model = graph.model
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for named in (
        model.named_parameters(remove_duplicate=False),
        model.named_buffers(remove_duplicate=False),
    ):
        for name, tensor in named:
            names.setdefault(id(tensor), []).append(name)
            tensors[id(tensor)] = tensor
    last, read = _last(graph), {str(node.target) for node in graph.graph.nodes}
    found = []
    for key, tensor in tensors.items():
        owners = {name.rpartition(".")[0] for name in names[key]}
        if tensor is table or (owners & last and tensor.shape[0] == rows):
            found.append(Span(tuple(names[key]), 0, 1, rows, 1))
        elif tensor.shape[-1:] == (rows,) and (last & set(names[key]) or _idle(tensor, names[key], read)):
            found.append(Span(tuple(names[key]), tensor.dim() - 1, 1, rows, 1))
    return tuple(found)


def _idle(tensor: Tensor, names: Sequence[str], read: set[str]) -> bool:
    """Say whether nothing in a graph that reads the targets `read` reads a Parameter."""
    above = {
        ".".join(parts[:end])
        for name in names
        for parts in [name.split(".")]
        for end in range(len(parts) + 1)
    }
    return isinstance(tensor, nn.Parameter) and not above & read


def _last(graph: ModelGraph) -> set[str]:
    """Return the modules and the tensors that the logits come from without another module between."""
    found, seen = set(), set()
    nodes = [node for name, node in graph.outputs.items() if "logits" in name]
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op in ("call_module", "get_attr"):
            found.add(str(node.target))
        else:
            nodes += node.all_input_nodes
    return found


def configs_of(model: nn.Module) -> list[Any]:
    """Return the configs of a model, its parts and its generation, each once."""
    held = [
        getattr(module, key, None) for module in model.modules() for key in ("config", "generation_config")
    ]
    whole = [config for config in held if config is not None]
    inner = [part for config in whole for part in vars(config).values() if hasattr(part, "vocab_size")]
    return list({id(config): config for config in (*whole, *inner)}.values())


def token_numbers(config: Any) -> list[int]:
    """Return the token numbers in a config."""
    values = [value for key, value in vars(config).items() if key.endswith("_token_id")]
    flat = [at for value in values for at in (value if isinstance(value, list) else [value])]
    return [at for at in flat if isinstance(at, int)]


def renumber(config: Any, keep: int, renumbered: Mapping[int, int]) -> None:
    """Set the vocabulary's size, and token numbers as far as the new ones are known."""
    if getattr(config, "vocab_size", None) is not None:
        config.vocab_size = keep
    for key, value in list(vars(config).items()) if renumbered else ():
        if not key.endswith("_token_id") or value is None:
            continue
        new = (
            [renumbered.get(at, at) for at in value]
            if isinstance(value, list)
            else renumbered.get(value, value)
        )
        setattr(config, key, new)


def move_padding(module: nn.Embedding, renumbered: Mapping[int, int]) -> None:
    """Set `padding_idx` to its new row; where that is not known, to one that there is."""
    at = module.padding_idx
    if at is not None:
        module.padding_idx = renumbered.get(at, min(at, module.num_embeddings - 1))
