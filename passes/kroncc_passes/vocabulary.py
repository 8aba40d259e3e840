"""The pass `vocabulary`: model and tokenizer forget the tokens that the data hardly needs."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, PrivateAttr, model_validator
from tokenizers import Tokenizer
from torch import nn

from kroncc.api import (
    Calibration,
    Cut,
    ModelGraph,
    Narrowed,
    PassError,
    Resolved,
    Site,
    SiteStats,
    Skip,
    TreePass,
    apply_cuts,
    exactly_one,
    narrowed,
)
from kroncc_passes._vocabulary_parts import configs_of, move_padding, renumber, spans, token_numbers
from kroncc_passes._vocabulary_tokens import KINDS, choose, indispensable, without_others

Count = Annotated[int, Field(gt=0, strict=True)]


@dataclass(frozen=True)
class Kept:
    """The ids that stay, ascending, and where their rows are cut out."""

    ids: tuple[int, ...]
    cuts: tuple[Cut, ...]


class Vocabulary(TreePass):
    """Cut the vocabulary to the tokens that the data of the step uses most.

    ## What it does

    Counts how often every token is looked up in the rows of `calibrate`, and keeps the `keep` most frequent,
    or those seen `at_least` so often. Their rows stay in the word embedding, in a tied or separate output
    head and in its bias. The tokenizer is rewritten to the same tokens, with new numbers (WordPiece, BPE with
    its merges, Unigram), and saved with the model; `config.json` gets the new size and the new numbers of
    special tokens. Special and added tokens, bytes, and the single characters that occur always stay, and so
    do the parts that a BPE token is merged from: words that lose their token are spelled by pieces.

    ## When it helps

    Where a model of many languages or subjects is to serve one. The word embedding is half of MiniLM, and
    more of multilingual models. Rows of the calibration data should be many: what they lack is forgotten.

    ## When it is skipped

    The target is no embedding table of its own, or `keep` is not less than its rows.

    ## Cost

    Every token that goes saves a row of the table, and of the head. Texts become longer in tokens where words
    are spelled by pieces. All models of a later step must read the same tokens: cut the teacher as well, as
    the first step, and make the student from it.

    ## Example

        - vocabulary: {targets: ["@embedding.word"], keep: 8000}
        - vocabulary: {targets: ["@embedding.word"], at_least: 2}

    ## References

    Abdaoui, Pradel and Sigel, Load what you need: smaller versions of multilingual BERT, SustaiNLP 2020.
    """

    model_config = exactly_one(["keep"], ["at_least"])
    kind: ClassVar[str] = "vocabulary"
    reads_tokenizer: ClassVar[bool] = True

    keep: Count | None = Field(None, description="how many tokens stay")
    at_least: Count | None = Field(None, description="keep the tokens that are looked up so often")
    cuts: tuple[Narrowed, ...] = Field(
        (), description="what becomes of each module; found by the pass itself"
    )
    _tokenizer: Any = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.keep is None) == (self.at_least is None) and not self.cuts:
            raise ValueError("give exactly one of: `keep`; `at_least`")
        return self

    def needs(self) -> Calibration:
        """Return the look-ups."""
        return Calibration(moments=True)

    def settled(self) -> bool:
        """Say whether the options tell how many tokens stay."""
        return self.keep is not None

    def informed(self, tokenizer: Any) -> Self:
        """Return the pass with the tokenizer of the model."""
        new = self.model_copy()
        new._tokenizer = tokenizer
        return new

    def resolve_tree(
        self, graph: ModelGraph, sites: Sequence[Site], stats: Mapping[str, SiteStats] | None, seed: int
    ) -> Resolved:
        """Return the pass with the new sizes of all modules that hold a row a token, which are its sites.

        Raises PassError K465 (several tables), K466 (a tokenizer that cannot be cut), K467 (`keep` is less
        than what must stay).
        """
        del seed
        skipped = {site.fqn: Skip(reason) for site in sites if (reason := _unfit(site, self.keep))}
        tables = [site for site in sites if site.fqn not in skipped]
        if not tables:
            return Resolved(self, (), skipped)
        if len(tables) > 1:
            raise _several(tables)
        table = tables[0].module.get_parameter("weight")
        rows, ids = len(table), None
        if not table.is_meta:
            assert stats is not None
            ids = self._chosen(graph.model, stats[tables[0].fqn], rows)
        keep = self.keep if ids is None else len(ids)
        keep = rows if keep is None else keep
        cuts = tuple(Cut((span,), rows, keep, ids) for span in spans(graph, table, rows))
        modules = narrowed(graph.model, cuts)
        explicit = self.model_copy(update={"keep": keep, "at_least": None, "cuts": tuple(modules.values())})
        choice = None if ids is None else Kept(ids, cuts)
        return Resolved(explicit, tuple(modules), skipped, choice)

    def rewrite(self, model: nn.Module, sites: Sequence[str], choice: Kept | None = None) -> None:
        """Cut tables and head, and set what the configs of the model say of its tokens."""
        apply_cuts(model, sites, self.cuts, choice.cuts if choice else None)
        renumbered = {old: new for new, old in enumerate(choice.ids)} if choice else {}
        assert self.keep is not None
        for module in (part for name, part in model.named_modules() if name in sites):
            if isinstance(module, nn.Embedding):
                move_padding(module, renumbered)
        for config in configs_of(model):
            renumber(config, self.keep, renumbered)

    def retokenise(self, tokenizer: Any, choice: Kept) -> Any:
        """Return the tokenizer with the tokens that stay."""
        new = copy.deepcopy(tokenizer)
        spec = without_others(_spec(tokenizer), choice.ids)
        new._tokenizer = Tokenizer.from_str(json.dumps(spec))
        if hasattr(new, "_vocab"):
            new._vocab = spec["model"]["vocab"]
        if hasattr(new, "_merges"):
            new._merges = spec["model"].get("merges")
        return new

    def _chosen(self, model: nn.Module, stats: SiteStats, rows: int) -> tuple[int, ...]:
        spec = _spec(self._tokenizer)
        assert stats.lookups is not None
        counts = stats.lookups.tolist()
        always = indispensable(spec, counts)
        always |= {at for config in configs_of(model) for at in token_numbers(config) if 0 <= at < rows}
        ids = choose(spec, counts, sorted(always), self.keep, self.at_least or 1)
        if self.keep is not None and len(ids) > self.keep:
            raise PassError(
                f"{len(ids)} tokens must stay, and `keep` is {self.keep}",
                code="K467",
                expected="room for special tokens, bytes and the characters that occur",
                remedy=f"raise `keep` to {len(ids)} or more",
            )
        if self.keep is not None and len(ids) < self.keep:
            raise PassError(
                f"the tokenizer has {len(ids)} tokens, and `keep` is {self.keep}",
                code="K468",
                expected=f"`keep` of {len(ids)} or less",
                remedy="lower `keep`",
            )
        return tuple(ids)


def _unfit(site: Site, keep: int | None) -> str:
    if not isinstance(site.module, nn.Embedding) or "weight" not in site.module._parameters:
        return f"is a {type(site.module).__name__}; vocabulary cuts the rows of an Embedding"
    if keep is not None and keep >= site.module.num_embeddings:
        return f"has {site.module.num_embeddings} rows, and {keep} are to stay"
    return ""


def _several(tables: Sequence[Site]) -> PassError:
    return PassError(
        f"several tables are meant: {', '.join(site.fqn for site in tables)}",
        code="K465",
        expected="one table of tokens; what is tied to it follows",
        remedy='set targets: ["@embedding.word"]',
    )


def _spec(tokenizer: Any) -> dict[str, Any]:
    """Return `tokenizer.json` as a dict. Raises PassError K466 where there is none of a known kind."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    spec: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {}
    if spec.get("model", {}).get("type") in KINDS:
        return spec
    what = "no tokenizer" if tokenizer is None else f"a {type(tokenizer).__name__}"
    raise PassError(
        f"the vocabulary cannot be cut: the model has {what}",
        code="K466",
        expected=f"a fast tokenizer of the kind {', '.join(KINDS)}",
        remedy="convert the tokenizer to a fast one, with a tokenizer.json",
    )
