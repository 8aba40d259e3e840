"""The pass `kronecker`: a weight becomes a sum of Kronecker products."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from kroncc.api import Calibration, PassError, Site, SitePass, Skip, exactly_one
from kroncc_passes._dense import DENSE, bias_of, located, unsupported, weight_of
from kroncc_passes._kronecker_fit import fitted_factors
from kroncc_passes._kronecker_init import Init, initial_factors
from kroncc_passes._kronecker_layers import KroneckerEmbedding, KroneckerLinear
from kroncc_passes._kronecker_product import dense
from kroncc_passes._kronecker_shapes import Shape, check_rank, complete, factor_parameters, fit
from kroncc_passes._weighting import corrected_bias

Count = Annotated[int, Field(gt=0, strict=True)]
WAYS = ("a", "b"), ("ratio",), ("params",)


class Kronecker(SitePass):
    """Replace a weight by a sum of Kronecker products A (x) B, and compute from the factors.

    ## What it does

    W [m1 m2, n1 n2] (out x in, whatever way a module stores it; tokens x width of an embedding) becomes
    sum_k A_k (x) B_k with A_k [m1, n1] and B_k [m2, n2]. A linear map multiplies by the factors in the
    cheaper order, an embedding forms the rows that are looked up; W itself is never formed. A head tied to an
    embedding stays tied: it computes from the same factors. Biases stay as they are.

    With `weighted: activations` A and B minimise the error of the outputs, E norm(W x - W' x)^2 over the
    inputs of calibration, by alternating least squares from the nearest product; never worse than that one.
    The bias takes over what is missing in the mean. Rows of an embedding count by how often they are looked
    up. With `sequential`, W' sees the inputs that the part rewritten before it gives, and aims at the outputs
    of the model before the step.

    ## When it helps

    Where a model must become several times smaller and is distilled afterwards. Unlike a low-rank map,
    A (x) B can keep the full rank of W. The time falls most where B is the large factor. Many small products
    come closer to W than one large one of the same size. What is fitted to activations starts far better.

    ## When it is skipped

    The factors would have as many parameters as the weight or more; the module is a subclass, which may have
    a forward of its own; the embedding has `max_norm`, `scale_grad_by_freq` or `sparse`.

    ## Cost

    rank (m1 n1 + m2 n2) parameters instead of m1 m2 n1 n2; rank min(n1 m2 (n2 + m1), m1 n2 (n1 + m2))
    multiply-adds a token. Before any training the nearest product is far from most weights. A fit solves
    systems of rank n1 and of rank n2 unknowns, some dozens of times: seconds for a map of BERT.

    ## Example

        - kronecker: {targets: ["@ffn.up"], a: [8, 2], b: [384, 384]}
        - kronecker: {targets: ["@embedding.word"], b: [1, 8]}
        - kronecker: {targets: ["@attention.*"], ratio: 8, init: scaled}
        - kronecker: {targets: ["@ffn.*"], ratio: 8, rank: 8, weighted: activations, sequential: true}

    ## References

    Van Loan and Pitsianis, Approximation with Kronecker products, 1993. Tahaei et al., KroneckerBERT, NAACL
    2022. Krony-PT, arXiv 2412.12351 (`init: scaled` and `prune`, the scalars).
    """

    model_config = exactly_one(*WAYS)
    kind: ClassVar[str] = "kronecker"
    accepts: ClassVar[tuple[type[nn.Module], ...]] = DENSE

    a: tuple[Count, Count] | None = Field(
        None, description="[m1, n1], shape of A; if left out, follows from b"
    )
    b: tuple[Count, Count] | None = Field(
        None, description="[m2, n2], shape of B; if left out, follows from a"
    )
    ratio: Annotated[float, Field(gt=1)] | None = Field(
        None,
        description="a module shrinks at least so many times, bias included: of all shapes that do, the one "
        "with the most parameters, then the fewest FLOPs; an embedding keeps one row of A a token",
    )
    params: Count | None = Field(
        None, description="budget of parameters a module, bias included; shapes are chosen as for `ratio`"
    )
    rank: Count = Field(1, description="number of products summed, at most the entries of the smaller factor")
    scalars: bool = Field(False, description="a learnable scalar for each product")
    init: Init = Field(
        "nearest",
        description="nearest: least squared error of W | scaled: nearest, scaled to the norm of W | prune: "
        "the larger factor holds every k-th row and column of W, the smaller says which | random: normal, of "
        "the norm of W",
    )
    weighted: Literal["none", "activations"] = Field(
        "none",
        description="none: the error of W counts | activations: that of the outputs counts, over the rows of "
        "`calibrate`; the bias is corrected",
    )
    sequential: bool = Field(
        False,
        description="weighted only: inputs come from the part that is already rewritten, targets from the "
        "model before the step",
    )

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        given = [way for way in WAYS if any(getattr(self, name) is not None for name in way)]
        if len(given) != 1:
            raise ValueError("give exactly one of: `a` and/or `b`; `ratio`; `params`")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.weighted == "none" and self.sequential:
            raise ValueError("`sequential` is a way to fit to activations: add `weighted: activations`")
        if self.weighted != "none" and self.init != "nearest":
            raise ValueError("a weighted fit starts from the nearest product: leave out `init`")
        return self

    def needs(self) -> Calibration:
        """Return the moments of the inputs where the fit is weighted."""
        weighted = self.weighted == "activations"
        return Calibration(moments=weighted, sequential=self.sequential)

    def resolve(self, site: Site) -> Self | Skip:
        """Return the pass with `a` and `b` explicit for the site, or a `Skip`.

        Raises PassError K420, K421 (the shapes do not fit the weight), K422 (rank too large), K423 (nothing
        is small enough for `ratio` or `params`).
        """
        if reason := unsupported(site.module, self.kind):
            return Skip(reason)
        weight = weight_of(site.module)
        try:
            a, b = self._shapes(site.module, (weight.shape[0], weight.shape[1]))
            check_rank(a, b, self.rank)
        except PassError as error:
            raise located(site, error) from error
        count = factor_parameters(a, b, self.rank, self.scalars)
        if count >= weight.numel():
            return Skip(f"its factors would have {count:,} parameters, the weight has {weight.numel():,}")
        return self.model_copy(update={"a": a, "b": b, "ratio": None, "params": None})

    def replace(self, site: Site) -> nn.Module | Skip:
        """Return the factored module.

        Raises PassError as `resolve`, K425 (the weight is not finite), and K426-K428 where a weighted fit
        lacks statistics or cannot use them.
        """
        resolved = self.resolve(site)
        if isinstance(resolved, Skip):
            return resolved
        assert resolved.a is not None
        assert resolved.b is not None
        module, old = site.module, site.module.get_parameter("weight")
        factors = self._factors(site, resolved.a, resolved.b)
        a, b = (nn.Parameter(factor.to(old.dtype).contiguous(), old.requires_grad) for factor in factors)
        scale = nn.Parameter(old.new_ones(self.rank), old.requires_grad) if self.scalars else None
        if isinstance(module, nn.Embedding):
            return KroneckerEmbedding(a, b, scale, module.padding_idx).train(module.training)
        bias = bias_of(module)
        if self.weighted != "none":
            bias = corrected_bias(site, dense(a.detach().double(), b.detach().double()))
        return KroneckerLinear(a, b, bias, scale).train(module.training)

    def _factors(self, site: Site, a: Shape, b: Shape) -> tuple[Tensor, Tensor]:
        weight = weight_of(site.module)
        try:
            if self.weighted == "none" or weight.is_meta:
                return initial_factors(self.init, weight, a, b, self.rank, site.seed)
            return fitted_factors(site, a, b, self.rank)
        except PassError as error:
            raise located(site, error) from error

    def _shapes(self, module: nn.Module, size: Shape) -> tuple[Shape, Shape]:
        if self.ratio is None and self.params is None:
            return complete(size, self.a, self.b)
        bias = bias_of(module)
        fixed = 0 if bias is None else bias.numel()
        dense = size[0] * size[1] + fixed
        budget = self.params if self.ratio is None else int(dense / self.ratio)
        assert budget is not None
        return fit(size, budget, fixed, self.rank, self.scalars, whole_rows=isinstance(module, nn.Embedding))
