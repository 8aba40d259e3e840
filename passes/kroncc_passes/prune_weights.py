"""The pass `prune-weights`: most weights become zero, and only the others are stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kroncc.api import Calibration, PassError, Site, SitePass, Skip
from kroncc_passes._dense import DENSE
from kroncc_passes._prune_live import LiveStore, Pool, Rule, Schedule, masked_by_pattern, one_always, shares
from kroncc_passes._prune_masks import kept_of, largest, largest_of_all
from kroncc_passes._prune_sites import check_kept, importance, matrices, pruned, undivided, unfit
from kroncc_passes._prune_store import PrunedStore
from kroncc_passes._stored import stored

Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
SCORE_RATE = 1e-2  # of the paper's code, as the two below
THRESHOLD = 0.1
PENALTY = 400.0
LEARNED = ("movement", "soft-movement")
MEASURED = ("activations", "fisher")


class PruneWeights(SitePass):
    """Set the least important weights to zero, and store the others with a bitmask.

    ## What it does

    Every weight matrix of a module (the factors, where another pass has factored it) keeps its largest
    entries by `by`: the size of the weight; with statistics of `calibrate`, size times the root mean square
    of the input it meets (`activations`), or its square times the mean squared gradient (`fisher`).
    `sparsity` is the share that goes, of each matrix or, with `scope: global`, of all of them together;
    `pattern: "2:4"` keeps 2 of every 4 along the inputs. Biases stay. The values that are left train,
    the zeros stay zero.

    Under `during`, the mask follows the training: sizes of the weights at every step (`magnitude`), or
    scores that are learned beside the weights, straight through the mask. `movement` keeps the top share by
    score, `soft-movement` all whose sigmoid(score) exceeds `threshold`, under a penalty on the mean of
    sigmoid(score); how many that are, training tells. `schedule: cubic` takes the sparsity (the threshold and
    the penalty) from zero to its end value as 1 - (1 - p)^3, between `warmup` and `cooldown`.

    ## When it helps

    Where the file must become small: of movement pruning with distillation, the survey reports an encoder of
    3 % of its weights. Below 70 % zeros, size alone does about as well as learned scores; above, scores win.
    It goes well with fewer bits: `quantize` after it takes the values.

    ## When it is skipped

    The module has no weight matrix of its own, is a subclass with a forward of its own, or its inputs do not
    divide into the groups of `pattern`; an embedding has `max_norm`, `scale_grad_by_freq` or `sparse`.

    ## Cost

    One bit a weight, and a value for each that stays: at 4 bytes a value a file shrinks from 4 % zeros on,
    5.2 times at 84 %, 7.6 times at 90 %. **Zeros give no speed here**: the full matrix is formed once and
    multiplied as before. Latency and FLOPs are those of the dense model, and while it runs, memory holds the
    full matrices too. While they train, they are formed in every step.

    ## Example

        - prune-weights: {targets: ["@attention.*", "@ffn.*"], sparsity: 0.5}
        - prune-weights: {targets: ["@ffn.*"], pattern: "2:4"}

    and in a step that trains, `during:`

        - prune-weights: {targets: ["@attention.*", "@ffn.*"], sparsity: 0.9, by: movement, schedule: cubic,
                          warmup: 0.1, cooldown: 0.3}

    ## References

    Zhu and Gupta, To prune, or not to prune, 2017 (schedule). Sanh, Wolf and Rush, Movement pruning, NeurIPS
    2020. Sun et al., A simple and effective pruning approach for large language models, ICLR 2024
    (activations). LeCun, Denker and Solla, Optimal brain damage, NIPS 1989 (fisher).
    """

    kind: ClassVar[str] = "prune-weights"
    order: ClassVar[int] = 30
    accepts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Module,)

    sparsity: Share | None = Field(None, description="share of the weights that become zero")
    pattern: Annotated[str, Field(pattern=r"^[1-9][0-9]*:[1-9][0-9]*$")] | None = Field(
        None, description="N:M, so many stay of so many consecutive weights along the inputs"
    )
    by: Literal["magnitude", "activations", "fisher", "movement", "soft-movement"] = Field(
        "magnitude", description="what a weight is ranked by; the movements are learned, under `during`"
    )
    scope: Literal["matrix", "global"] = Field(
        "matrix", description="`sparsity` holds for each matrix, or for all of the call together"
    )
    schedule: Literal["once", "cubic"] = Field(
        "once", description="under `during`: all at once, or gradually"
    )
    warmup: Share = Field(0.0, description="share of the training before the first weight goes")
    cooldown: Share = Field(0.0, description="share of the training after the last weight has gone")
    score_learning_rate: Positive | None = Field(
        None, description="learning rate of the scores, which follows the step's schedule; default 0.01"
    )
    threshold: Share | None = Field(None, description="soft-movement: on sigmoid(score); default 0.1")
    penalty: Positive | None = Field(
        None, description="soft-movement: factor of the mean of sigmoid(score) in the loss; default 400"
    )
    kept: Mapping[str, Annotated[int, Field(gt=0)]] | None = Field(
        None, description="weights that stay, by parameter; set by the pass"
    )
    _pool: Pool = PrivateAttr(default_factory=Pool)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for message, applies in contradictions(self).items():
            if applies:
                raise ValueError(message)
        return self

    def needs(self) -> Calibration:
        """Return the statistics that `by` ranks with."""
        return Calibration(moments=self.by == "activations", fisher=self.by == "fisher")

    def settled(self) -> bool:
        """Say whether the options tell how many weights of each matrix stay."""
        return self.scope == "matrix" and self.by != "soft-movement"

    def needs_training(self) -> bool:
        """Say whether the options are learned, or take time."""
        return self.by in LEARNED or self.schedule == "cubic" or self.warmup + self.cooldown > 0

    def apportion(self, sites: Sequence[Site]) -> Mapping[str, Self]:
        """Return the pass for each site; of a global sparsity, with what the site keeps of the whole."""
        mine = [site for site in sites if not self._unfit(site)]
        if self.scope == "matrix" or not mine or self.kept is not None:
            return {site.fqn: self for site in sites}
        held = [(site, name, weight) for site in mine for name, weight in matrices(site.module).items()]
        counts = [weight.numel() for _, _, weight in held]
        kept = kept_of(sum(counts), self.sparsity or 0.0)
        if self.by in LEARNED or any(weight.is_meta for _, _, weight in held):
            parts = shares(counts, kept)
        else:
            scores = [one_always(importance(site, name, self.by)) for site, name, weight in held]
            parts = [int(mask.sum()) for mask in largest_of_all(scores, kept)]
        given: dict[str, dict[str, int]] = {}
        for (site, name, _), part in zip(held, parts, strict=True):
            given.setdefault(site.fqn, {})[name] = part
        return {fqn: self._with(kept) for fqn, kept in given.items()}

    def resolve(self, site: Site) -> Self | Skip:
        """Return the pass with `kept` explicit for the site, or a `Skip`."""
        reason = self._unfit(site)
        if reason:
            return Skip(reason)
        if self.kept is not None:
            check_kept(site, self.kept)
            return self
        return self._with({name: self._count(weight) for name, weight in matrices(site.module).items()})

    def replace(self, site: Site) -> nn.Module | Skip:
        """Return the module with its weights stored without their zeros.

        Raises PassError K425 (a weight is not finite), K480 (the counts of another module).
        """
        resolved = self.resolve(site)
        if isinstance(resolved, Skip):
            return resolved
        assert resolved.kept is not None
        return stored(
            site.module,
            {name: resolved._store(site, name, kept) for name, kept in resolved.kept.items()},
        )

    def live(self, site: Site) -> nn.Module | Skip:
        """Return the module whose weights are pruned while they train. Raises PassError K407, K480."""
        resolved = self.resolve(site)
        if isinstance(resolved, Skip):
            return resolved
        if self.by in MEASURED:
            raise PassError(
                f"{self.kind} by {self.by} has no form that trains at {site.fqn}",
                code="K407",
                expected="by: magnitude, movement or soft-movement under `during`",
                remedy="apply it in a compress step, before or after this one",
            )
        rowwise, rule = not isinstance(site.module, Conv1D), self._rule()
        return stored(
            site.module,
            {name: LiveStore(w, rule, self._pool, rowwise) for name, w in matrices(site.module).items()},
        )

    def settle(self, module: nn.Module) -> Self:
        """Return the pass with `kept` as training has left it in `module`."""
        left = {name: store.kept for name, store in pruned(module).items()}
        return self._with(left)

    def _with(self, kept: Mapping[str, int]) -> Self:
        return self.model_copy(update={"kept": dict(kept)})

    def _n_of_m(self) -> tuple[int, int]:
        n, m = (int(part) for part in (self.pattern or "1:1").split(":"))
        return n, m

    def _count(self, weight: Tensor) -> int:
        """Return how many entries of a weight stay; all of them where only training can tell."""
        if self.pattern is not None:
            n, m = self._n_of_m()
            return weight.numel() // m * n
        return kept_of(weight.numel(), self.sparsity or 0.0)

    def _unfit(self, site: Site) -> str:
        """Return why the module cannot be pruned, or nothing."""
        reason = unfit(site.module, self.kind)
        if not reason and self.by in MEASURED and type(site.module) not in DENSE:
            reason = f"is a {type(site.module).__name__}, whose weights have no {self.by}"
        return reason or (undivided(site.module, self._n_of_m()[1]) if self.pattern else "")

    def _store(self, site: Site, name: str, kept: int) -> PrunedStore:
        weight = site.module.get_parameter(name)
        if weight.is_meta:
            return PrunedStore.planned(weight, kept)
        scores = importance(site, name, self.by)
        if self.pattern is not None:
            mask = masked_by_pattern(scores, self._n_of_m(), not isinstance(site.module, Conv1D))
        else:
            mask = largest(one_always(scores) if self.scope == "global" else scores, kept)
        return PrunedStore.of(weight, mask)

    def _rule(self) -> Rule:
        soft = self.by == "soft-movement"
        return Rule(
            schedule=Schedule(self.schedule == "cubic", self.warmup, self.cooldown),
            sparsity=self.sparsity,
            pattern=self._n_of_m() if self.pattern else None,
            threshold=(self.threshold if self.threshold is not None else THRESHOLD) if soft else None,
            penalty=(self.penalty or PENALTY) if soft else 0.0,
            trained=self.by in LEARNED,
            learning_rate=self.score_learning_rate or SCORE_RATE,
            together=self.scope == "global",
        )


def contradictions(pass_: PruneWeights) -> dict[str, bool]:
    """Return what is wrong with options that do not go together, by message, and whether it is the case."""
    soft, learned = pass_.by == "soft-movement", pass_.by in LEARNED
    ways = (pass_.sparsity is not None) + (pass_.pattern is not None)
    n, m = pass_._n_of_m()
    grouped = pass_.pattern is not None
    spread_out = pass_.scope == "global"
    return {
        "give exactly one of: `sparsity`; `pattern`": not soft and ways != 1,
        "soft-movement takes `threshold` and `penalty`, not `sparsity` or `pattern`": soft and ways > 0,
        "`pattern` keeps N of M, at most all of them": n > m,
        "a pattern holds in every group: it goes without `scope: global`": grouped and spread_out,
        "a pattern comes at once: it goes without `schedule: cubic`": grouped and pass_.schedule == "cubic",
        "one threshold holds for all weights: soft-movement goes without `scope: global`": soft
        and spread_out,
        "`threshold` belongs to soft-movement": not soft and pass_.threshold is not None,
        "`penalty` belongs to soft-movement": not soft and pass_.penalty is not None,
        "`score_learning_rate` belongs to movement and soft-movement": not learned
        and pass_.score_learning_rate is not None,
        "`warmup` and `cooldown` together leave no time between": pass_.warmup + pass_.cooldown >= 1,
        "scores need time to be learned: set `schedule: cubic` or `warmup`": learned
        and pass_.schedule == "once"
        and not pass_.warmup,
    }
