"""The layers against the dense weight that their factors stand for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from kroncc.api import PassError
from kroncc_passes._low_rank_layers import LowRankEmbedding, LowRankLinear


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def test_full_rank_of_the_layers_is_lossless():
    weight = normal(36, 24, dtype=torch.float64)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    x = normal(3, 24, dtype=torch.float64)
    torch.testing.assert_close(LowRankLinear(u * s, v)(x), x @ weight.T)


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (0,)])
def test_linear_is_the_dense_map(lead):
    u, v, bias = (normal(*s, dtype=torch.float64) for s in ((7, 3), (3, 5), (7,)))
    x = normal(*lead, 5, dtype=torch.float64)
    torch.testing.assert_close(LowRankLinear(u, v, bias)(x), F.linear(x, u @ v, bias))
    torch.testing.assert_close(LowRankLinear(u, v).weight, u @ v)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (0,)])
def test_embedding_is_the_dense_lookup(shape):
    u, v = normal(9, 3, dtype=torch.float64), normal(3, 5, dtype=torch.float64)
    index = torch.randint(9, shape)
    torch.testing.assert_close(LowRankEmbedding(u, v)(index), F.embedding(index, u @ v))


def test_padding_sends_no_gradient():
    u, v = normal(9, 3), normal(3, 5)
    padded, alone = LowRankEmbedding(u.clone(), v.clone(), 2), LowRankEmbedding(u.clone(), v.clone())
    padded(torch.tensor([2, 4, 2])).square().sum().backward()
    alone(torch.tensor([4])).square().sum().backward()
    torch.testing.assert_close(padded.u.grad, alone.u.grad)
    torch.testing.assert_close(padded.v.grad, alone.v.grad)


def test_gradients_are_those_of_the_dense_map():
    layer = LowRankLinear(*(normal(*s, dtype=torch.float64) for s in ((7, 3), (3, 5), (7,))))
    plain = [p.detach().clone().requires_grad_() for p in (layer.u, layer.v, layer.bias)]
    x = normal(4, 5, dtype=torch.float64)
    layer(x).square().sum().backward()
    F.linear(x, plain[0] @ plain[1], plain[2]).square().sum().backward()
    for mine, theirs in zip((layer.u, layer.v, layer.bias), plain, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_types_under_autocast_are_those_of_the_dense_module(kind):
    u, v = normal(9, 3), normal(3, 5)
    new = LowRankEmbedding(u, v) if kind == "embedding" else LowRankLinear(u, v)
    module = nn.Embedding(9, 5) if kind == "embedding" else nn.Linear(5, 9)
    x = torch.zeros(2, dtype=torch.long) if kind == "embedding" else torch.zeros(2, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert new(x).dtype == module(x).dtype


def test_flops_are_two_a_multiply_add():
    u, v = normal(36, 5), normal(5, 24)
    assert LowRankLinear(u, v).flops((2, 7, 24)) == 2 * 14 * (24 * 5 + 5 * 36)
    assert LowRankEmbedding(u, v).flops((2, 7)) == 2 * 14 * 5 * 24


@pytest.mark.parametrize("make", [LowRankLinear, LowRankEmbedding])
def test_what_is_tied_has_the_same_factors(make):
    first, head = make(normal(36, 4), normal(4, 24)), nn.Linear(24, 36).eval()
    linear, table = first.tied_to(head), first.tied_to(nn.Embedding(36, 24, padding_idx=1))
    assert linear.u is table.u is first.u
    assert linear.v is table.v is first.v
    assert linear.bias is head.bias
    assert not linear.training
    assert table.padding_idx == 1


@pytest.mark.parametrize("other", [nn.Linear(24, 35), nn.Embedding(24, 36), Conv1D(36, 24), nn.ReLU()])
def test_a_tie_to_something_else_is_refused(other):
    with pytest.raises(PassError, match=r"K462: .*36x24"):
        LowRankEmbedding(normal(36, 4), normal(4, 24)).tied_to(other)
