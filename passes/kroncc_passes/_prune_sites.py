"""What `prune-weights` may prune of a module, and how important each weight is."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kroncc.api import PassError, Site
from kroncc_passes._dense import DENSE, unsupported
from kroncc_passes._prune_store import PrunedStore
from kroncc_passes._stored import Stored, weight_names

STORES = "stores"  # where a module keeps weights that have another form already


def matrices(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights of a module that can be pruned, by name: floats, of two dimensions or more."""
    return {
        name: weight
        for name, weight in weight_names(module).items()
        if weight.dim() > 1 and STORES not in name.split(".")
    }


def pruned(module: nn.Module) -> dict[str, PrunedStore]:
    """Return the stores of a module's pruned weights, by the name of the weight."""
    return {
        ".".join(part for part in name.split(".") if part != STORES): store
        for name, store in module.named_modules()
        if isinstance(store, PrunedStore)
    }


def unfit(module: nn.Module, kind: str) -> str:
    """Return why the pass `kind` cannot prune a module, or nothing.

    It prunes dense modules and what passes have made of them.
    """
    found = matrices(module)
    if type(module) in DENSE:
        return unsupported(module, kind)
    if isinstance(module, Stored) and not found:
        return f"keeps its weights in another form already: {module.shape_text()}"
    if not found:
        return "has no weight matrix"
    if isinstance(module, Stored) or callable(getattr(module, "tied_to", None)):
        return ""
    return (
        f"is a {type(module).__name__}; {kind} treats Linear, Conv1D, Embedding and what passes make of them"
    )


def undivided(module: nn.Module, m: int) -> str:
    """Return which weight of a module cannot be cut into groups of `m` along its inputs, or nothing."""
    for name, weight in matrices(module).items():
        inputs = weight.shape[0 if isinstance(module, Conv1D) else -1]
        if inputs % m:
            return f"has a {name} with {inputs} inputs, which do not divide into groups of {m}"
    return ""


def check_kept(site: Site, kept: Mapping[str, int]) -> None:
    """Raise PassError K480 unless `kept` has a possible count for each weight of the site."""
    sizes = {name: weight.numel() for name, weight in matrices(site.module).items()}
    if sizes.keys() == kept.keys() and all(kept[name] <= size for name, size in sizes.items()):
        return
    raise PassError(
        f"{site.fqn}: `kept` counts {dict(kept)}, the weights have {sizes} entries",
        code="K480",
        expected="a count for each weight, no more than it has",
        remedy="leave `kept` to the pass",
    )


def importance(site: Site, name: str, by: str) -> Tensor:
    """Return what the entries of a weight are ranked by, float32, of its shape.

    `fisher` and `activations` read `site.stats`; else it is the size. Raises PassError K425 for a weight that
    is not finite.
    """
    weight = site.module.get_parameter(name).detach()
    if not bool(weight.isfinite().all()):
        raise PassError(
            f"{site.fqn}: its {name} is not finite",
            code="K425",
            expected="finite weights",
            remedy="check the training that made the model",
        )
    size = weight.float().abs()
    if by == "fisher":
        assert site.stats is not None
        assert site.stats.fisher is not None
        return size.square() * site.stats.fisher.to(size.device)
    if by == "activations":
        return size * _reach(site).to(size.device)
    return size


def _reach(site: Site) -> Tensor:
    """Return how strongly each input, or each row of a table, is used; it broadcasts over the weight."""
    assert site.stats is not None
    if isinstance(site.module, nn.Embedding):
        assert site.stats.lookups is not None
        return site.stats.lookups.clamp_min(0).sqrt().unsqueeze(1)
    assert site.stats.moment is not None
    used = site.stats.moment.diagonal().clamp_min(0).sqrt()
    return used.unsqueeze(1) if isinstance(site.module, Conv1D) else used
