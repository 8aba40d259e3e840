"""The checks for pass authors must fail where a pass breaks its promise."""

from typing import ClassVar

import pytest
import torch
from torch import nn

from kroncc.api import Site, SitePass, Skip
from kroncc.testing import assert_lossless, assert_reloads, assert_rewrites, assert_skips


class Copy(SitePass):
    """A faithful pass."""

    kind: ClassVar[str] = "copy"

    def replace(self, site: Site) -> nn.Module | Skip:
        old = site.module
        if old.out_features == 1:
            return Skip("has one output")
        new = nn.Linear(old.in_features, old.out_features, device=old.weight.device)
        new.load_state_dict(old.state_dict())
        return new


class Halved(Copy):
    """Loses a little."""

    def replace(self, site: Site) -> nn.Module | Skip:
        new = super().replace(site)
        if isinstance(new, nn.Module):
            new.weight.data *= 0.5
        return new


class Vandal(Copy):
    """Changes its input."""

    def replace(self, site: Site) -> nn.Module | Skip:
        new = super().replace(site)
        site.module.weight.data.zero_()
        return new


class Liar(Copy):
    """Gives another shape on meta than on real weights."""

    def replace(self, site: Site) -> nn.Module | Skip:
        old = site.module
        return nn.Linear(old.in_features, old.out_features, bias=not old.weight.is_meta)


class Idle(Copy):
    """Keeps a parameter that it does not use."""

    def replace(self, site: Site) -> nn.Module | Skip:
        new = super().replace(site)
        if isinstance(new, nn.Module):
            new.spare = nn.Parameter(torch.zeros(1, device=site.module.weight.device))
        return new


def test_a_faithful_pass_goes_through():
    assert isinstance(assert_lossless(Copy(), nn.Linear(4, 6)), nn.Linear)
    assert assert_skips(Copy(), nn.Linear(4, 1), "one output") == "has one output"


@pytest.mark.parametrize(
    ("pass_", "message"),
    [(Vandal(), "changed weight"), (Liar(), "planned on meta"), (Idle(), "no gradient reaches spare")],
)
def test_broken_promises_are_found(pass_, message):
    with pytest.raises(AssertionError, match=message):
        assert_rewrites(pass_, nn.Linear(4, 6))


def test_a_loss_is_found():
    with pytest.raises(AssertionError, match="relative error"):
        assert_lossless(Halved(), nn.Linear(4, 6))


def test_a_skip_that_does_not_come_is_found():
    with pytest.raises(AssertionError, match="expected a skip"):
        assert_skips(Copy(), nn.Linear(4, 6))
    with pytest.raises(AssertionError, match="skipped: has one output"):
        assert_rewrites(Copy(), nn.Linear(4, 1))


@pytest.mark.parametrize(
    ("family", "auto"),
    [("bert", "AutoModel"), ("gpt2", "AutoModelForCausalLM"), ("bert", "AutoModelForMaskedLM")],
)
def test_the_kronecker_pass_reloads(tiny, family, auto):
    assert_reloads("kronecker", {"b": [1, 4]}, ["@embedding.word"], tiny(family, auto))
