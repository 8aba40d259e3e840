"""What a pass is: frozen options and one rewrite."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict
from torch import nn


@dataclass(frozen=True)
class Skip:
    """A pass leaves a site alone, and says why."""

    reason: str


@dataclass(frozen=True)
class Site:
    """One module that a target matched.

    `module` holds meta tensors while planning and real ones while applying. `tied` names the other
    modules that share its weight; the framework asks the replacement for theirs (`tied_to`).
    """

    fqn: str
    module: nn.Module
    role: str = ""
    layer: int | None = None
    tied: tuple[str, ...] = ()
    seed: int = 0
    stats: dict[str, Any] = field(default_factory=dict)


class Pass(BaseModel, ABC):
    """Base of all passes. The fields of a subclass are its options in the recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: ClassVar[str]
    version: ClassVar[int] = 1


class SitePass(Pass):
    """A pass that treats one module at a time: one module in, one out.

    `resolve` returns the same pass with every option made explicit for a site (or a `Skip`);
    `replace` builds the new module. Both must be pure and must work on meta tensors: there, `replace`
    returns the module with the right shapes and leaves out whatever reads values.
    """

    accepts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)

    def resolve(self, site: Site) -> Self | Skip:  # noqa: ARG002  (subclasses read it)
        """Return this pass with all options explicit for `site`, or a `Skip` with the reason."""
        return self

    @abstractmethod
    def replace(self, site: Site) -> nn.Module | Skip:
        """Return the module that takes the place of `site.module`, or a `Skip` with the reason.

        The new module takes and returns the same shapes. It may define `flops(shape) -> int` (input shape in,
        2 a multiply-add) for the cost model, and `tied_to(module) -> nn.Module` if its weight may be tied.
        """
