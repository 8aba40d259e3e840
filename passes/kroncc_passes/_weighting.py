"""Which errors of a weight matter, read from what was measured at its site.

Where inputs x arrive, W' is to give what W gave: the least E norm(W t + b - W' x - b')^2. Here t = x, or, in
sequence, what the site got at the same place in the model before the step. With a bias the best b' is
b + W E[t] - W' E[x], and what is left is a matter of covariances; without one, of second moments. Either way
it is the distance to one target W* in the norm of a moment S, E norm(W* x - W' x)^2, and a constant.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kroncc.api import PassError, Site, SiteStats
from kroncc_passes._dense import bias_of, out_by_in, weight_of

RIDGE = 1e-3  # of the mean diagonal: what is added to a moment, so that directions never seen count a little
SCARCE = 0.1  # more of it with fewer vectors than features, times features / vectors
FLOOR = 0.1  # of all weight is spread over rows (tokens) alike, so that those not seen are not thrown away


@dataclass(frozen=True)
class InputProblem:
    """The least E norm(W* x - W' x)^2 over W': `target` W* [m, n], `moment` S [n, n], both regularised.

    `root` is the lower Cholesky factor of S; `pull` = W* S [m, n]; `weight` W itself. All float64.
    `ridge` is what S has on its diagonal beyond what was measured; it pulls W' to W.
    """

    weight: Tensor
    target: Tensor
    moment: Tensor
    root: Tensor
    pull: Tensor
    ridge: float

    def error(self, other: Tensor) -> float:
        """Return E norm(W t - W' x)^2 as measured, without the ridge, less what does not depend on W'."""
        regular = other @ self.moment - 2 * self.pull
        return float((other * (regular - self.ridge * (other - 2 * self.weight))).sum().item())


def input_problem(site: Site) -> InputProblem:
    """Return what the inputs of the linear map at `site` make of the error. Raises PassError K426-K428."""
    weight = weight_of(site.module).detach().double()
    stats = _measured(site)
    _require(stats.moment, stats.mean)
    moment, cross = _moments(stats, weight.device, centred=bias_of(site.module) is not None)
    moment, root, ridge = _regular(moment, stats.count)
    if cross is None:
        return InputProblem(weight, weight, moment, root, weight @ moment, ridge)
    pull = weight @ cross + ridge * weight
    target = torch.cholesky_solve(pull.T, root).T
    return InputProblem(weight, target, moment, root, pull, ridge)


def row_weights(site: Site) -> Tensor:
    """Return how much the error of each row of an embedding counts [rows], float64, 1 + FLOOR in all.

    Raises PassError K426-K428.
    """
    lookups = _require(_measured(site).lookups).to(site.module.get_parameter("weight").device)
    return lookups / lookups.sum() + FLOOR / lookups.shape[0]


def fisher_of(site: Site) -> Tensor:
    """Return the Fisher information of the weights at `site` as [out, in], float64.

    Raises PassError K426-K428.
    """
    fisher = _require(_measured(site).fisher).to(site.module.get_parameter("weight").device)
    return out_by_in(site.module, fisher)


def corrected_bias(site: Site, other: Tensor) -> nn.Parameter | None:
    """Return the bias b + W E[t] - W' E[x] that goes with W' = `other`; None where the map has none.

    A new Parameter, also on meta: the bias of the module that is replaced stays as it is.
    """
    bias = bias_of(site.module)
    if bias is None or bias.is_meta:
        return None if bias is None else nn.Parameter(torch.empty_like(bias), bias.requires_grad)
    stats = _measured(site)
    weight = weight_of(site.module).detach().double()
    mean = _require(stats.mean).to(bias.device)
    before = mean if stats.cross_mean is None else stats.cross_mean.double().to(bias.device)
    new = bias.detach().double() + weight @ before - other.to(weight) @ mean
    return nn.Parameter(new.to(bias.dtype), bias.requires_grad)


def output_error(weight: Tensor, other: Tensor, stats: SiteStats, *, corrected: bool = False) -> float:
    """Return E norm(W t - W' x)^2 / E norm(W t)^2 for W = `weight` and W' = `other`, [out, in].

    `corrected`: with the bias that suits W' best. Of an embedding (`stats.lookups`), the error of the rows as
    they are looked up. In sequence the best linear guess of W t from x stands for W t, which was not kept.
    """
    weight, other = weight.detach().double(), other.detach().double()
    if stats.lookups is not None:
        rows = stats.lookups.double()[:, None]
        return float(((rows * (weight - other).square()).sum() / (rows * weight.square()).sum()).item())
    moment, cross = _moments(stats, weight.device, centred=False)
    spread, together = _moments(stats, weight.device, centred=True) if corrected else (moment, cross)
    whole = _guess(weight, moment, cross, stats.count)
    miss = _guess(weight, spread, together, stats.count) - other
    return float((((miss @ spread) * miss).sum() / ((whole @ moment) * whole).sum()).item())


def _guess(weight: Tensor, moment: Tensor, cross: Tensor | None, count: int) -> Tensor:
    """Return the map W* whose W* x comes closest to W t."""
    if cross is None:
        return weight
    _, root, ridge = _regular(moment, count)
    return torch.cholesky_solve((weight @ cross + ridge * weight).T, root).T


def _moments(stats: SiteStats, device: torch.device, *, centred: bool) -> tuple[Tensor, Tensor | None]:
    """Return E[x x^T] and E[t x^T] in float64, or the covariances; None for the second where t = x."""
    assert stats.moment is not None
    moment = stats.moment.double().to(device)
    cross = None if stats.cross is None else stats.cross.double().to(device)
    if not centred:
        return moment, cross
    assert stats.mean is not None
    mean = stats.mean.double().to(device)
    moment = moment - torch.outer(mean, mean)
    if cross is None:
        return moment, None
    assert stats.cross_mean is not None
    return moment, cross - torch.outer(stats.cross_mean.double().to(device), mean)


def _regular(moment: Tensor, count: int) -> tuple[Tensor, Tensor, float]:
    """Return `moment` with a ridge that makes it positive definite, its Cholesky factor, and the ridge.

    A covariance is a small difference where the mean is large; rounding may then ask for a larger ridge.
    """
    size = moment.shape[0]
    mean = moment.diagonal().mean().item()
    ridge = (RIDGE + SCARCE * size / count) * mean if mean > 0 else 1.0
    while True:
        regular = moment + ridge * torch.eye(size, dtype=moment.dtype, device=moment.device)
        root, failed = torch.linalg.cholesky_ex(regular)
        if not failed:
            return regular, root, ridge
        ridge *= 10


def _measured(site: Site) -> SiteStats:
    if site.stats is None:
        raise _missing()
    if site.stats.count > 0:
        return site.stats
    raise PassError(
        "nothing reached it while the step was calibrated",
        code="K427",
        expected="a module that every row of the calibration data goes through",
        remedy="leave it out with `exclude`, or treat it in a pass of its own with `weighted: none`",
    )


def _require(tensor: Tensor | None, *others: Tensor | None) -> Tensor:
    """Return `tensor` in float64; raise PassError K426 or K428 if it or one of `others` is of no use."""
    for one in (tensor, *others):
        if one is None:
            raise _missing()
        if not one.isfinite().all():
            raise PassError(
                "what was measured there holds NaN or infinite values",
                code="K428",
                expected="finite inputs and gradients",
                remedy="calibrate in float32, or leave the module out with `exclude`",
            )
    assert tensor is not None
    return tensor.double()


def _missing() -> PassError:
    return PassError(
        "a weighted fit needs what was measured at the module, and there is nothing",
        code="K426",
        expected="`calibrate` in the compress step, with data that the model takes",
        remedy="add `calibrate: {data: NAME}` beside `passes`, or set `weighted: none`",
    )
