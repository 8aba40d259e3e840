"""How many bits each module gets under a budget of bytes, by what its rounding does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kroncc.api import PassError, Site
from kroncc_passes._quantize_gptq import output_error

CHOICES = (2, 3, 4, 5, 6, 7, 8)


def split(costs: Sequence[Sequence[int]], errors: Sequence[Sequence[float]], budget: int) -> list[int]:
    """Return for each site the number of the choice it takes: a small sum of errors within the budget.

    `costs` and `errors` have a row a site and a column a choice, costs rising. Sites start at the cheapest;
    then the step that saves most error a byte is taken again and again, as long as one fits. The result is
    never worse than one choice for all. The cheapest choices must fit.
    """
    taken = [0] * len(costs)
    left = budget - sum(row[0] for row in costs)
    while step := _best_step(costs, errors, taken, left):
        site, choice = step
        left -= costs[site][choice] - costs[site][taken[site]]
        taken[site] = choice
    same = [[choice] * len(costs) for choice in range(len(CHOICES))]
    fitting = [one for one in same if sum(row[c] for row, c in zip(costs, one, strict=True)) <= budget]
    return min([taken, *fitting], key=lambda one: sum(row[c] for row, c in zip(errors, one, strict=True)))


def _best_step(
    costs: Sequence[Sequence[int]], errors: Sequence[Sequence[float]], taken: Sequence[int], left: int
) -> tuple[int, int] | None:
    """Return the site and the choice that save most error a byte and fit; None if nothing does."""
    best, found = 0.0, None
    for site, now in enumerate(taken):
        for choice in range(now + 1, len(costs[site])):
            more = costs[site][choice] - costs[site][now]
            gain = (errors[site][now] - errors[site][choice]) / max(more, 1)
            if more <= left and gain > best:
                best, found = gain, (site, choice)
    return found


def rounding_error(site: Site, new: nn.Module, sensitivity: str) -> float:
    """Return what putting `new` at `site` costs.

    `outputs`: E norm(y - y')^2 / E norm(y)^2 of the outputs less bias, on the calibration inputs. `fisher`:
    the sum of squared differences of the weight, each times its mean squared gradient. Raises PassError K473
    where that was not measured.
    """
    stats = site.stats
    if sensitivity == "fisher":
        if stats is None or stats.fisher is None:
            raise unmeasured(site, "squared gradients", "set `sensitivity: outputs`")
        rounded: Any = new.weight
        difference = (site.module.get_parameter("weight") - rounded).float()
        return float((stats.fisher * difference.square()).sum())
    if stats is not None and stats.moment is not None:
        zero = stats.moment.new_zeros(1, len(stats.moment))
        inputs = torch.cat([torch.eye(len(stats.moment)), zero])
        old, rounded = (_map(module, inputs) for module in (site.module, new))
        return _ratio(output_error(old - rounded, stats.moment), output_error(old, stats.moment))
    if stats is not None and stats.lookups is not None:
        index = torch.arange(len(stats.lookups))
        old, rounded = site.module(index), new(index)
        weighted = ((y.double() ** 2).sum(1) * stats.lookups.double() for y in (old - rounded, old))
        return _ratio(*weighted)
    raise unmeasured(site, "inputs", "calibrate the step on rows that reach the module")


def unmeasured(site: Site, what: str, remedy: str) -> PassError:
    """Return the error of a pass that needs statistics which a site does not have."""
    return PassError(
        f"{site.fqn}: quantize needs its {what}, and nothing was measured",
        code="K473",
        expected="a step with `calibrate`",
        remedy=remedy,
    )


def _map(module: nn.Module, inputs: Tensor) -> Tensor:
    """Return the matrix [out, in] of a linear module from its outputs for unit vectors and, last, zero."""
    out = module(inputs.to(next(p.dtype for p in module.parameters() if p.is_floating_point())))
    difference: Tensor = (out[:-1] - out[-1:]).t().double()
    return difference


def _ratio(error: Tensor, whole: Tensor) -> float:
    return float(error.sum()) / max(float(whole.sum()), 1e-30)
