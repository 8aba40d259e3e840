"""Which tokens of a fast tokenizer stay, and its `tokenizer.json` without the others.

Everything here is about that JSON as a dict: models WordPiece, BPE, Unigram and WordLevel.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Spec = dict[str, Any]
BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
KINDS = ("WordPiece", "BPE", "Unigram", "WordLevel")


def pieces(spec: Spec) -> dict[str, int]:
    """Return the id of every token, added ones included."""
    return model_pieces(spec) | {added["content"]: added["id"] for added in spec.get("added_tokens") or ()}


def model_pieces(spec: Spec) -> dict[str, int]:
    """Return the ids of the tokens that text is cut into; of a Unigram model they are positions."""
    vocab = spec["model"]["vocab"]
    return (
        dict(vocab) if isinstance(vocab, dict) else {piece: place for place, (piece, _) in enumerate(vocab)}
    )


def indispensable(spec: Spec, counts: Sequence[float]) -> set[int]:
    """Return the ids that always stay: added and unknown tokens, bytes, and the single characters that occur.

    `counts` says by id how often a token is looked up. With the characters, what loses its token can still be
    spelled.
    """
    model, known = spec["model"], model_pieces(spec)
    kept = {added["id"] for added in spec.get("added_tokens") or ()}
    unknown = known.get(model["unk_token"]) if model.get("unk_token") else model.get("unk_id")
    kept |= set() if unknown is None else {unknown}
    byte_level = "'ByteLevel'" in str([spec.get("pre_tokenizer"), spec.get("decoder")])
    seen = {letter for piece, at in known.items() if at < len(counts) and counts[at] > 0 for letter in piece}
    for piece, at in known.items():
        letter = _bare(piece, model)
        if BYTE.fullmatch(piece) or (len(letter) == 1 and (byte_level or letter in seen)):
            kept.add(at)
    return {at for at in kept if at < len(counts)}


def choose(
    spec: Spec, counts: Sequence[float], always: Iterable[int], keep: int | None, least: float
) -> list[int]:
    """Return the ids that stay, ascending: `always` and the most frequent, `keep` in all.

    With `keep` None: all that are looked up `least` times or more. A token of a BPE model brings along those
    that it is merged from, so it comes only where there is room for them.
    """
    known = pieces(spec)
    parts = _parents(spec)
    kept: set[int] = set()
    for at in always:
        kept |= _closed(at, parts, kept)
    order = sorted((at for at in known.values() if at < len(counts)), key=lambda at: (-counts[at], at))
    if keep is None:
        for at in order:
            if counts[at] >= least:
                kept |= _closed(at, parts, kept)
        return sorted(kept)
    size = -1
    while size < len(kept) < keep:  # again, as long as a token has become possible by its parts
        size = len(kept)
        for at in order:
            needed = _closed(at, parts, kept)
            if needed and len(kept) + len(needed) <= keep:
                kept |= needed
    return sorted(kept)


def without_others(spec: Spec, ids: Sequence[int]) -> Spec:
    """Return the tokenizer with the tokens `ids` alone, numbered anew in their order."""
    new, renumbered = copy.deepcopy(spec), {old: at for at, old in enumerate(ids)}
    model = new["model"]
    if isinstance(model["vocab"], dict):
        kept = {piece: renumbered[at] for piece, at in model["vocab"].items() if at in renumbered}
        model["vocab"] = dict(sorted(kept.items(), key=lambda pair: pair[1]))
    else:
        model["vocab"] = [entry for at, entry in enumerate(model["vocab"]) if at in renumbered]
        if model.get("unk_id") is not None:
            model["unk_id"] = renumbered[model["unk_id"]]
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if _whole(merge, model["vocab"])]
    new["added_tokens"] = [
        added | {"id": renumbered[added["id"]]}
        for added in new.get("added_tokens") or ()
        if added["id"] in renumbered
    ]
    if new.get("post_processor"):
        new["post_processor"] = _processor(new["post_processor"], renumbered)
    if isinstance(new.get("padding"), dict):
        new["padding"]["pad_id"] = renumbered.get(new["padding"]["pad_id"], 0)
    return new


def _bare(piece: str, model: Mapping[str, Any]) -> str:
    """Return a piece without the marks of its place in a word."""
    prefix = model.get("continuing_subword_prefix") or ""
    suffix = model.get("end_of_word_suffix") or ""
    bare = piece.removeprefix(prefix) if prefix else piece
    return bare.removesuffix(suffix) if suffix and bare != suffix else bare


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


def _whole(merge: Any, vocab: Mapping[str, int]) -> bool:
    left, right = _pair(merge)
    return left in vocab and right in vocab and left + right in vocab


def _parents(spec: Spec) -> dict[int, tuple[int, int]]:
    """Return for every token that a merge makes the two that it is first made from; of no other model any."""
    known = model_pieces(spec)
    parts: dict[int, tuple[int, int]] = {}
    for merge in spec["model"].get("merges") or ():
        left, right = _pair(merge)
        made = known.get(left + right)
        if made is not None and left in known and right in known:
            parts.setdefault(made, (known[left], known[right]))
    return parts


def _closed(at: int, parts: Mapping[int, tuple[int, int]], kept: set[int]) -> set[int]:
    """Return `at` and all that it is made from, but what is among `kept`."""
    found: set[int] = set()
    open_ = [at]
    while open_:
        one = open_.pop()
        if one in kept or one in found:
            continue
        found.add(one)
        open_ += parts.get(one, ())
    return found


def _processor(processor: Spec, renumbered: Mapping[int, int]) -> Spec:
    """Return a post-processor with new ids: a template, a BERT or RoBERTa one, or a sequence of those."""
    new = dict(processor)
    if new["type"] == "Sequence":
        new["processors"] = [_processor(part, renumbered) for part in new["processors"]]
    elif new["type"] == "TemplateProcessing":
        new["special_tokens"] = {
            name: entry | {"ids": [renumbered[at] for at in entry["ids"]]}
            for name, entry in new["special_tokens"].items()
        }
    elif new["type"] in ("BertProcessing", "RobertaProcessing"):
        for end in ("sep", "cls"):
            new[end] = [new[end][0], renumbered[new[end][1]]]
    return new
