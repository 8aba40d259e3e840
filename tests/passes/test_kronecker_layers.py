"""The layers against the dense weight that their factors stand for, formed by torch.kron or numpy.kron."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kroncc.api import PassError
from kroncc_passes._kronecker_layers import KroneckerEmbedding, KroneckerLinear
from kroncc_passes._kronecker_product import contraction

# Both orders in both layouts, and shapes where an axis is 1.
SHAPES = [
    ((5, 3), (18, 20)),  # B first as it lies
    ((2, 8), (20, 18)),  # A first as it lies
    ((20, 4), (2, 6)),  # B first, axes exchanged
    ((4, 20), (6, 2)),  # A first, axes exchanged
    ((1, 7), (5, 1)),
    ((6, 1), (1, 4)),
    ((1, 1), (3, 4)),
    ((3, 4), (1, 1)),
]


def factors(a, b, rank=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(rank, *a, generator=generator, dtype=torch.float64).to(dtype)
    return left, torch.randn(rank, *b, generator=generator, dtype=torch.float64).to(dtype)


def dense(a, b, scale=None):
    terms = [torch.kron(left, right) for left, right in zip(a, b, strict=True)]
    return sum(terms if scale is None else (s * term for s, term in zip(scale, terms, strict=True)))


def test_the_shapes_cover_all_four_ways():
    ways = {contraction(a, b)[:2] for a, b in SHAPES}
    assert ways == {(True, True), (True, False), (False, True), (False, False)}


@pytest.mark.parametrize("lead", [(), (1,), (7,), (2, 3), (0,), (2, 0, 3)])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize(("a", "b"), SHAPES)
def test_linear_is_the_dense_map(a, b, rank, lead):
    left, right = factors(a, b, rank)
    bias = torch.randn(a[0] * b[0], dtype=torch.float64)
    layer = KroneckerLinear(left, right, bias, torch.linspace(0.5, 2, rank, dtype=torch.float64))
    weight = dense(left, right, layer.scale)
    x = torch.randn(*lead, a[1] * b[1], dtype=torch.float64)
    got = layer(x)
    torch.testing.assert_close(got, F.linear(x, weight, bias))
    torch.testing.assert_close(layer.weight, weight)
    assert got.is_contiguous()


def test_input_need_not_be_contiguous():
    left, right = factors((4, 20), (6, 2))
    x = torch.randn(40, 5, 3, dtype=torch.float64).permute(2, 1, 0)
    torch.testing.assert_close(KroneckerLinear(left, right)(x), x @ dense(left, right).T)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize(("a", "b"), SHAPES)
def test_gradients_are_those_of_the_dense_map(a, b, rank):
    left, right = factors(a, b, rank)
    layer = KroneckerLinear(
        left.clone(), right.clone(), torch.zeros(a[0] * b[0]).double(), torch.ones(rank).double()
    )
    plain = [p.detach().clone().requires_grad_() for p in (layer.a, layer.b, layer.bias, layer.scale)]
    x = torch.randn(4, a[1] * b[1], dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    weigh = torch.randn(4, a[0] * b[0], dtype=torch.float64)
    (layer(x) * weigh).sum().backward()
    (F.linear(y, dense(plain[0], plain[1], plain[3]), plain[2]) * weigh).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    for mine, theirs in zip((layer.a, layer.b, layer.bias, layer.scale), plain, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize(
    ("a", "b"), [((3, 2), (2, 2)), ((2, 3), (3, 17)), ((3, 2), (17, 2)), ((2, 3), (2, 3))]
)
def test_gradcheck(a, b):
    left, right = (factor.requires_grad_() for factor in factors(a, b, 2))
    x = torch.randn(3, a[1] * b[1], dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x, a, b: _shared(a, b)(x), (x, left, right))


def _shared(a, b):
    layer = KroneckerLinear(torch.zeros_like(a), torch.zeros_like(b))
    del layer.a, layer.b
    layer.a, layer.b = a, b
    return layer


@settings(max_examples=80, deadline=None)
@given(sizes=st.tuples(*[st.integers(1, 20)] * 4), rank=st.integers(1, 3), tokens=st.integers(0, 4))
def test_linear_agrees_with_numpy(sizes, rank, tokens):
    m1, n1, m2, n2 = sizes
    left, right = factors((m1, n1), (m2, n2), rank)
    weight = sum(np.kron(p, q) for p, q in zip(left.numpy(), right.numpy(), strict=True))
    x = np.random.default_rng(0).standard_normal((tokens, n1 * n2))
    np.testing.assert_allclose(
        KroneckerLinear(left, right)(torch.from_numpy(x)).detach(), x @ weight.T, atol=1e-9
    )


@settings(max_examples=40, deadline=None)
@given(sizes=st.tuples(*[st.integers(1, 6)] * 4), rank=st.integers(1, 3), seed=st.integers(0, 99))
def test_embedding_agrees_with_numpy(sizes, rank, seed):
    m1, n1, m2, n2 = sizes
    left, right = factors((m1, n1), (m2, n2), rank)
    weight = sum(np.kron(p, q) for p, q in zip(left.numpy(), right.numpy(), strict=True))
    index = np.random.default_rng(seed).integers(0, m1 * m2, (3, 2))
    np.testing.assert_allclose(
        KroneckerEmbedding(left, right)(torch.from_numpy(index)).detach(), weight[index]
    )


def test_forward_never_forms_the_weight(monkeypatch):
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for each in out if isinstance(out, tuple | list) else (out,):
                if isinstance(each, torch.Tensor) and each.dim():
                    largest = max(largest, each.untyped_storage().nbytes() // each.element_size())
            return out

    for a, b in (((64, 64), (8, 8)), ((8, 8), (64, 64))):
        layer = KroneckerLinear(*factors(a, b))
        x = torch.randn(2, 512, dtype=torch.float64, requires_grad=True)
        with Watch():
            layer(x).sum().backward()
        assert 0 < largest < 512 * 512 / 8
    embedding = KroneckerEmbedding(*factors((1000, 8), (1, 4)))
    with Watch():
        embedding(torch.arange(5)).sum().backward()
    assert largest <= 1000 * 8


@pytest.mark.parametrize("v2", [1, 3])
def test_padding_sends_no_gradient(v2):
    left, right = factors((12 // v2, 4), (v2, 2), 2)
    plain = nn.Embedding.from_pretrained(dense(left, right), freeze=False, padding_idx=5)
    layer = KroneckerEmbedding(left, right, padding_idx=5)
    index = torch.tensor([[5, 1], [2, 5]])
    torch.testing.assert_close(layer(index), plain(index))
    layer(torch.full((3,), 5)).sum().backward()
    assert not layer.a.grad.any()
    assert not layer.b.grad.any()
    layer(index).sum().backward()
    assert layer.a.grad.any()


def test_index_out_of_range_is_refused():
    layer = KroneckerEmbedding(*factors((10, 4), (1, 2), 2))
    for index in (10, -1):
        with pytest.raises(IndexError, match="out of range"):
            layer(torch.tensor([index]))


@pytest.mark.parametrize("rank", [1, 3])
def test_tied_head_shares_the_factors(rank):
    left, right = factors((30, 4), (1, 6), rank)
    embedding = KroneckerEmbedding(left, right, torch.ones(rank, dtype=torch.float64), padding_idx=0)
    head = nn.Linear(24, 30, dtype=torch.float64)
    twin = embedding.tied_to(head.eval())
    assert (twin.a is embedding.a, twin.b is embedding.b, twin.scale is embedding.scale) == (True, True, True)
    assert twin.bias is head.bias
    assert not twin.training
    x = torch.randn(2, 24, dtype=torch.float64)
    torch.testing.assert_close(twin(x), F.linear(x, embedding.weight, head.bias))
    back = twin.tied_to(nn.Embedding(30, 24, padding_idx=3))
    assert isinstance(back, KroneckerEmbedding)
    assert (back.a is embedding.a, back.padding_idx) == (True, 3)


@pytest.mark.parametrize(
    "module", [nn.Linear(24, 31), nn.Linear(30, 24), nn.Conv1d(24, 30, 1), nn.LayerNorm(24)]
)
def test_what_cannot_be_tied_is_refused(module):
    embedding = KroneckerEmbedding(*factors((30, 4), (1, 6)))
    with pytest.raises(PassError, match=r"K424.*cannot share"):
        embedding.tied_to(module)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("a", "b"), SHAPES[:4])
def test_half_precision(a, b, dtype):
    left, right = factors(a, b, 1, torch.float32)
    layer = KroneckerLinear(left, right, torch.randn(a[0] * b[0]))
    x = torch.randn(2, 9, a[1] * b[1])
    want = layer(x)
    got = layer.to(dtype)(x.to(dtype))
    assert got.dtype == dtype
    assert (got.float() - want).norm() < 0.02 * want.norm()
    embedding = KroneckerEmbedding(left, right)
    index = torch.arange(a[0] * b[0])
    assert embedding.to(dtype)(index).dtype == dtype


def test_autocast_gives_half_precision_like_a_linear_map():
    layer = KroneckerLinear(*factors((8, 2), (20, 18), 1, torch.float32), torch.randn(160))
    x = torch.randn(3, 36)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, plain = layer(x), nn.Linear(36, 160)(x)
    assert got.dtype == plain.dtype == torch.bfloat16


def test_state_and_repr():
    layer = KroneckerLinear(*factors((8, 2), (3, 4), 2), torch.zeros(24), torch.ones(2))
    assert list(layer.state_dict()) == ["a", "b", "scale", "bias"]
    assert repr(layer) == "KroneckerLinear(8, 24, 8x2 (x) 3x4, rank=2, scalars, bias=True)"
    assert list(KroneckerLinear(*factors((8, 2), (3, 4))).state_dict()) == ["a", "b"]
    embedding = KroneckerEmbedding(*factors((8, 2), (1, 4)), padding_idx=0)
    assert repr(embedding) == "KroneckerEmbedding(8, 8, 8x2 (x) 1x4, rank=1, padding_idx=0)"


@pytest.mark.parametrize(
    ("a", "b", "want"),
    [
        ((384, 384), (2, 2), 592_896),
        ((8, 2), (384, 384), 602_112),
        ((2, 8), (384, 384), 602_112),
        ((384, 48), (2, 16), 2 * (48 * 16 * 2 + 48 * 2 * 384)),
    ],
)
def test_flops_a_token(a, b, want):
    layer = KroneckerLinear(torch.empty(1, *a, device="meta"), torch.empty(1, *b, device="meta"))
    assert layer.flops((1, 1, layer.in_features)) == want
    assert layer.flops((2, 128, layer.in_features)) == 256 * want


@pytest.mark.parametrize(
    ("attention", "up", "total"),
    [
        (((384, 384), (2, 2)), ((8, 2), (384, 384)), 5.492e9),  # K_8
        (((384, 48), (2, 16)), ((16, 2), (192, 384)), 1.416e9),  # K_21
    ],
)
def test_flops_of_the_encoder_of_bert_base(attention, up, total):
    down = tuple((n, m) for m, n in up)
    maps = [attention] * 4 + [up, down]
    layers = [KroneckerLinear(*(torch.empty(1, *shape, device="meta") for shape in pair)) for pair in maps]
    got = 12 * sum(layer.flops((1, 128, layer.in_features)) for layer in layers)
    assert round(got, -6) == total


def test_flops_of_an_embedding_are_the_products_that_form_the_rows():
    a, b = torch.empty(1, 100, 96, device="meta"), torch.empty(1, 1, 8, device="meta")
    assert KroneckerEmbedding(a, b).flops((2, 5)) == 10 * 768
    assert KroneckerEmbedding(a.expand(3, -1, -1), b.expand(3, -1, -1)).flops((1,)) == 768 * 5


@pytest.mark.parametrize(("a", "b"), SHAPES[:4])
def test_exports_with_dynamic_sizes(a, b):
    layer = KroneckerLinear(*factors(a, b, 2), torch.zeros(a[0] * b[0]).double())
    x = torch.randn(2, 3, a[1] * b[1], dtype=torch.float64)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    exported = torch.export.export(layer, (x,), dynamic_shapes=(sizes,)).module()
    other = torch.randn(5, 4, a[1] * b[1], dtype=torch.float64)
    torch.testing.assert_close(exported(other), layer(other))


@pytest.mark.parametrize(("a", "b"), SHAPES[:4])
def test_is_one_graph_to_the_compiler(a, b):
    torch._dynamo.reset()
    layer = KroneckerLinear(*factors(a, b, 2), torch.zeros(a[0] * b[0]).double())
    x = torch.randn(2, 5, a[1] * b[1], dtype=torch.float64, requires_grad=True)
    got = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, layer(x))
    got.sum().backward()
    assert layer.a.grad is not None


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # of torch's own compiler
def test_compiles():
    torch._dynamo.reset()
    a, b = SHAPES[2]
    layer = KroneckerLinear(*factors(a, b, 2, torch.float32), torch.zeros(a[0] * b[0]))
    embedding = KroneckerEmbedding(*factors(a, b, 2, torch.float32), padding_idx=1)
    index = torch.randint(a[0] * b[0], (2, 5))

    def model(index):
        return layer(embedding(index)[..., : layer.in_features])

    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(index), model(index), rtol=1e-4, atol=1e-4)
    compiled(index).sum().backward()
    assert layer.a.grad is not None
    assert embedding.b.grad is not None
