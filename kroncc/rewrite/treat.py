"""One pass on one site: the step that planning, applying and loading share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from kroncc.errors import KronccError, PassError
from kroncc.rewrite.base import Site, SitePass, Skip


@dataclass(frozen=True)
class Treated:
    """A site that was rewritten: the pass with explicit options, the new module, the new tied partners."""

    options: SitePass
    module: nn.Module
    partners: Mapping[str, nn.Module]


def treat(pass_: SitePass, site: Site, partners: Mapping[str, nn.Module]) -> Treated | Skip:
    """Apply `pass_` to `site` and to the modules tied to it; return what changed, or why nothing did.

    `partners` maps the FQN of every module that shares the site's weight to that module.
    """
    if not isinstance(site.module, pass_.accepts):
        names = ", ".join(cls.__name__ for cls in pass_.accepts)
        return Skip(f"is a {type(site.module).__name__}; {pass_.kind} treats {names}")
    try:
        resolved = pass_.resolve(site)
        if isinstance(resolved, Skip):
            return resolved
        module = resolved.replace(site)
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
    if partners and not hasattr(module, "tied_to"):
        shared = ", ".join(partners)
        return Skip(
            f"its weight is tied to {shared}, and {type(module).__name__} does not say how to share it"
        )
    return Treated(resolved, module, {fqn: module.tied_to(partner) for fqn, partner in partners.items()})
