"""The pass `student`: a smaller network, of the same kind or another, in the place of a stack of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from kroncc.api import (
    LayerStack,
    ModelGraph,
    PassError,
    Resolved,
    Site,
    SiteStats,
    Skip,
    TreePass,
    is_causal,
    watch_call,
)
from kroncc_passes._stacks import Kept, Way, check_kept, choose, cut, per_stack, stacks_of
from kroncc_passes._student_layers import BiLstm, Calls, Cnn, Replacement

Count = Annotated[int, Field(gt=0, strict=True)]
Layer = Annotated[int, Field(ge=0, strict=True)]
Listed = Annotated[tuple[Layer, ...], Field(min_length=1)]
GOES: dict[str, Way] = {"first": "top", "last": "bottom", "alternate": "alternate"}
OPTIONS = {
    "transformer": {"layers", "start"},
    "bilstm": {"layers", "hidden", "dropout", "values", "width"},
    "cnn": {"widths", "filters", "dropout", "values", "width"},
}


class Student(TreePass):
    """Put a smaller network in the place of a stack of layers, and keep everything around it.

    ## What it does

    Embeddings, pooler and head stay as they are; the layers between become
    - `transformer`: `layers` of them, taken from the model: `start: first`, `last`, `alternate` (default), or
      a list. Its width shrinks by `prune-hidden` or `squeeze`;
    - `bilstm`: `layers` layers (default 1) of LSTM in both directions, `hidden` wide each (default half of
      the model's width), then a linear map to the model's width and a LayerNorm;
    - `cnn`: for each of `widths` (default 3, 4, 5) `filters` convolutions over so many tokens (default 100);
      what they find at a token and their maximum over the text, each through a linear map, then a LayerNorm.
    Padding has no influence on either. A bilstm or cnn starts from random weights: distil it.

    ## When it helps

    Where a model must be far smaller or faster than fewer layers make it, for one task. A BiLSTM or CNN
    learns from the logits of a Transformer fine-tuned for the task; taps of layers do not exist in it.

    ## When it is skipped

    A stack that keeps all of its layers. Decoders are refused: a bilstm or cnn would read ahead. Tables of
    relative positions that only the old layers read (MPNet, DeBERTa) remain, unread.

    ## Cost

    bilstm: 8 hidden (in + hidden + 2) parameters a layer, in = width or 2 hidden; cnn: filters x width x the
    sum of widths, and two maps [widths x filters, width]. An LSTM computes token after token, so that its
    latency grows with length on any hardware.

    ## Example

        - student: {body: transformer, layers: 3, start: [0, 2, 5]}
        - student: {body: bilstm, hidden: 256}
        - student: {body: cnn, widths: [3, 4, 5], filters: 128, dropout: 0.3}

    ## References

    Tang et al., Distilling task-specific knowledge from BERT into simple neural networks, 2019 (BiLSTM). Kim,
    Convolutional neural networks for sentence classification, EMNLP 2014. Sanh et al., DistilBERT, 2019.
    """

    kind: ClassVar[str] = "student"
    unread: ClassVar[bool] = True

    body: Literal["transformer", "bilstm", "cnn"] = Field(
        description="what stands in the place of the layers"
    )
    layers: Count | None = Field(None, description="transformer, bilstm: how many layers")
    start: Literal["first", "last", "alternate"] | Listed | tuple[Listed, ...] | None = Field(
        None, description="transformer: which of the model's layers it starts from"
    )
    hidden: Count | None = Field(None, description="bilstm: width of each direction")
    widths: Listed | None = Field(None, description="cnn: over how many tokens its filters reach")
    filters: Count | None = Field(None, description="cnn: filters of each width")
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="bilstm, cnn: dropout in training (default 0.1)"
    )
    values: Count | None = Field(None, description="found while planning: how many values a layer returns")
    width: Count | None = Field(None, description="found while planning: width of the hidden state")

    @model_validator(mode="after")
    def _of_this_body(self) -> Self:
        given = {
            name for name in type(self).model_fields if name != "body" and getattr(self, name) is not None
        }
        foreign = sorted(given - OPTIONS[self.body])
        if foreign:
            raise ValueError(f"`{foreign[0]}` is no option of {self.body}")
        if self.body == "transformer" and isinstance(self.start, tuple) == (self.layers is not None):
            raise ValueError("a transformer takes `layers`, or the layers listed under `start`")
        if self.widths and min(self.widths) < 1:
            raise ValueError("`widths` are numbers of tokens, 1 or more")
        return self

    def resolve_tree(
        self,
        graph: ModelGraph,
        sites: Sequence[Site],
        stats: Mapping[str, SiteStats] | None,  # noqa: ARG002
        seed: int,
    ) -> Resolved:
        """Return the pass with all sizes explicit; the seed of new weights is its choice.

        Raises PassError K451 (a decoder), K452 (the layers' answer is not seen), K453 (stacks of two widths),
        K490 to K495 (stacks and layers).
        """
        stacks = stacks_of(graph, sites, self.kind)
        if self.body == "transformer":
            return self._shallower(graph, stacks)
        return Resolved(self._sized(graph, stacks), tuple(stack.fqn for stack in stacks), choice=seed)

    def rewrite(self, model: nn.Module, sites: Sequence[str], choice: Any = None) -> None:
        """Cut each stack, or put one new module in the place of its layers, with weights from the seed."""
        for place, fqn in enumerate(sites):
            if self.body == "transformer":
                assert isinstance(self.start, tuple)
                kept = self.start[place]
                assert isinstance(kept, tuple)
                cut(model, fqn, kept)
                continue
            stack = model.get_submodule(fqn)
            assert isinstance(stack, nn.ModuleList)
            new = self._built(stack[0], 0 if choice is None else choice + place)
            del stack[:]
            stack.append(new)

    def _shallower(self, graph: ModelGraph, stacks: Sequence[LayerStack]) -> Resolved:
        """Return the pass with the layers listed for each stack."""
        if isinstance(self.start, tuple):
            lists = per_stack(self.start, stacks, "start")
        else:
            assert self.layers is not None
            way = GOES[self.start or "alternate"]
            lists = [choose(graph, stack, self.layers, way) for stack in stacks]
        chosen: dict[str, Kept] = {}
        skipped: dict[str, Skip] = {}
        for stack, kept in zip(stacks, lists, strict=True):
            if kept == tuple(range(stack.size)):
                skipped[stack.fqn] = Skip(f"keeps all of its {stack.size} layers")
                continue
            check_kept(graph, stack, kept)
            chosen[stack.fqn] = kept
        explicit = {"start": tuple(chosen.values()), "layers": None} if chosen else {}
        return Resolved(self.model_copy(update=explicit), tuple(chosen), skipped)

    def _sized(self, graph: ModelGraph, stacks: Sequence[LayerStack]) -> Self:
        """Return the pass with every size explicit, the same for all stacks."""
        answers = {self._answer(graph, stack) for stack in stacks}
        if len(answers) > 1:
            raise PassError(
                f"student: layers of {', '.join(stack.fqn for stack in stacks)} differ in width or answer",
                code="K453",
                expected="stacks of one kind",
                remedy="choose one stack by `targets`, and give the other a pass of its own",
            )
        values, width = answers.pop()
        dropout = 0.1 if self.dropout is None else self.dropout
        sizes: dict[str, Any] = {"values": values, "width": width, "dropout": dropout}
        if self.body == "bilstm":
            sizes |= {"layers": self.layers or 1, "hidden": self.hidden or max(1, width // 2)}
        else:
            sizes |= {"widths": self.widths or (3, 4, 5), "filters": self.filters or 100}
        return self.model_copy(update=sizes)

    def _answer(self, graph: ModelGraph, stack: LayerStack) -> tuple[int | None, int]:
        """Return how many values a layer returns (None: a tensor), and the width of the stream."""
        if is_causal(graph, stack):
            raise PassError(
                f"student: {stack.fqn} is a decoder, which may not read ahead as a {self.body} does",
                code="K451",
                expected="the stack of an encoder",
                remedy="use body: transformer, or choose the encoder by `targets`",
            )
        seen = watch_call(graph, stack)
        if seen is None or not stack.width:
            raise PassError(
                f"student: what the layers of {stack.fqn} return cannot be seen",
                code="K452",
                expected="a model that runs on tensors without values",
                remedy="use body: transformer",
            )
        return seen.values, stack.width

    def _built(self, layer: nn.Module, seed: int) -> Replacement:
        """Return the new module on the device and of the type of `layer`, with weights drawn from `seed`."""
        like = next(parameter for parameter in layer.parameters() if parameter.is_floating_point())
        calls = Calls.of(layer, self.values)
        assert self.width is not None
        assert self.dropout is not None
        place = "meta" if like.is_meta else "cpu"
        new: Replacement
        with torch.random.fork_rng(devices=[]), torch.device(place):
            torch.manual_seed(seed)
            if self.body == "bilstm":
                assert self.hidden is not None
                new = BiLstm(calls, self.width, self.hidden, self.layers or 1, self.dropout)
            else:
                assert self.widths is not None
                assert self.filters is not None
                new = Cnn(calls, self.width, self.widths, self.filters, self.dropout)
        _take_settings(layer, new)
        return new.to(like.device, like.dtype).train(layer.training)


def _take_settings(layer: nn.Module, new: nn.Module) -> None:
    """Give the new module what the model may read off a layer: plain settings such as `attention_type`."""
    for name, value in vars(layer).items():
        if isinstance(value, str | int | float) and not name.startswith("_") and name not in vars(new):
            setattr(new, name, value)
