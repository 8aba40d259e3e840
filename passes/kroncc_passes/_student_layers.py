"""Networks of another kind that stand where a stack of Transformer layers stood."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

OTHERS = ("encoder", "cross", "head")  # masks of other things than the tokens of the stack itself


@dataclass(frozen=True)
class Calls:
    """How a layer is called and what it answers.

    `hidden` names the argument with the hidden state, the first; `mask` that of the attention mask and its
    place, None where there is none. `values` is None where a layer returns a tensor, else the length of its
    tuple.
    """

    hidden: str
    mask: tuple[str, int] | None
    values: int | None

    @classmethod
    def of(cls, layer: nn.Module, values: int | None) -> Calls:
        """Return how `layer` is called, by the signature of its `forward`."""
        names = list(inspect.signature(type(layer).forward).parameters)[1:]
        masks = [name for name in names if "mask" in name and not any(other in name for other in OTHERS)]
        return cls(names[0], (masks[0], names.index(masks[0])) if masks else None, values)


class Replacement(nn.Module, ABC):
    """A module in the place of a stack of layers: takes what a layer takes, returns what a layer returns.

    `forward` takes the hidden state [B, L, d] and the layers' mask in any of its forms, gives [B, L, d]; at
    padding it gives 0, and what stands there has no influence. Other arguments of a layer are not used.
    """

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the new hidden state, in a tuple with None for what else a layer returns, if it does."""
        hidden = args[0] if args else kwargs[self.calls.hidden]
        valid = self._valid(hidden, args, kwargs)
        result = self.run(hidden, valid)
        if valid is not None:
            result = result * valid.unsqueeze(-1).to(result.dtype)
        return result if self.calls.values is None else (result, *[None] * (self.calls.values - 1))

    @abstractmethod
    def run(self, hidden: Tensor, valid: Tensor | None) -> Tensor:
        """Return [B, L, d] of [B, L, d]; `valid` [B, L] is False at padding, None where there is none."""

    def _valid(self, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        if self.calls.mask is None:
            return None
        name, place = self.calls.mask
        mask = args[place] if place < len(args) else kwargs.get(name)
        return None if mask is None else padding(mask).expand(hidden.shape[0], -1)


def padding(mask: Tensor) -> Tensor:
    """Return [B or 1, L], True at tokens, of a mask [B, L] or [B or 1, heads or 1, queries or 1, L].

    Integers and booleans are true at tokens; floats are added to scores, so that they are 0 there.
    """
    seen = mask > -1 if mask.is_floating_point() else mask != 0
    return seen if seen.dim() == 2 else seen.flatten(1, -2).any(1)


class Lstm(nn.LSTM):
    """One layer of LSTM in one direction; takes [B, L, in], returns the states [B, L, hidden]."""

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__(size, hidden, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Return the state after every token; computes in the type of the weights."""
        if torch.compiler.is_exporting():  # the fused operator fixes the length
            return self._outline(x) if x.device.type == "meta" else self._scanned(x)
        given = x.to(self._held("weight_ih_l0").dtype)
        with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
            states: Tensor = super().forward(given)[0]
        return states

    def _held(self, name: str) -> Tensor:
        held: Tensor = getattr(self, name)
        return held

    def _outline(self, x: Tensor) -> Tensor:
        """Return the right shape: a graph traced on meta calls the module itself; tracing a scan is slow."""
        return F.linear(x, self._held("weight_ih_l0"))[..., : self.hidden_size]

    def _scanned(self, x: Tensor) -> Tensor:
        from torch._higher_order_ops.scan import scan

        weight, bias = self._held("weight_hh_l0"), self._held("bias_hh_l0")

        def step(state: tuple[Tensor, Tensor], given: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
            hidden, cell = state
            i, f, g, o = (given + F.linear(hidden, weight)).chunk(4, -1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            hidden = o.sigmoid() * cell.tanh()
            return (hidden, cell), hidden.clone()

        into = self._held("weight_ih_l0"), self._held("bias_ih_l0") + bias
        given = F.linear(x, *into).transpose(0, 1)
        start = given.new_zeros(x.shape[0], self.hidden_size)
        states: Tensor = scan(step, (start, start.clone()), given, dim=0)[1]
        return states.transpose(0, 1)

    def flops(self, shape: tuple[int, ...]) -> int:
        """Return the FLOPs for an input [B, L, in]: four gates, each from the input and the last state."""
        return 2 * shape[0] * shape[1] * 4 * self.hidden_size * (self.input_size + self.hidden_size)


class BiLstm(Replacement):
    """Layers of LSTM in both directions, then a linear map to the width of the hidden state.

    Tokens are brought to the front of each row and, for the way back, turned round there, by gathering: the
    states at tokens are those of the row alone, whatever padding stands where.
    """

    def __init__(self, calls: Calls, width: int, hidden: int, layers: int, dropout: float) -> None:
        super().__init__(calls)
        sizes = [width, *[2 * hidden] * (layers - 1)]
        self.ahead = nn.ModuleList(Lstm(size, hidden) for size in sizes)
        self.back = nn.ModuleList(Lstm(size, hidden) for size in sizes)
        self.dropout = nn.Dropout(dropout)
        self.project = nn.Linear(2 * hidden, width)
        self.norm = nn.LayerNorm(width)

    def run(self, hidden: Tensor, valid: Tensor | None) -> Tensor:
        """Return what each token's states in both directions give."""
        order = None if valid is None else (~valid).to(torch.uint8).argsort(dim=1, stable=True)
        states = hidden if order is None else _rows(hidden, order)
        turned = None if valid is None else _turned(valid)
        for ahead, back in zip(self.ahead, self.back, strict=True):
            ways = ahead(states), _turn(back(_turn(states, turned)), turned)
            states = self.dropout(torch.cat(ways, -1))
        given: Tensor = self.norm(self.project(states))
        return given if order is None else _rows(given, order.argsort(1))


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Return x [B, L, d] with the tokens of each row in the order of index [B, L]."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _turned(valid: Tensor) -> Tensor:
    """Return the index [B, L] that turns the first tokens of each row round, as many as it has."""
    count = valid.sum(1, keepdim=True)
    place = torch.arange(valid.shape[1], device=valid.device).expand_as(valid)
    return torch.where(place < count, count - 1 - place, place)


def _turn(x: Tensor, index: Tensor | None) -> Tensor:
    return x.flip(1) if index is None else _rows(x, index)


class Cnn(Replacement):
    """Convolutions over the tokens, and their maximum over the row, each through a linear map.

    A token gets what the filters find around it, and what they find anywhere (Kim's sentence vector).
    """

    def __init__(
        self, calls: Calls, width: int, widths: tuple[int, ...], filters: int, dropout: float
    ) -> None:
        super().__init__(calls)
        self.widths = widths
        self.convolutions = nn.ModuleList(nn.Conv1d(width, filters, size) for size in widths)
        self.dropout = nn.Dropout(dropout)
        self.near = nn.Linear(filters * len(widths), width)
        self.anywhere = nn.Linear(filters * len(widths), width, bias=False)
        self.norm = nn.LayerNorm(width)

    def run(self, hidden: Tensor, valid: Tensor | None) -> Tensor:
        """Return what the filters give at each token, and at the best place of its row."""
        tokens = None if valid is None else valid.unsqueeze(-1).to(hidden.dtype)
        columns = (hidden if tokens is None else hidden * tokens).transpose(1, 2)
        around = [F.pad(columns, ((size - 1) // 2, size // 2)) for size in self.widths]
        found = [one(given) for one, given in zip(self.convolutions, around, strict=True)]
        return self._joined(torch.cat(found, 1).transpose(1, 2).relu(), tokens)

    def _joined(self, found: Tensor, tokens: Tensor | None) -> Tensor:
        best = (found if tokens is None else found * tokens).amax(1)
        near: Tensor = self.near(self.dropout(found))
        given: Tensor = self.norm(near + self.anywhere(self.dropout(best)).unsqueeze(1))
        return given
