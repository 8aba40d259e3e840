"""What a node of a model graph is: its operator's name and class, its module's kind, whether it is linear."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import fx, nn

from kroncc.graph.modules import Attention

Kind = Literal["linear", "embedding", "norm", "identity", "elementwise", "attention", "other"]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


SHAPE = _words(
    """
    view _unsafe_view reshape view_as reshape_as flatten unflatten transpose permute t mT movedim
    swapaxes contiguous clone alias detach to _to_copy type_as float lift_fresh lift_fresh_copy slice
    select narrow unsqueeze squeeze expand expand_as repeat repeat_interleave tile roll split
    split_with_sizes chunk unbind getitem cat stack dropout
    """
)
VIEWS = SHAPE - _words("contiguous clone cat stack repeat repeat_interleave tile roll _to_copy dropout")
ARITHMETIC = frozenset({"neg", "mul", "div", "true_divide", "add", "sub", "rsub"})
STATISTICS = _words(
    """
    layer_norm native_layer_norm rms_norm group_norm pow square mean sum rsqrt sqrt var std norm
    linalg_vector_norm reciprocal
    """
)
NONLINEAR = _words(
    """
    gelu relu silu tanh sigmoid erf exp pow square elu leaky_relu mish softplus hardswish hardsigmoid
    hardtanh celu selu prelu relu6 clamp clamp_min clamp_max maximum minimum abs sqrt log_sigmoid
    softsign glu
    """
)
PRODUCTS = frozenset({"matmul", "bmm", "baddbmm"})
SOFTMAX = frozenset({"softmax", "_softmax"})
MASKING = frozenset({"masked_fill", "where"})
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
CONVOLUTIONS = nn.modules.conv._ConvNd


def op_name(node: fx.Node) -> str:
    """Return the operator's plain name: `add` for `aten.add.Tensor` and its in-place form; "" for modules."""
    if node.op == "call_method":
        return str(node.target).rstrip("_")
    if node.op != "call_function":
        return ""
    if node.target is operator.getitem:
        return "getitem"
    name = getattr(node.target, "__name__", "")
    if isinstance(node.target, torch._ops.OpOverload):
        name = node.target.overloadpacket.__name__
    return name if name.startswith("__") else name.rstrip("_")


def is_in_place(node: fx.Node) -> bool:
    """Say whether the node writes into its first operand."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def module_of(node: fx.Node) -> nn.Module | None:
    """Return the module that a `call_module` node calls."""
    if node.op != "call_module":
        return None
    owner = node.graph.owning_module
    return owner.get_submodule(str(node.target)) if owner is not None else None


def value_of(node: fx.Node) -> torch.Tensor | None:
    """Return the node's fake tensor (symbolic shape), or None where it gives no single tensor."""
    value = node.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """Return the operands that are tensors or lists of them, in order; shapes and numbers are left out."""
    return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), (torch.Tensor, list, tuple))]


def kind_of(node: fx.Node) -> Kind:
    """Classify a node that calls a module, by what the module does to shapes and values."""
    module = module_of(node)
    if module is None:
        return "other"
    if isinstance(module, Attention):
        return "attention"
    if isinstance(module, NORMS):
        return "norm"
    if isinstance(module, (nn.Identity, nn.modules.dropout._DropoutNd)):
        return "identity"
    operands = tensor_inputs(node)
    given = value_of(operands[0]) if len(operands) == 1 else None
    result = value_of(node)
    if given is None or result is None or isinstance(module, (CONVOLUTIONS, nn.RNNBase)):
        return "other"
    return _kind_by_shape(module, given, result)


def _kind_by_shape(module: nn.Module, given: torch.Tensor, result: torch.Tensor) -> Kind:
    if not given.is_floating_point():
        return "embedding" if result.is_floating_point() and result.dim() == given.dim() + 1 else "other"
    if not result.is_floating_point() or given.dim() != result.dim():
        return "other"
    if _has_matrix(module, given, result):
        return "linear"
    return _behaviour(module, result) if given.shape[-1] == result.shape[-1] else "other"


def _has_matrix(module: nn.Module, given: torch.Tensor, result: torch.Tensor) -> bool:
    """Say whether the module holds more than vectors: packed weights may be one long vector."""
    held = list(_held(module))
    widest = max(_static(given), _static(result))
    return any(tensor.dim() >= 2 for tensor in held) or sum(tensor.numel() for tensor in held) > 8 * widest


def _held(module: nn.Module) -> Iterable[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _static(value: torch.Tensor) -> int:
    width = value.shape[-1]
    return width if isinstance(width, int) else 2**62


def _behaviour(module: nn.Module, result: torch.Tensor) -> Kind:
    """Tell norm, identity and elementwise modules apart by running a small copy on the CPU, once a class."""
    settings = tuple(sorted((name, repr(value)) for name, value in vars(module).items() if _plain(value)))
    key = (type(module), settings, _static(result))
    if key not in _SEEN:
        with torch.device("cpu"):  # the caller may be building on meta
            _SEEN[key] = _probe(module, _static(result))
    return _SEEN[key]


_SEEN: dict[tuple[Any, ...], Kind] = {}


def _plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str, tuple)) or value is None


def _probe(module: nn.Module, width: int) -> Kind:
    if width > 2**20:
        return "other"
    given = 3 * torch.sin(torch.arange(2.0 * width)).reshape(1, 2, width) + 0.5
    try:
        once, thrice = _run_copy(module, given), _run_copy(module, 3 * given)
    except Exception:  # a module that cannot be probed is none of the three; nothing is lost but a role
        return "other"
    if not isinstance(once, torch.Tensor) or once.shape != given.shape:
        return "other"
    if torch.allclose(once, given):
        return "identity"
    # Normalisation divides the scale out; an elementwise function that does so is constant on each side of 0.
    return "norm" if torch.allclose(once, thrice, rtol=1e-2, atol=1e-3) else "elementwise"


@torch.no_grad()
def _run_copy(module: nn.Module, given: torch.Tensor) -> torch.Tensor:
    copied = copy.deepcopy(module).to_empty(device="cpu").float().eval()
    for tensor in _held(copied):
        tensor.fill_(1)
    result: torch.Tensor = copied(given)
    return result


def is_linear(node: fx.Node) -> bool:
    """Say whether the node calls a linear map `[..., in] -> [..., out]`, built or put in place by a pass."""
    return kind_of(node) == "linear"


def is_anonymous_linear(node: fx.Node) -> bool:
    """Say whether the node multiplies by a parameter without a module of its own (walks end there)."""
    if op_name(node) not in {"linear", "addmm", "conv1d", "conv2d", "einsum", *PRODUCTS}:
        return False
    return op_name(node) in {"linear", "conv1d", "conv2d"} or any(
        operand.op == "get_attr" for operand in node.all_input_nodes
    )
