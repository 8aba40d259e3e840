"""One pass on one site: the step that planning, applying and loading share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from kroncc.errors import KronccError, PassError
from kroncc.rewrite.base import Site, SitePass, Skip

FAULTS = ("K404", "K450")  # of the pass itself, whatever the model


@dataclass(frozen=True)
class Treated:
    """A site that was rewritten: the pass with explicit options, the new module, the new tied partners."""

    options: SitePass
    module: nn.Module
    partners: Mapping[str, nn.Module]


def treat(
    pass_: SitePass, site: Site, partners: Mapping[str, nn.Module], *, live: bool = False
) -> Treated | Skip:
    """Apply `pass_` to `site` and to the modules tied to it; return what changed, or why nothing did.

    `partners` maps the FQN of every module that shares the site's weight to that module. With `live`, the new
    modules are those that stand there while a step trains.
    """
    if not isinstance(site.module, pass_.accepts):
        names = ", ".join(cls.__name__ for cls in pass_.accepts)
        return Skip(f"is a {type(site.module).__name__}; {pass_.kind} treats {names}")
    try:
        resolved = pass_.resolve(site)
        if isinstance(resolved, Skip):
            return resolved
        module = resolved.live(site) if live else resolved.replace(site)
    except KronccError:
        raise
    except Exception as error:
        raise PassError(
            f"pass {pass_.kind!r} failed on {site.fqn}: {type(error).__name__}: {error}",
            code="K404",
            remedy="this is a fault of the pass; report it to its owner",
        ) from error
    if isinstance(module, Skip):
        return module
    tied_to: Callable[[nn.Module], nn.Module] | None = getattr(module, "tied_to", None)
    if partners and tied_to is None:
        shared = ", ".join(partners)
        return Skip(
            f"its weight is tied to {shared}, and {type(module).__name__} does not say how to share it"
        )
    followers = {fqn: tied_to(partner) for fqn, partner in partners.items()} if tied_to else {}
    for fqn, new in {site.fqn: module, **followers}.items():
        make_contiguous(new)
        _reject_lost_buffers(pass_, fqn, new)
    return Treated(resolved, module, followers)


def make_contiguous(module: nn.Module) -> None:
    """Lay out all Parameters in row-major order, as they are on disk: another order gives other last bits."""
    for parameter in module.parameters():
        parameter.data = parameter.data.contiguous()


def _reject_lost_buffers(pass_: SitePass, fqn: str, module: nn.Module) -> None:
    """A buffer that is not saved comes back from `from_pretrained` uninitialised: refuse it at once."""
    for name, part in module.named_modules():
        if part._non_persistent_buffers_set:
            buffers = ", ".join(sorted(part._non_persistent_buffers_set))
            raise PassError(
                f"pass {pass_.kind!r} on {fqn}: buffers that are not saved would be lost on loading: "
                f"{name + ': ' if name else ''}{buffers}",
                code="K450",
                remedy="register them with persistent=True, or compute them in forward",
            )
