"""A linear map that multiplies bytes: int8 weights, inputs rounded to int8 as they come."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kroncc.api import PassError
from kroncc_passes._quantize_stores import frozen

TOP = 127
TINY = 1e-12
FAST = ("cpu", "meta")  # devices that multiply bytes of any shape


class Int8Linear(nn.Module):
    """y = x W^T + bias with W = codes * scale and x rounded to int8.

    `codes` int8 [out, in], `scale` [out | 1]. Without `reach`, every vector of x has its own scale, its
    largest absolute value / 127; with it (a scalar), all share reach / 127, and what lies beyond is cut off.
    Sums are exact in int32. Gradients pass the rounding of x unchanged (straight-through); W is frozen.
    """

    def __init__(
        self, codes: Tensor, scale: Tensor, bias: nn.Parameter | None = None, reach: Tensor | None = None
    ) -> None:
        super().__init__()
        self.codes = codes if isinstance(codes, nn.Parameter) else frozen(codes)
        self.scale = scale if isinstance(scale, nn.Parameter) else frozen(scale)
        self.reach = reach if reach is None or isinstance(reach, nn.Parameter) else frozen(reach)
        self.bias = bias
        self.out_features, self.in_features = codes.shape

    @property
    def weight(self) -> Tensor:
        """W [out, in], formed anew at every access: for code that asks for it, not for computing."""
        return self.codes.to(self.scale.dtype) * self.scale.unsqueeze(1)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out] for x [..., in]."""
        flat = x.reshape(-1, self.in_features)
        if torch.is_grad_enabled() and x.requires_grad:
            y = _straight_through(flat, self.codes, self.scale, self.reach)
        else:
            y = _product(flat, self.codes, self.scale, self.reach)
        if self.bias is not None and torch.is_grad_enabled():
            y = y + self.bias.to(y.dtype)
        elif self.bias is not None:
            y += self.bias.to(y.dtype)  # in place: fresh memory costs more than the sum
        return y.view(*x.shape[:-1], self.out_features)

    def weights(self) -> int:
        """Return how many weights there are, the bias among them."""
        return self.codes.numel() + (0 if self.bias is None else self.bias.numel())

    def flops(self, shape: Sequence[int]) -> int:
        """Return the operations for an input of `shape`, 2 a multiply-add."""
        return 2 * math.prod(shape) * self.out_features

    def tied_to(self, module: nn.Module) -> nn.Module:
        """Return what takes the place of a Linear that shares W. Raises PassError K470 for anything else."""
        if not isinstance(module, nn.Linear) or module.weight.shape != self.codes.shape:
            raise PassError(
                f"a {type(module).__name__} cannot share an int8 weight {list(self.codes.shape)}",
                code="K470",
                expected="a Linear with a weight of that shape",
                remedy="leave `activations` out for this weight",
            )
        twin = Int8Linear(self.codes, self.scale, module.bias, self.reach)
        return twin.train(module.training)

    def shape_text(self) -> str:
        """Return the shape for the plan: `64x32, int8 x int8`."""
        return f"{self.out_features}x{self.in_features}, int8 x int8"

    def extra_repr(self) -> str:
        """Return the shapes for `print`."""
        kind = "per token" if self.reach is None else "fixed range"
        return f"{self.in_features}, {self.out_features}, int8 x int8, {kind}, bias={self.bias is not None}"


def _straight_through(x: Tensor, codes: Tensor, scale: Tensor, reach: Tensor | None) -> Tensor:
    return cast("Tensor", _StraightThrough.apply(x, codes, scale, reach))  # type: ignore[no-untyped-call]


class _StraightThrough(torch.autograd.Function):
    """The int8 product, with the gradient of the product of real numbers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor, reach: Tensor | None) -> Tensor:
        inside = () if reach is None else (x.abs() <= reach,)
        ctx.save_for_backward(codes, scale, *inside)
        return _product(x, codes, scale, reach)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        codes, scale, *inside = ctx.saved_tensors
        gradient = (gradients[0] * scale.to(gradients[0].dtype)) @ codes.to(gradients[0].dtype)
        return (gradient * inside[0] if inside else gradient), None, None, None


def quantised(x: Tensor, reach: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return x [tokens, in] in whole steps of at most 127, as floats, and the step [tokens | 1, 1]."""
    if reach is None:
        step = x.abs().amax(-1, keepdim=True).float().clamp(min=TINY) / TOP
        return (x.float() / step).round_(), step
    step = reach.float().clamp(min=TINY).view(1, 1) / TOP
    return (x.float() / step).round_().clamp_(-TOP, TOP), step


def fake_quantised(x: Tensor, reach: Tensor | None) -> Tensor:
    """Return x [..., in] as the int8 product sees it; gradients pass, but for what lies beyond `reach`."""
    steps, step = quantised(x.detach().reshape(-1, x.shape[-1]), reach)
    seen = (steps * step).view(x.shape).to(x.dtype)
    passing = x if reach is None else x.clamp(-reach.to(x.dtype), reach.to(x.dtype))
    return seen + (passing - passing.detach())


def _product(x: Tensor, codes: Tensor, scale: Tensor, reach: Tensor | None) -> Tensor:
    """Return x W^T [tokens, out] in the type of x."""
    steps, step = quantised(x, reach)
    if x.device.type in FAST and x.shape[0] > 0:
        sums = torch._int_mm(steps.to(torch.int8), codes.t()).float()
    else:  # exact below 2^24, which takes more than 1,000 products of the largest codes
        sums = F.linear(steps, codes.float())
    return sums.mul_(step).mul_(scale.float()).to(x.dtype)
