"""The pass `drop-layers`: a stack keeps some of its layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator
from torch import nn

from kroncc.api import (
    Calibration,
    LayerStack,
    ModelGraph,
    PassError,
    Resolved,
    Rewriter,
    Site,
    SiteStats,
    Skip,
    TreePass,
    find_stacks,
    layer_ends,
)
from kroncc_passes._layer_gate import LayerGate
from kroncc_passes._stacks import Kept, Way, check_kept, choose, cut, per_stack, stacks_of, too_few

Count = Annotated[int, Field(gt=0, strict=True)]
Layer = Annotated[int, Field(ge=0, strict=True)]
Listed = Annotated[tuple[Layer, ...], Field(min_length=1)]


class DropLayers(TreePass):
    """Keep some layers of a stack and drop the others; optionally train with layers left out at random first.

    ## What it does

    The stack is cut to `keep` layers. Which ones go: `top`, the last ones; `bottom`, the first ones;
    `alternate`, every other one (of 12, keep 6 leaves 0, 2, 4, 6, 8, 10); `importance`, those that turn the
    hidden state least, 1 - cos(in, out) over the rows of `calibrate`; or a list, of those that stay (`keep`)
    or go (`drop`). Targets choose stacks: every stack that holds a module they match; without targets, all.

    Under `during`, `rate` leaves out each layer with that probability in every training step (LayerDrop):
    the layer's input goes on in the place of its output. The layers left out depend on the recipe's seed and
    on how far training is, so that all processes and a resumed run leave out the same ones. When the step
    ends, the stack is cut as `keep` and `drop` say; without them all layers stay.

    ## When it helps

    Where latency counts: it follows depth closely, on any hardware. The layers that stay are a good start for
    a distillation. A model trained with `rate` loses less when it is cut afterwards.

    ## When it is skipped

    A stack that keeps all of its layers. A layer whose values other layers read besides the hidden state
    (the position bias of T5's first block) always stays; listing it is an error. So is a choice that would
    put a layer of one kind (sliding, full attention) where the model's code runs another kind.

    ## Cost

    Parameters and FLOPs of the layers that stay; with `rate`, training computes all layers.

    ## Example

        - drop-layers: {keep: 3, drop: alternate}
        - drop-layers: {keep: [0, 1, 11]}
        - drop-layers: {targets: ["decoder.**"], keep: 2, drop: importance}
        - drop-layers: {rate: 0.2, keep: 6, drop: alternate}

    ## References

    Sajjad et al., On the effect of dropping layers of pre-trained Transformer models, 2020. Fan et al.,
    Reducing Transformer depth on demand with structured dropout (LayerDrop), ICLR 2020. Sanh et al.,
    DistilBERT, 2019. Men et al., ShortGPT, 2024 (influence of a layer). Ganesh et al., TACL 2021.
    """

    kind: ClassVar[str] = "drop-layers"

    keep: Count | Listed | tuple[Listed, ...] | None = Field(
        None, description="how many layers stay, or which ones (counted from 0); lists of layers, one a stack"
    )
    drop: Way | Listed | None = Field(
        None, description="which layers go: a way to choose them (default alternate), or a list"
    )
    rate: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="under `during`: probability that a layer is left out of a training step"
    )
    seed: int | None = Field(None, description="of `rate`; by default that of the step")

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        if self.keep is None and self.drop is None and self.rate is None:
            raise ValueError("give `keep`, `drop`, or `rate` (under `during`)")
        if isinstance(self.drop, str) and not isinstance(self.keep, int):
            raise ValueError(f"`drop: {self.drop}` needs `keep`, the number of layers that stay")
        if self.keep is not None and isinstance(self.drop, tuple):
            raise ValueError("a list under `drop` says it all: leave `keep` out")
        if self.seed is not None and self.rate is None:
            raise ValueError("`seed` is that of `rate`, which is not given")
        for layers in (*_lists(self.keep), *_lists(self.drop)):
            if not layers:
                raise ValueError("list at least 1 layer")
            if list(layers) != sorted(set(layers)):
                raise ValueError("list layers in order, each once")
        return self

    def settled(self) -> bool:
        """Say that `importance` settles which layers stay on real weights only."""
        return self.drop != "importance"

    def requests(self, graph: ModelGraph, sites: Sequence[Site]) -> Mapping[str, Calibration]:
        """Return, for `importance`, the influence of every layer of the stacks that are meant."""
        if self.drop != "importance":
            return {}
        stacks = stacks_of(graph, sites, self.kind)
        layers = [stack.entry(layer) for stack in stacks for layer in range(stack.size)]
        return dict.fromkeys(layers, Calibration(influence=True))

    def resolve_tree(
        self, graph: ModelGraph, sites: Sequence[Site], stats: Mapping[str, SiteStats] | None, seed: int
    ) -> Resolved:
        """Return the pass with the layers that stay listed for each stack.

        Raises PassError K490 to K495. Without `stats`, `importance` names the first layers: shapes and names
        come out the same whichever stay.
        """
        skipped: dict[str, Skip] = {}
        chosen: dict[str, Kept] = {}
        stacks = stacks_of(graph, sites, self.kind)
        for stack, kept in zip(stacks, self._kept(graph, stacks, stats), strict=True):
            if self.rate is None and len(kept) == stack.size:
                skipped[stack.fqn] = Skip(f"keeps all of its {stack.size} layers")
                continue
            if stats is not None or self.drop != "importance":
                check_kept(graph, stack, kept)
            chosen[stack.fqn] = kept
        explicit = {"keep": tuple(chosen.values()) or None, "drop": None}
        if self.rate is not None:
            explicit["seed"] = seed if self.seed is None else self.seed  # type: ignore[assignment]
        return Resolved(self.model_copy(update=explicit), tuple(chosen), skipped)

    def _kept(
        self, graph: ModelGraph, stacks: Sequence[LayerStack], stats: Mapping[str, SiteStats] | None
    ) -> list[Kept]:
        """Return the layers that stay, for each stack."""
        if isinstance(self.keep, int):
            way = self.drop if isinstance(self.drop, str) else "alternate"
            counted = {stack.fqn: _influence(stats, stack) for stack in stacks if way == "importance"}
            return [choose(graph, stack, self.keep, way, counted.get(stack.fqn)) for stack in stacks]
        if self.keep is not None:
            return per_stack(self.keep, stacks, "keep")
        gone = per_stack(self.drop, stacks, "drop") if isinstance(self.drop, tuple) else [()] * len(stacks)
        kept = [
            tuple(n for n in range(stack.size) if n not in g) for stack, g in zip(stacks, gone, strict=True)
        ]
        for stack, layers in zip(stacks, kept, strict=True):
            if not layers:
                raise too_few(stack, 0)
        return kept

    def rewrite(self, model: nn.Module, sites: Sequence[str], choice: Any = None) -> None:  # noqa: ARG002
        """Cut each stack to its layers under `keep`, and number them anew."""
        assert isinstance(self.keep, tuple)
        for fqn, kept in zip(sites, self.keep, strict=True):
            assert isinstance(kept, tuple)
            cut(model, fqn, kept)

    def attach(self, graph: ModelGraph, rewriter: Rewriter, sites: Sequence[str]) -> None:
        """Put a gate behind every layer that in training passes the layer's input on at random.

        Raises PassError K496 (no `rate`), K497 (a layer's input and output cannot be told).
        """
        if self.rate is None:
            raise PassError(
                "drop-layers under `during` has no `rate`",
                code="K496",
                expected="rate: the probability that a layer is left out of a training step",
                remedy="give `rate`, or move the pass to a compress step",
            )
        for stack in (one for one in find_stacks(graph) if one.fqn in sites):
            self._gate(graph, rewriter, stack)

    def _gate(self, graph: ModelGraph, rewriter: Rewriter, stack: LayerStack) -> None:
        assert self.rate is not None
        replaced: dict[Any, Any] = {}
        for layer, ends in enumerate(layer_ends(graph, stack)):
            if ends is None:
                raise PassError(
                    f"what enters and leaves {stack.entry(layer)} cannot be told from the graph",
                    code="K497",
                    expected="layers that take the hidden state and return it",
                    remedy="leave this stack out by `targets`",
                )
            gate = LayerGate(self.rate, f"{self.seed}/{stack.entry(layer)}")
            enters = replaced.get(ends.enters, ends.enters)
            call = rewriter.insert_call(
                ends.leaves, f"{stack.entry(layer)}.layer_gate", gate, (ends.leaves, enters)
            )
            rewriter.replace_uses(ends.leaves, call)
            replaced[ends.leaves] = call


def _influence(stats: Mapping[str, SiteStats] | None, stack: LayerStack) -> list[float] | None:
    """Return the influence of each layer; None while planning. Raises PassError K498 (not measured)."""
    if stats is None:
        return None
    layers = [stack.entry(layer) for layer in range(stack.size)]
    found = [stats[layer].influence if layer in stats else None for layer in layers]
    known = [value for value in found if value is not None]
    if len(known) == len(layers):
        return known
    raise PassError(
        f"drop-layers: the influence of {layers[found.index(None)]} was not measured",
        code="K498",
        expected="statistics of a calibrate stage",
        remedy="give the step `calibrate`, or choose by `top`, `bottom`, `alternate` or a list",
    )


def _lists(given: Any) -> Sequence[Kept]:
    if not isinstance(given, tuple):
        return ()
    return given if given and isinstance(given[0], tuple) else (given,)
