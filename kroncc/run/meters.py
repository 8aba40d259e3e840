"""What is measured at one module while a model runs: each meter takes calls, and gives a part of `SiteStats`.

Products and sums of a batch are formed in float32 on the device of the model; their totals are kept in
float64, on the CPU where the device has no float64. Results are float32 on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from kroncc.errors import PassError

CHUNK = 2**24  # numbers of per-example gradients that are held at once


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a batch: how many, and where their real positions are, [rows, length]; None: everywhere."""

    count: int
    mask: Tensor | None = None

    def real(self, shape: torch.Size) -> Tensor | None:
        """Return which of the positions `shape` are no padding, flat; None: all of them count."""
        if self.mask is None:
            return None
        if shape[:2] == self.mask.shape:
            spread = self.mask.reshape(*self.mask.shape, *[1] * (len(shape) - 2)).expand(shape)
            return spread.reshape(-1)
        return self.mask.reshape(-1) if tuple(shape) == (self.mask.numel(),) else None

    def vectors(self, x: Tensor) -> Tensor:
        """Return the vectors of x [..., width] that are no padding: [n, width], float32."""
        flat, real = x.detach().reshape(-1, x.shape[-1]), self.real(x.shape[:-1])
        return (flat if real is None else flat[real]).float()

    def indices(self, ids: Tensor) -> Tensor:
        """Return the row numbers that are looked up, padding left out; ids [1, length] serve every row."""
        if self.mask is not None and ids.shape == (1, *self.mask.shape[1:]):
            ids = ids.expand(self.mask.shape)
        flat, real = ids.reshape(-1), self.real(ids.shape)
        return flat if real is None else flat[real]

    def by_example(self, values: Tensor) -> Tensor:
        """Return values [rows ..., width] as [rows, positions, width], float32."""
        return values.reshape(self.count, -1, values.shape[-1]).float()


class Total:
    """A sum of float32 parts, kept in float64."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def add(self, part: Tensor) -> None:
        """Add a part; all have one shape."""
        part = part.cpu() if part.device.type == "mps" else part
        self.value = part.double() if self.value is None else self.value.add_(part)

    def mean(self, count: int) -> Tensor | None:
        """Return the sum divided by `count`, float32 on the CPU; None where nothing came."""
        return None if self.value is None else (self.value / max(count, 1)).float().cpu()


class Products:
    """The sums of one value's vectors; kept for the next to ask, as q, k and v read the same value."""

    def __init__(self) -> None:
        self._of: tuple[Tensor, int, Rows] | None = None
        self._made = (0, torch.empty(0), torch.empty(0))

    def of(self, x: Tensor, rows: Rows) -> tuple[int, Tensor, Tensor]:
        """Return how many vectors x has, their sum [width], and their moment summed [width, width]."""
        known = self._of
        if known is None or known[0] is not x or known[1] != x._version or known[2] is not rows:
            vectors = rows.vectors(x)
            self._of, self._made = (x, x._version, rows), (len(vectors), vectors.sum(0), vectors.T @ vectors)
        return self._made

    def clear(self) -> None:
        """Forget the value."""
        self._of = None


class Moments:
    """How the inputs of a linear map are spread: mean [in] and E[x x^T] [in, in]."""

    def __init__(self) -> None:
        self.count, self.sum, self.square = 0, Total(), Total()

    def add(self, x: Tensor, rows: Rows, products: Products) -> None:
        """Take the input of one call, [..., in]."""
        count, total, square = products.of(x, rows)
        self.count += count
        self.sum.add(total)
        self.square.add(square)


class Lookups:
    """How often each row of an embedding is looked up, [table rows]."""

    def __init__(self, table: int) -> None:
        self.count, self.table, self.found = 0, table, Total()

    def add(self, ids: Tensor, rows: Rows) -> None:
        """Take the ids of one call, of any shape."""
        indices = rows.indices(ids)
        self.count += len(indices)
        self.found.add(torch.bincount(indices, minlength=self.table))


class Influence:
    """How far a layer turns its input away: mean of 1 - cos(in, out) over positions, of all calls."""

    def __init__(self) -> None:
        self.count, self.turned = 0, 0.0

    def add(self, x: Tensor, y: Tensor, rows: Rows) -> None:
        """Take input and output of one call, both [..., width]."""
        before, after = (rows.vectors(side).cpu().double() for side in (x, y))
        self.count += len(before)
        self.turned += float((1 - F.cosine_similarity(before, after, dim=-1)).sum())

    def mean(self) -> float | None:
        """Return the mean; None where the layer was never called."""
        return self.turned / self.count if self.count else None


class Saliency:
    """Mean over examples of abs(sum of x dL/dx) over positions and each group of input features."""

    def __init__(self, fqn: str, sizes: Iterable[int]) -> None:
        self.fqn = fqn
        self.totals = {size: Total() for size in sorted(sizes)}
        self._batch: Tensor | None = None

    def watch(self, x: Tensor, rows: Rows) -> Tensor:
        """Return what takes the place of the input x [..., in]: a value whose gradient is of this call."""
        for size in self.totals:
            _check_size(self.fqn, size, x.shape[-1])
        mine = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        mine.register_hook(lambda gradient: self._arrived(x.detach(), gradient, rows))  # type: ignore[no-untyped-call]
        return mine

    def flush(self) -> None:
        """Close a batch: what one module was called several times for is one gate."""
        if self._batch is None:
            return
        for size, total in self.totals.items():
            gates = self._batch.reshape(len(self._batch), -1, size).sum(-1)
            total.add(gates.abs().sum(0))
        self._batch = None

    def _arrived(self, x: Tensor, gradient: Tensor, rows: Rows) -> None:
        products = rows.by_example(x * gradient).sum(1)
        self._batch = products if self._batch is None else self._batch + products


@dataclass
class _Call:
    """One use of a weight: a linear map's input [rows, positions, in], or ids [rows, positions]."""

    given: Tensor
    looked_up: bool
    gradient: Tensor | None = None  # of the output, [rows, positions, out]


class Fisher:
    """Mean over examples of the squared gradient of one weight, shaped as the weight.

    A linear map's gradient of one example is the sum over its positions of dy x^T; an embedding's is the sum
    of dy at the rows looked up. All uses of the weight, by several calls or by tied modules, are summed
    before squaring. Positions of padding add nothing: no loss reads them.
    """

    def __init__(self, weight: Tensor, *, transposed: bool) -> None:
        self.shape, self.transposed = weight.shape, transposed
        self.total = Total()
        self._calls: list[_Call] = []
        self._waiting = 0

    def watch(self, module: nn.Module, given: Tensor, y: Tensor, rows: Rows) -> Tensor:
        """Note one call of a module that holds the weight; return what takes the place of its output y."""
        looked_up = isinstance(module, nn.Embedding)
        mine = given.detach().reshape(rows.count, -1) if looked_up else rows.by_example(given.detach())
        call = _Call(mine, looked_up)
        self._calls.append(call)
        self._waiting += 1
        y = y if y.requires_grad else y.detach().requires_grad_().clone()
        unused = module.padding_idx if isinstance(module, nn.Embedding) else None
        y.register_hook(lambda gradient: self._arrived(call, gradient, rows, unused))  # type: ignore[no-untyped-call]
        return y

    def flush(self) -> None:
        """Close a batch: uses whose output the loss does not read have gradient zero."""
        calls = [call for call in self._calls if call.gradient is not None]
        self._calls, self._waiting = [], 0
        if not calls:
            return
        dense = [call for call in calls if not call.looked_up]
        lookups = [call for call in calls if call.looked_up]
        if dense:
            self._add_dense(dense, lookups)
        else:
            self._add_rows(lookups)

    def _arrived(self, call: _Call, gradient: Tensor, rows: Rows, unused: int | None) -> None:
        call.gradient = rows.by_example(gradient)
        if unused is not None:  # an embedding keeps this row from training
            call.gradient = call.gradient.masked_fill((call.given == unused).unsqueeze(-1), 0.0)
        self._waiting -= 1
        if self._waiting == 0:
            self.flush()

    def _add_dense(self, dense: list[_Call], lookups: list[_Call]) -> None:
        inputs = torch.cat([call.given for call in dense], dim=1)
        outputs = torch.cat([_gradient(call) for call in dense], dim=1)
        left, right = (inputs, outputs) if self.transposed else (outputs, inputs)
        step = max(1, CHUNK // self.shape.numel())
        for start in range(0, len(left), step):
            part = slice(start, start + step)
            gradients = left[part].mT @ right[part]
            for call in lookups:
                ids, rows = call.given[part], _gradient(call)[part]
                gradients.flatten(0, 1).index_add_(0, self._keys(ids).flatten(), rows.flatten(0, 1))
            self.total.add(gradients.square_().sum(0))

    def _add_rows(self, lookups: list[_Call]) -> None:
        """Of tables alone: an example touches few rows, so only those are held."""
        keys = torch.cat([self._keys(call.given) for call in lookups], dim=1).flatten()
        rows = torch.cat([_gradient(call) for call in lookups], dim=1).flatten(0, 1)
        touched, places = torch.unique(keys, return_inverse=True)
        sums = rows.new_zeros(len(touched), rows.shape[-1]).index_add_(0, places, rows)
        squares = rows.new_zeros(self.shape).index_add_(0, touched % self.shape[0], sums.square())
        self.total.add(squares)

    def _keys(self, ids: Tensor) -> Tensor:
        """Return ids [rows, positions] as row numbers of one table an example."""
        return ids + torch.arange(len(ids), device=ids.device)[:, None] * self.shape[0]


def has_fisher(module: nn.Module) -> bool:
    """Say whether the gradient of the module's weight can be told from its inputs and outputs."""
    weight = module._parameters.get("weight")
    return isinstance(module, nn.Linear | nn.Embedding | Conv1D) and weight is not None


def _gradient(call: _Call) -> Tensor:
    assert call.gradient is not None  # calls without one were left out
    return call.gradient


def _check_size(fqn: str, size: int, width: int) -> None:
    if size < 1 or width % size:
        raise PassError(
            f"{fqn}: {width} input features are no groups of {size}",
            code="K418",
            expected="a group size that divides the width of the input",
        )
