"""Which weights of a module can be quantised, and how they lie in memory."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from kroncc_passes._dense import UNTREATED
from kroncc_passes._quantize_grid import Grid
from kroncc_passes._quantize_int8 import Int8Linear
from kroncc_passes._quantize_stores import CodedWeight, Layout, PackedWeight
from kroncc_passes._stored import Store, is_live


def is_quantised(module: nn.Module) -> bool:
    """Say whether `module` holds quantised weights."""
    return any(isinstance(part, PackedWeight | CodedWeight | Int8Linear) for part in module.modules())


def unquantisable(module: nn.Module) -> str:
    """Return why the weights of `module` cannot be kept in another form, or nothing."""
    if any(map(is_live, module.modules())):
        return "is still changed by another pass of this step; quantise it in a later one"
    if isinstance(module, nn.RNNBase):
        return f"is a {type(module).__name__}, which reads its weights by other ways"
    used = [name for name in UNTREATED if getattr(module, name, None)]
    return f"is an embedding with {used[0]}, which acts on whole rows" if used else ""


def candidates(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights of `module`, by dotted name: matrices, and the values of a store."""
    return {
        name: p
        for name, p in module.named_parameters()
        if p.is_floating_point() and (p.dim() > 1 or isinstance(_owner(module, name), Store))
    }


def layout_of(module: nn.Module, name: str, bits: int) -> Layout:
    """Return how the weight `name` of `module` is packed."""
    owner = _owner(module, name)
    shape = module.get_parameter(name).shape
    return Layout(shape, bits, transposed=isinstance(owner, Conv1D), conv=isinstance(owner, _ConvNd))


def saves(layout: Layout, grid: Grid | None) -> bool:
    """Say whether a weight with its scales (four bytes each) takes less room than in half precision.

    The answer does not depend on the type of the model, which may be loaded in another one.
    """
    rows, row = layout.packed_shape
    scales = 1 << layout.bits
    if grid is not None:
        many, groups = grid.scales(layout.rows, layout.columns)
        scales = many * groups
    return rows * row + 4 * scales < 2 * layout.rows * layout.columns


def _owner(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name.rpartition(".")[0])
