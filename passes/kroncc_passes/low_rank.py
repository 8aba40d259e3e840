"""The pass `low-rank`: a weight becomes the product of two thin matrices."""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from kroncc.api import PassError, Site, SitePass, Skip, exactly_one
from kroncc_passes._dense import DENSE, bias_of, located, unsupported, weight_of
from kroncc_passes._kronecker_math import nearest_product
from kroncc_passes._low_rank_layers import LowRankEmbedding, LowRankLinear

Count = Annotated[int, Field(gt=0, strict=True)]
WAYS = ("rank", "ratio", "params")


class LowRank(SitePass):
    """Replace a weight by a product U V of two thin matrices, and compute from them.

    ## What it does

    W [m, n] (out x in, whatever way a module stores it; tokens x width of an embedding) becomes U [m, rank]
    times V [rank, n], the nearest product of that rank: the leading singular triples of W, the square root of
    a singular value to each side. A linear map becomes two, y = (x V^T) U^T + bias; an embedding becomes a
    table [tokens, rank] with a projection [rank, width]. A head tied to an embedding stays tied: it computes
    from the same factors. Biases stay as they are.

    ## When it helps

    Where a model must become smaller and its linear maps faster: both factors are plain dense products. Of a
    word embedding it tends to keep more than one Kronecker product of the same size. Most weights are far
    from low rank, so distil afterwards.

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
        - low-rank: {targets: ["@embedding.word"], params: 1_500_000}

    ## References

    Eckart and Young, The approximation of one matrix by another of lower rank, 1936. Lan et al., ALBERT, ICLR
    2020 (factorised embedding). Ganesh et al., Compressing large-scale Transformer-based models, TACL 2021.
    """

    model_config = exactly_one(*([way] for way in WAYS))
    kind: ClassVar[str] = "low-rank"
    accepts: ClassVar[tuple[type[nn.Module], ...]] = DENSE

    rank: Count | None = Field(None, description="columns of U and rows of V, at most the shorter side of W")
    ratio: Annotated[float, Field(gt=1)] | None = Field(
        None,
        description="a module shrinks at least so many times, bias included: the largest rank that does",
    )
    params: Count | None = Field(
        None, description="budget of parameters a module, bias included: the largest rank within it"
    )

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if sum(getattr(self, way) is not None for way in WAYS) != 1:
            raise ValueError("give exactly one of: `rank`; `ratio`; `params`")
        return self

    def resolve(self, site: Site) -> Self | Skip:
        """Return the pass with `rank` explicit for the site, or a `Skip`.

        Raises PassError K460 (rank too large), K461 (no rank is small enough for `ratio` or `params`).
        """
        if reason := unsupported(site.module, self.kind):
            return Skip(reason)
        rank = self._rank(site)
        m, n = weight_of(site.module).shape
        if rank * (m + n) >= m * n:
            return Skip(f"its factors would have {rank * (m + n):,} parameters, the weight has {m * n:,}")
        return self.model_copy(update={"rank": rank, "ratio": None, "params": None})

    def replace(self, site: Site) -> nn.Module | Skip:
        """Return the factored module. Raises PassError as `resolve`, and K425 (the weight is not finite)."""
        resolved = self.resolve(site)
        if isinstance(resolved, Skip):
            return resolved
        assert resolved.rank is not None
        module, old = site.module, site.module.get_parameter("weight")
        try:
            factors = _factors(weight_of(module), resolved.rank, site.seed)
        except PassError as error:
            raise located(site, error) from error
        u, v = (nn.Parameter(factor, old.requires_grad) for factor in factors)
        if isinstance(module, nn.Embedding):
            return LowRankEmbedding(u, v, module.padding_idx).train(module.training)
        return LowRankLinear(u, v, bias_of(module)).train(module.training)

    def _rank(self, site: Site) -> int:
        """Return the rank given, or the largest within the budget."""
        m, n = weight_of(site.module).shape
        if self.rank is not None:
            _check_rank(site.fqn, self.rank, m, n)
            return self.rank
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


def _factors(weight: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return U [m, rank] and V [rank, n], nearest to `weight` [m, n], of its type, on its device.

    A column (x) a row is their outer product, so the nearest sum of `rank` such Kronecker products is the
    truncated singular value decomposition. A weight on meta gives factors on meta. Raises PassError K425 if
    the weight is not finite.
    """
    m, n = weight.shape
    if weight.is_meta:
        return weight.new_empty(m, rank), weight.new_empty(rank, n)
    columns, rows = nearest_product(weight, (m, 1), (1, n), rank, seed)
    return columns.squeeze(2).T.to(weight.dtype).contiguous(), rows.squeeze(1).to(weight.dtype).contiguous()
