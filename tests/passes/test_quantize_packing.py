"""Packing without a gap: a plain loop over bits says what each byte holds, hypothesis what comes back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kroncc_passes._packing import PLANES, pack, packed_size, unpack

BITS = range(1, 9)


def packed_by_loop(values, bits):
    """The layout of the module's docstring, one value at a time."""
    width = -(-len(values) // 8) * 8
    values = list(values) + [0] * (width - len(values))
    out, below = [], 0
    for plane in PLANES[bits]:
        size = width * plane // 8
        row = [0] * size
        for place, value in enumerate(values):
            part = (value >> below) & ((1 << plane) - 1)
            row[place % size] |= part << (place // size * plane)
        out += row
        below += plane
    return out


@st.composite
def rows(draw):
    bits = draw(st.sampled_from(BITS))
    shape = draw(st.tuples(st.integers(1, 4), st.integers(0, 70)))
    seed = draw(st.integers(0, 2**32 - 1))
    return bits, np.random.default_rng(seed).integers(0, 1 << bits, shape, dtype=np.uint8)


@settings(max_examples=120, deadline=None)
@given(rows())
def test_what_is_packed_comes_back(case):
    bits, values = case
    packed = pack(torch.from_numpy(values), bits)
    assert packed.shape == (values.shape[0], packed_size(values.shape[1], bits))
    assert np.array_equal(unpack(packed, bits, values.shape[1]).numpy(), values)


@settings(max_examples=60, deadline=None)
@given(rows())
def test_a_plain_loop_packs_the_same_bytes(case):
    bits, values = case
    packed = pack(torch.from_numpy(values), bits).numpy()
    assert [packed_by_loop(row.tolist(), bits) for row in values] == packed.tolist()


@pytest.mark.parametrize("bits", BITS)
def test_eight_values_take_as_many_bytes_as_one_has_bits(bits):
    values = (torch.arange(64) % (1 << bits)).to(torch.uint8)
    assert pack(values, bits).numel() == 8 * bits
    assert packed_size(64, bits) == 8 * bits
    assert packed_size(1, bits) == bits


def test_four_bits_are_the_two_halves_of_a_row():
    row = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8], dtype=torch.uint8)
    assert pack(row, 4).tolist() == [0x51, 0x62, 0x73, 0x84]


def test_on_meta_shapes_alone():
    values = torch.empty(3, 11, dtype=torch.uint8, device="meta")
    packed = pack(values, 3)
    assert packed.shape == (3, 6)
    assert unpack(packed, 3, 11).shape == (3, 11)
