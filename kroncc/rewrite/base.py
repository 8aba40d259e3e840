"""What a pass is: frozen options and one rewrite."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from kroncc.errors import PassError

if TYPE_CHECKING:
    from kroncc.graph.model_graph import ModelGraph
    from kroncc.graph.rewriter import Rewriter


@dataclass(frozen=True)
class Skip:
    """A pass leaves a site alone, and says why."""

    reason: str


@dataclass(frozen=True)
class Calibration:
    """What a pass wants to know of a site before it rewrites it; measured on the rows of `calibrate`.

    `moments`: how the site's inputs are spread (of an embedding: how often each row is looked up).
    `fisher`: the mean squared gradient of each weight, over examples.
    `saliency`: sizes of groups of consecutive input features; for each group the mean over examples of
    abs(sum of x dL/dx), which is abs(dL/dgate) of a gate of 1 on the group.
    `influence`: of a layer, how far its output turns away from its input, 1 - cos(in, out).
    `sequential`: moments as they are when everything before the site is already rewritten, and the cross
    moment with what the site gets in the model before the step.
    """

    moments: bool = False
    fisher: bool = False
    saliency: frozenset[int] = frozenset()
    influence: bool = False
    sequential: bool = False

    def __or__(self, other: Calibration) -> Calibration:
        return Calibration(**{f.name: getattr(self, f.name) | getattr(other, f.name) for f in fields(self)})

    def __bool__(self) -> bool:
        return self != Calibration()


@dataclass(frozen=True)
class SiteStats:
    """What was measured at one site; None for what nobody asked for. float32 on CPU.

    `count` is the number of vectors seen (positions of padding left out). `mean` [in] and `moment` [in, in]
    = E[x x^T] of a linear map's inputs x; `cross` [in, in] = E[t x^T], where t is the input at the same place
    in the model before the step (sequential only), `cross_mean` [in] = E[t]. `lookups` [rows] of an
    embedding. `fisher` is shaped as the weight. `saliency` maps a group size to [in / size].
    """

    count: int = 0
    mean: Tensor | None = None
    moment: Tensor | None = None
    cross: Tensor | None = None
    cross_mean: Tensor | None = None
    lookups: Tensor | None = None
    fisher: Tensor | None = None
    saliency: Mapping[int, Tensor] = field(default_factory=dict)
    influence: float | None = None


@dataclass(frozen=True)
class Site:
    """One module that a target matched.

    `module` holds meta tensors while planning and real ones while applying. `tied` names the other
    modules that share its weight; the framework asks the replacement for theirs (`tied_to`). `stats` is what
    the pass asked for in `needs`; None while planning and loading, where only shapes count.
    """

    fqn: str
    module: nn.Module
    role: str = ""
    layer: int | None = None
    tied: tuple[str, ...] = ()
    seed: int = 0
    stats: SiteStats | None = None


class Pass(BaseModel, ABC):
    """Base of all passes. The fields of a subclass are its options in the recipe.

    `order` says where the pass comes in a stack: shapes of the whole model first (10), then factors (20),
    zeros (30), packed numbers (40). A site that a later pass of the stack has taken is closed to the others.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: ClassVar[str]
    version: ClassVar[int] = 1
    order: ClassVar[int] = 20

    def needs(self) -> Calibration:
        """Return what the pass wants to know of every site; nothing by default."""
        return Calibration()

    def settled(self) -> bool:
        """Say whether shapes follow from the options alone; where not, a plan's figures are an estimate."""
        return True

    def needs_training(self) -> bool:
        """Say whether the options mean something only under `during:`; a compress step then refuses them."""
        return False


class SitePass(Pass):
    """A pass that treats one module at a time: one module in, one out.

    `resolve` returns the same pass with every option made explicit for a site (or a `Skip`);
    `replace` builds the new module. Both must be pure and must work on meta tensors: there, `replace`
    returns the module with the right shapes and leaves out whatever reads values.
    """

    accepts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)

    def apportion(self, sites: Sequence[Site]) -> Mapping[str, Self]:
        """Return the pass that each site gets, by FQN, where one site's options depend on all the others.

        Called once with all sites of the call, before any is treated; by default every site gets this pass.
        On meta it must give what the weights would give, or a likely split if `settled()` is false.
        """
        return {site.fqn: self for site in sites}

    def resolve(self, site: Site) -> Self | Skip:  # noqa: ARG002  (subclasses read it)
        """Return this pass with all options explicit for `site`, or a `Skip` with the reason."""
        return self

    @abstractmethod
    def replace(self, site: Site) -> nn.Module | Skip:
        """Return the module that takes the place of `site.module`, or a `Skip` with the reason.

        The new module takes and returns the same shapes. It may define `flops(shape) -> int` (input shape in,
        2 a multiply-add) for the cost model, and `tied_to(module) -> nn.Module` if its weight may be tied.
        """

    def live(self, site: Site) -> nn.Module | Skip:
        """Return the module that stands at the site while a step trains with `during:`.

        It may define `set_progress(p)`, `penalty()`; its `finalise()` must return what `replace` would give:
        same parameters, shapes and types, values from training. Raises PassError K407 by default.
        """
        raise _no_live(self, site.fqn)

    def settle(self, module: nn.Module) -> Self:  # noqa: ARG002  (subclasses read it)
        """Return this pass, explicit for a site, with what only training could tell: `module` came of it.

        Called where `settled()` is false, with what `finalise()` of the live module gave.
        """
        return self


@dataclass(frozen=True)
class Resolved:
    """A tree pass with every option explicit, its sites, what it left alone, and what it chose.

    `options` must not hold names of modules: those are `sites`, in the order that lists in the options
    follow. `choice` is what only weights or data can tell (which neurons stay); None on meta, where it is
    never needed.
    """

    options: TreePass
    sites: tuple[str, ...]
    skipped: Mapping[str, Skip] = field(default_factory=dict)
    choice: Any = None


class TreePass(Pass):
    """A pass that changes several modules together: how many layers, how wide, which are shared.

    It rewrites the module tree; the framework captures the graph again and checks that inputs and outputs
    stayed what they were, and that nothing is left that no one reads, unless the pass is `unread`: it may
    leave a table that only the replaced layers read. Loading repeats `rewrite` alone, on meta, without the
    graph.
    """

    order: ClassVar[int] = 10
    unread: ClassVar[bool] = False
    reads_tokenizer: ClassVar[bool] = False
    """Whether the pass looks at the model's tokenizer, and may change it: `informed`, `retokenise`."""

    def informed(self, tokenizer: Any) -> Self:  # noqa: ARG002
        """Return this pass, told of the tokenizer of the model that it will rewrite; not while planning."""
        return self

    def retokenise(self, tokenizer: Any, choice: Any) -> Any:  # noqa: ARG002
        """Return the tokenizer that goes with the rewritten model."""
        return tokenizer

    def requests(self, graph: ModelGraph, sites: Sequence[Site]) -> Mapping[str, Calibration]:  # noqa: ARG002
        """Return what the pass wants to know, by module; by default `needs()` of every site."""
        return {site.fqn: self.needs() for site in sites}

    @abstractmethod
    def resolve_tree(
        self, graph: ModelGraph, sites: Sequence[Site], stats: Mapping[str, SiteStats] | None, seed: int
    ) -> Resolved:
        """Return the pass with all options explicit. `stats` (by module) is None while planning."""

    @abstractmethod
    def rewrite(self, model: nn.Module, sites: Sequence[str], choice: Any = None) -> None:
        """Change `model` in place as the explicit options say; on meta, or on real weights with `choice`."""

    def begin(self, model: nn.Module, sites: Sequence[str], choice: Any = None) -> None:
        """Change the tree before a step trains with `during:`; the graph is captured after it."""

    def attach(self, graph: ModelGraph, rewriter: Rewriter, sites: Sequence[str]) -> None:  # noqa: ARG002
        """Put live modules into the graph of a step that trains with `during:`. K407 by default."""
        raise _no_live(self, "")

    def end(self, model: nn.Module, sites: Sequence[str], choice: Any = None) -> None:
        """Change the tree after a step has trained with `during:`; by default as `rewrite`."""
        self.rewrite(model, sites, choice)


def _no_live(pass_: Pass, fqn: str) -> PassError:
    where = f" at {fqn}" if fqn else ""
    return PassError(
        f"pass {pass_.kind!r} has no form that trains{where}",
        code="K407",
        expected="a pass with a live form under `during`",
        remedy="apply it in a compress step, before or after this one",
    )
