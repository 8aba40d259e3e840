"""Products of bytes against integers in numpy; gradients; compilation; what a device without them does."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from kroncc.api import PassError
from kroncc_passes import _quantize_int8
from kroncc_passes._quantize_grid import Grid
from kroncc_passes._quantize_int8 import Int8Linear, fake_quantised
from kroncc_passes._quantize_live import int8_linear
from kroncc_passes._quantize_stores import Layout


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(rows=12, columns=40, reach=None, granularity="channel", bias=True):
    weight = normal(rows, columns)
    held = nn.Parameter(normal(rows, seed=1)) if bias else None
    fixed = None if reach is None else torch.tensor(reach)
    return int8_linear(weight, Layout(weight.shape, 8), Grid(8, granularity), held, fixed)


def by_numpy(module, x):
    flat = x.detach().numpy().reshape(-1, x.shape[-1])
    if module.reach is None:
        step = np.abs(flat).max(1, keepdims=True) / np.float32(127)
    else:
        step = np.float32(module.reach.item()) / np.float32(127)
    inputs = np.clip(np.round(flat / step), -127, 127).astype(np.int64)
    sums = inputs @ module.codes.numpy().astype(np.int64).T
    out = sums * step.astype(np.float64) * module.scale.detach().numpy().astype(np.float64)
    out = out if module.bias is None else out + module.bias.detach().numpy()
    return torch.from_numpy(out.astype(np.float32)).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("reach", [None, 1.5])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("shape", [(40,), (1, 40), (2, 3, 40), (0, 40), (33, 40)])
def test_is_the_product_of_integers(reach, granularity, shape):
    module, x = made(reach=reach, granularity=granularity), normal(*shape, seed=2)
    got = module(x)
    assert got.shape == (*shape[:-1], 12)
    if x.numel():
        torch.testing.assert_close(got, by_numpy(module, x), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(module(x), got, rtol=0, atol=0)


def test_is_near_the_product_of_floats():
    module, x = made(columns=400), normal(64, 400, seed=2)
    want = nn.functional.linear(x, normal(12, 400), module.bias)
    error = (module(x) - want).norm() / want.norm()
    assert error < 0.012
    assert (module.weight - normal(12, 400)).abs().max() <= 0.5001 * module.scale.max()


def test_where_there_is_no_product_of_bytes(monkeypatch):
    module, x = made(), normal(5, 40, seed=2)
    want = module(x)
    monkeypatch.setattr(_quantize_int8, "FAST", ())
    torch.testing.assert_close(module(x), want)


@pytest.mark.parametrize("reach", [None, 1.5])
def test_gradients_are_those_of_the_rounded_weight(reach):
    module, x = made(reach=reach), normal(3, 5, 40, seed=2).requires_grad_()
    out = module(x)
    pull = normal(*out.shape, seed=3)
    out.backward(pull)
    want = pull @ module.weight
    if reach is not None:
        want = torch.where(x.abs() <= reach, want, 0)
    torch.testing.assert_close(x.grad, want.detach())
    torch.testing.assert_close(module.bias.grad, pull.sum((0, 1)))
    assert [name for name, p in module.named_parameters() if p.requires_grad] == ["bias"]


@pytest.mark.parametrize("reach", [None, 1.5])
def test_fake_inputs_are_those_of_the_product(reach):
    module, x = made(reach=reach, bias=False), normal(7, 40, seed=2)
    seen = fake_quantised(x, module.reach)
    torch.testing.assert_close(nn.functional.linear(seen, module.weight), module(x), rtol=1e-5, atol=1e-5)


def test_zeros_and_long_vectors_are_exact():
    module = made(columns=3000, bias=False)
    assert not module(torch.zeros(2, 3000)).any()
    x = torch.full((1, 3000), 5.0)
    torch.testing.assert_close(module(x), by_numpy(module, x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    module = made().to(dtype)
    x = normal(4, 40, seed=2).to(dtype)
    out = module(x)
    assert out.dtype == dtype
    assert module.codes.dtype == torch.int8
    torch.testing.assert_close(out.float(), made()(x.float()), rtol=0.05, atol=0.15)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch.compile does so itself
def test_compiles_whole_and_exports():
    module, x = made(), normal(6, 40, seed=2)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        want = module(x)
        torch.testing.assert_close(compiled(x), want)
        program = torch.export.export(module, (x,), strict=False)
        torch.testing.assert_close(program.module()(x), want)
    x = x.requires_grad_()
    compiled(x).sum().backward()
    assert x.grad is not None


def test_costs_and_names():
    module = made()
    assert module.flops((2, 5, 40)) == 2 * 10 * 40 * 12
    assert module.weights() == 40 * 12 + 12
    assert module.shape_text() == "12x40, int8 x int8"
    assert set(module.state_dict()) == {"codes", "scale", "bias"}
    assert copy.deepcopy(module)(normal(1, 40)).equal(module(normal(1, 40)))


def test_a_tied_linear_shares_the_codes():
    module, other = made(), nn.Linear(40, 12)
    twin = module.tied_to(other)
    assert isinstance(twin, Int8Linear)
    assert twin.codes is module.codes
    assert twin.bias is other.bias
    with pytest.raises(PassError, match="K470"):
        module.tied_to(nn.Embedding(12, 40))
