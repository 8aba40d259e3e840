"""The pass `low-rank`: a weight becomes the product of two thin matrices."""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from kroncc.api import Calibration, PassError, Site, SitePass, Skip, exactly_one
from kroncc_passes._dense import DENSE, bias_of, located, unsupported, weight_of
from kroncc_passes._low_rank_fit import Weighted, energy_rank, fitted_factors
from kroncc_passes._low_rank_layers import LowRankEmbedding, LowRankLinear
from kroncc_passes._weighting import corrected_bias

Count = Annotated[int, Field(gt=0, strict=True)]
WAYS = ("rank", "ratio", "energy", "params")


class LowRank(SitePass):
    """Replace a weight by a product U V of two thin matrices, and compute from them.

    ## What it does

    W [m, n] (out x in, whatever way a module stores it; tokens x width of an embedding) becomes U [m, rank]
    times V [rank, n], the nearest product of that rank: the leading singular triples of W, the square root of
    a singular value to each side. A linear map becomes two, y = (x V^T) U^T + bias; an embedding becomes a
    table [tokens, rank] with a projection [rank, width]. A head tied to an embedding stays tied: it computes
    from the same factors. Biases stay as they are.

    With `weighted: activations` the product is the one with the least error of the outputs,
    E norm(W x - U V x)^2 over the inputs of calibration, in closed form (reduced-rank regression); the bias
    takes over what is missing in the mean. Rows of an embedding count by how often they are looked up. With
    `sequential`, U V sees the inputs that the part rewritten before it gives, and aims at the outputs of the
    model before the step. With `weighted: fisher` an entry counts by the Fisher information of its row and
    its column, and the bias stays. A weighted product is never worse than the nearest one in what it weighs.

    ## When it helps

    Where a model must become smaller and its linear maps faster: both factors are plain dense products. Of a
    word embedding it tends to keep more than one Kronecker product of the same size. Most weights are far
    from low rank, their outputs much less so: weigh by activations, and distil afterwards.

    ## When it is skipped

    The factors would have as many parameters as the weight or more, rank >= m n / (m + n); the module is a
    subclass, which may have a forward of its own; the embedding has `max_norm`, `scale_grad_by_freq` or
    `sparse`.

    ## Cost

    rank (m + n) parameters instead of m n, and as many multiply-adds a token; an embedding adds rank n
    multiply-adds a token to its look-up.

    ## Example

        - low-rank: {targets: ["@attention.*"], rank: 48}
        - low-rank: {targets: ["@ffn.*"], ratio: 8}
        - low-rank: {targets: ["@embedding.word"], params: 1_500_000, weighted: activations}
        - low-rank: {targets: ["@ffn.*"], energy: 0.9, weighted: activations, sequential: true}

    ## References

    Eckart and Young, The approximation of one matrix by another of lower rank, 1936. Lan et al., ALBERT, ICLR
    2020 (factorised embedding). Ganesh et al., Compressing large-scale Transformer-based models, TACL 2021.
    Izenman, Reduced-rank regression for the multivariate linear model, 1975. Hsu et al., Language model
    compression with weighted low-rank factorization, ICLR 2022 (`fisher`).
    """

    model_config = exactly_one(*([way] for way in WAYS))
    kind: ClassVar[str] = "low-rank"
    accepts: ClassVar[tuple[type[nn.Module], ...]] = DENSE

    rank: Count | None = Field(None, description="columns of U and rows of V, at most the shorter side of W")
    ratio: Annotated[float, Field(gt=1)] | None = Field(
        None,
        description="a module shrinks at least so many times, bias included: the largest rank that does",
    )
    energy: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="share of the squared singular values to keep, in the norm of `weighted`: the smallest "
        "rank that does. Weights and data decide; a plan shows the largest rank that still shrinks a module",
    )
    params: Count | None = Field(
        None, description="budget of parameters a module, bias included: the largest rank within it"
    )
    weighted: Weighted = Field(
        "none",
        description="none: the error of W counts | activations: that of the outputs counts, over the rows of "
        "`calibrate`; the bias is corrected | fisher: entries count by their Fisher information",
    )
    sequential: bool = Field(
        False,
        description="activations only: inputs come from the part that is already rewritten, targets from the "
        "model before the step",
    )

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if sum(getattr(self, way) is not None for way in WAYS) != 1:
            raise ValueError("give exactly one of: `rank`; `ratio`; `energy`; `params`")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.sequential and self.weighted != "activations":
            raise ValueError("`sequential` is a way to fit to activations: add `weighted: activations`")
        return self

    def needs(self) -> Calibration:
        """Return the moments of the inputs, or the Fisher information, if the error is weighted by them."""
        return Calibration(
            moments=self.weighted == "activations",
            fisher=self.weighted == "fisher",
            sequential=self.sequential,
        )

    def settled(self) -> bool:
        """Return False with `energy`: the weights, and the data if it is weighted, decide about the rank."""
        return self.energy is None

    def resolve(self, site: Site) -> Self | Skip:
        """Return the pass with `rank` explicit for the site, or a `Skip`.

        With `energy`, a site on meta gets the largest rank that shrinks it: an upper bound of what comes.
        Raises PassError K460 (rank too large), K461 (no rank is small enough for `ratio` or `params`), and
        with `energy` as `replace`.
        """
        if reason := unsupported(site.module, self.kind):
            return Skip(reason)
        rank = self._rank(site)
        m, n = weight_of(site.module).shape
        if rank * (m + n) >= m * n:
            return Skip(f"its factors would have {rank * (m + n):,} parameters, the weight has {m * n:,}")
        return self.model_copy(update={"rank": rank, "ratio": None, "energy": None, "params": None})

    def replace(self, site: Site) -> nn.Module | Skip:
        """Return the factored module.

        Raises PassError as `resolve`, K425 (the weight is not finite), and K426-K428 where a weighted product
        lacks statistics or cannot use them.
        """
        resolved = self.resolve(site)
        if isinstance(resolved, Skip):
            return resolved
        assert resolved.rank is not None
        module, old = site.module, site.module.get_parameter("weight")
        factors = self._factors(site, resolved.rank)
        u, v = (nn.Parameter(factor.to(old.dtype).contiguous(), old.requires_grad) for factor in factors)
        if isinstance(module, nn.Embedding):
            return LowRankEmbedding(u, v, module.padding_idx).train(module.training)
        bias = bias_of(module)
        if self.weighted == "activations":
            bias = corrected_bias(site, u.detach().double() @ v.detach().double())
        return LowRankLinear(u, v, bias).train(module.training)

    def _factors(self, site: Site, rank: int) -> tuple[Tensor, Tensor]:
        weight = weight_of(site.module)
        m, n = weight.shape
        if weight.is_meta:
            return weight.new_empty(m, rank), weight.new_empty(rank, n)
        try:
            return fitted_factors(site, self.weighted, rank)
        except PassError as error:
            raise located(site, error) from error

    def _rank(self, site: Site) -> int:
        """Return the rank given, the smallest with the energy, or the largest within the budget."""
        m, n = weight_of(site.module).shape
        if self.rank is not None:
            _check_rank(site.fqn, self.rank, m, n)
            return self.rank
        if self.energy is not None:
            return self._energetic(site, self.energy)
        bias = bias_of(site.module)
        fixed = 0 if bias is None else bias.numel()
        budget = self.params if self.ratio is None else int((m * n + fixed) / self.ratio)
        assert budget is not None
        if budget >= fixed + m + n:
            return min((budget - fixed) // (m + n), m, n)
        raise PassError(
            f"{site.fqn}: no rank of a {m}x{n} weight keeps the module to {budget} parameters",
            code="K461",
            expected=f"a budget of {fixed + m + n} or more, that of rank 1",
            remedy="lower `ratio`, or raise `params`",
        )

    def _energetic(self, site: Site, share: float) -> int:
        weight = weight_of(site.module)
        m, n = weight.shape
        if weight.is_meta:
            return max(1, (m * n - 1) // (m + n))
        try:
            return energy_rank(site, self.weighted, share)
        except PassError as error:
            raise located(site, error) from error


def _check_rank(fqn: str, rank: int, m: int, n: int) -> None:
    most, useless = min(m, n), -(-m * n // (m + n))
    if rank <= most:
        return
    raise PassError(
        f"{fqn}: rank {rank} is too large for a {m}x{n} weight",
        code="K460",
        expected=f"1 to {most}: the shorter side of the weight",
        remedy=f"set `rank` to {most} or less; from {useless} on, the factors are no smaller",
    )
