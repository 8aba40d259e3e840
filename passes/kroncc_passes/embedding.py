"""The pass `embedding`: the rows of a table become sums of vectors that many rows share."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from kroncc.api import Calibration, PassError, Site, SitePass, Skip, exactly_one
from kroncc_passes._dense import unsupported
from kroncc_passes._embedding_codes import code_type, learn_codes
from kroncc_passes._embedding_hash import fit_hashes
from kroncc_passes._embedding_stores import CodeStore, HashStore, draw_constants, hashed
from kroncc_passes._stored import Store, stored
from kroncc_passes._weighting import row_weights

Count = Annotated[int, Field(gt=0, strict=True)]


class Embedding(SitePass):
    """Replace an embedding table by code books, or by buckets that rows are hashed to.

    ## What it does

    `codes: [M, K]`: M books of K vectors; a row becomes the sum of one vector of each book, and keeps only
    their M numbers, in the smallest integer type that holds K (a byte up to 256). Books and numbers are
    learned by reconstruction: k-means on what the books before left over, then rounds over all books.

    `buckets: N` with `hashes`: hash functions send every row to so many of N vectors; the row keeps one
    factor for each, and is their weighted sum. Factors and vectors are fitted by alternating least squares.

    With `weighted: activations` a row counts by how often it is looked up. Books, vectors and factors train
    afterwards; the numbers of the codes stay. A head tied to the table stays tied.

    ## When it helps

    Where the vocabulary is most of the model: a word embedding is half of MiniLM. Codes keep much more of a
    table than hashing does at the same size, and compare with a `low-rank` one; both can be made smaller by
    `quantize`, which takes the books. Distil afterwards.

    ## When it is skipped

    What is stored instead would take as many bytes or more; the embedding is a subclass, or has `max_norm`,
    `scale_grad_by_freq` or `sparse`.

    ## Cost

    Codes: M K width weights and M integers a row. Hashes: N width weights and `hashes` factors a row. A
    look-up adds M (or `hashes`) vectors; a tied head forms the whole table in every call. Learning 16 books
    of 256 for 30,522 rows takes a minute or two on one core.

    ## Example

        - embedding: {targets: ["@embedding.word"], codes: [16, 256]}
        - embedding: {targets: ["@embedding.word"], codes: [8, 256], weighted: activations}
        - embedding: {targets: ["@embedding.word"], buckets: 4096, hashes: 2}

    ## References

    Chen, Min and Sun, Learning K-way D-dimensional discrete codes for compact embedding representations, ICML
    2018. Shu and Nakayama, Compressing word embeddings via deep compositional code learning, ICLR 2018.
    Svenstrup, Hansen and Winther, Hash embeddings for efficient word representations, NIPS 2017.
    """

    model_config = exactly_one(["codes"], ["buckets"])
    kind: ClassVar[str] = "embedding"
    accepts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Embedding,)

    codes: tuple[Count, Annotated[int, Field(gt=1, le=2**31, strict=True)]] | None = Field(
        None, description="[M, K]: M books of K vectors each"
    )
    buckets: Count | None = Field(None, description="vectors that the rows are hashed to")
    hashes: Count | None = Field(None, description="hash functions, and buckets a row; default 2")
    weighted: Literal["none", "activations"] = Field(
        "none", description="activations: a row counts by how often the rows of `calibrate` look it up"
    )

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.codes is None) == (self.buckets is None):
            raise ValueError("give exactly one of: `codes`; `buckets`")
        if self.hashes is not None and self.buckets is None:
            raise ValueError("`hashes` belongs to `buckets`")
        return self

    def needs(self) -> Calibration:
        """Return the look-ups, if the rows are weighted by them."""
        return Calibration(moments=self.weighted == "activations")

    def resolve(self, site: Site) -> Self | Skip:
        """Return the pass with all options explicit, or a `Skip`."""
        if reason := unsupported(site.module, self.kind):
            return Skip(reason)
        resolved = self.model_copy(update={"hashes": 2}) if self.buckets and not self.hashes else self
        weight = site.module.get_parameter("weight")
        held, new = weight.numel() * weight.element_size(), resolved._bytes(weight)
        return Skip(f"would take {new:,} bytes, the table has {held:,}") if new >= held else resolved

    def replace(self, site: Site) -> nn.Module | Skip:
        """Return the embedding over shared vectors.

        Raises PassError K425 (the table is not finite), and K426-K428 without the statistics of `weighted`.
        """
        resolved = self.resolve(site)
        if isinstance(resolved, Skip):
            return resolved
        table = site.module.get_parameter("weight")
        if not table.is_meta:
            _check_finite(site, table)
        store = resolved._coded(site, table) if resolved.codes else resolved._hashed(site, table)
        for parameter in store.parameters():
            parameter.requires_grad_(table.requires_grad and parameter.is_floating_point())
        return stored(site.module, {"weight": store})

    def _bytes(self, weight: Tensor) -> int:
        """Return the bytes that are stored instead of `weight` [rows, width]."""
        (rows, width), size = weight.shape, weight.element_size()
        if self.codes is not None:
            books, entries = self.codes
            return books * entries * width * size + rows * books * code_type(entries).itemsize
        assert self.buckets is not None
        assert self.hashes is not None
        return (self.buckets * width + rows * self.hashes) * size + 16 * self.hashes

    def _coded(self, site: Site, table: Tensor) -> Store:
        assert self.codes is not None
        (books, entries), (rows, width) = self.codes, table.shape
        kind = code_type(entries)
        if table.is_meta:
            return CodeStore(table.new_empty(rows, books, dtype=kind), table.new_empty(books, entries, width))
        codes, found = learn_codes(table.detach(), books, entries, self._weights(site), site.seed)
        return CodeStore(codes.to(kind), found.to(table.dtype))

    def _hashed(self, site: Site, table: Tensor) -> Store:
        assert self.buckets is not None
        assert self.hashes is not None
        constants = draw_constants(self.hashes, site.seed).to(table.device)
        if table.is_meta:
            shape = self.buckets, table.shape[1]
            return HashStore(table.new_empty(shape), table.new_empty(len(table), self.hashes), constants)
        places = hashed(torch.arange(len(table), device=table.device), constants, self.buckets)
        buckets, shares = fit_hashes(table.detach(), places, self.buckets, self._weights(site))
        return HashStore(buckets.to(table.dtype), shares.to(table.dtype), constants)

    def _weights(self, site: Site) -> Tensor | None:
        return row_weights(site).float() if self.weighted == "activations" else None


def _check_finite(site: Site, table: Tensor) -> None:
    if not bool(table.isfinite().all()):
        raise PassError(
            f"{site.fqn}: its weight is not finite",
            code="K425",
            expected="finite weights",
            remedy="check the training that made the model",
        )
