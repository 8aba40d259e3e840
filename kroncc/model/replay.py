"""Rebuild a compressed model from its structure: the same passes on the same modules of the dense one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from torch import nn

from kroncc.errors import KronccError, ModelError, PassError, did_you_mean
from kroncc.model.ties import declare_ties, tie_declared, tied_modules
from kroncc.rewrite.base import Pass, Site, SitePass, Skip, TreePass
from kroncc.rewrite.registry import get_pass
from kroncc.rewrite.structure import STRUCTURE_VERSION, AppliedPass, Structure
from kroncc.rewrite.treat import FAULTS, Treated, treat

QUANT_METHOD = "kroncc"
NO_SUCH_PASS = "K410"


@dataclass(frozen=True)
class Replayed:
    """What a replay did: the structure with the model's own names, and the modules it took out, by FQN."""

    structure: Structure
    replaced: Mapping[str, nn.Module]


def replay(model: nn.Module, structure: Structure) -> Replayed:
    """Rewrite `model` (dense; meta or real weights) in place as `structure` says.

    A structure written for `BertModel` also fits `BertForMaskedLM`, where every name has the prefix `bert.`,
    and the other way round. Raises `ModelError` where a pass is missing or newer, or nothing fits its sites.
    """
    tie_declared(model)
    replaced: dict[str, nn.Module] = {}
    here = Structure(passes=tuple(_replay_pass(model, applied, replaced) for applied in structure.passes))
    declare_ties(model)
    return Replayed(here, replaced)


def parse_structure(written: Mapping[str, Any]) -> Structure:
    """Return the structure in a `quantization_config`; `ModelError` if it is newer or malformed."""
    data = {key: value for key, value in written.items() if key != "quant_method"}
    version = data.get("version")
    if isinstance(version, int) and version > STRUCTURE_VERSION:
        raise ModelError(
            f"the model was written by a newer kroncc (structure version {version})",
            code="K520",
            expected=f"structure version {STRUCTURE_VERSION} or older",
            remedy="pip install --upgrade kroncc",
        )
    try:
        return Structure.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ModelError(
            f"the model's quantization_config is malformed: {where}: {first['msg']}",
            code="K523",
            remedy="write the model again, or restore its config.json",
        ) from error


def structure_of(model: nn.Module) -> Structure:
    """Return the structure that a model carries in its config; empty for a dense model."""
    return config_structure(getattr(model, "config", None))


def config_structure(config: Any) -> Structure:
    """Return the structure in a transformers config; `ModelError` if another method quantised the model."""
    written = getattr(config, "quantization_config", None)
    if written is None:
        return Structure()
    data = written if isinstance(written, dict) else written.to_dict()
    method = data.get("quant_method")
    if method != QUANT_METHOD:
        raise ModelError(
            f"the model is already quantised by {getattr(method, 'value', method)!r}",
            code="K530",
            expected="a dense model, or one that kroncc wrote",
            remedy="give the model that it was made from",
        )
    return parse_structure(data)


def without_resized(structure: Structure, before: nn.Module, after: nn.Module) -> Structure:
    """Return `structure` without the modules whose weights differ in shape between two dense models.

    `before` and `after` are one model with two numbers of labels: what depends on them starts anew, dense.
    Tree passes stay: they leave the extents that they do not cut as they find them.
    """
    shapes = {name: parameter.shape for name, parameter in before.named_parameters(remove_duplicate=False)}
    resized = {
        name.rpartition(".")[0]
        for name, parameter in after.named_parameters(remove_duplicate=False)
        if shapes.get(name) != parameter.shape
    }
    kept = (
        applied
        if issubclass(get_pass(applied.name), TreePass)
        else applied.model_copy(update={"sites": tuple(s for s in applied.sites if s not in resized)})
        for applied in structure.passes
    )
    return Structure(passes=tuple(applied for applied in kept if applied.sites))


def set_module(model: nn.Module, fqn: str, module: nn.Module) -> None:
    """Put `module` in the place of `fqn`, under every name that the old module has in the tree."""
    old = model.get_submodule(fqn)
    aliases = [name for name, child in model.named_modules(remove_duplicate=False) if child is old]
    shared = aliases if next(old.parameters(), None) is not None else [fqn]
    for name in shared:
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, module)
    module.train(old.training)


def _replay_pass(model: nn.Module, applied: AppliedPass, replaced: dict[str, nn.Module]) -> AppliedPass:
    """Apply one pass to all of its sites; return it with their names in `model`, note what it took out."""
    pass_ = _build(applied)
    if isinstance(pass_, TreePass):
        return _replay_tree(model, pass_, applied)
    sites = tuple(fqn for site in applied.sites if (fqn := _locate(model, site)) is not None)
    done: set[str] = set()
    for fqn in sites:
        if fqn in done:  # an earlier site of this pass was tied to it
            continue
        partners = tied_modules(model).get(fqn, ())
        site = Site(fqn=fqn, module=model.get_submodule(fqn), tied=partners)
        for name, module in _rewritten(pass_, site, model).items():
            replaced.setdefault(name, model.get_submodule(name))
            set_module(model, name, module)
        done.update((fqn, *partners))
    return applied.model_copy(update={"sites": sites})


def _replay_tree(model: nn.Module, pass_: TreePass, applied: AppliedPass) -> AppliedPass:
    """Rewrite the tree; its lists follow the sites, so a site that this model lacks keeps its place."""
    sites = tuple(_locate(model, site) or site for site in applied.sites)
    try:
        pass_.rewrite(model, sites)
    except KronccError:
        raise
    except Exception as error:
        raise _misfit(pass_, sites[0], f"{type(error).__name__}: {error}") from error
    return applied.model_copy(update={"sites": sites})


def _rewritten(pass_: SitePass, site: Site, model: nn.Module) -> dict[str, nn.Module]:
    """Return the new modules of one site and of the modules tied to it, by FQN."""
    try:
        outcome: Treated | Skip = treat(pass_, site, {name: model.get_submodule(name) for name in site.tied})
    except PassError as error:
        if error.problems[0].code in FAULTS:
            raise
        raise _misfit(pass_, site.fqn, error.problems[0].message) from error
    if isinstance(outcome, Skip):
        raise _misfit(pass_, site.fqn, outcome.reason)
    return {site.fqn: outcome.module, **outcome.partners}


def _build(applied: AppliedPass) -> SitePass | TreePass:
    """Return the pass with its stored options; `ModelError` if it is missing, too old, or refuses them."""
    cls = _pass_class(applied.name)
    if applied.version > cls.version:
        raise ModelError(
            f"the model was made with version {applied.version} of the pass {applied.name!r}",
            code="K522",
            expected=f"version {cls.version} or older, which is what is installed",
            remedy=f"upgrade the package that {applied.name!r} comes from",
        )
    try:
        pass_ = cls(**applied.options)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ModelError(
            f"the pass {applied.name!r} does not take its stored option {where!r}: {first['msg']}",
            code="K525",
            remedy=f"install the version of {applied.name!r} that made the model",
        ) from error
    if not isinstance(pass_, SitePass | TreePass):
        raise ModelError(
            f"the pass {applied.name!r} cannot be replayed: it treats neither sites nor trees", code="K526"
        )
    return pass_


def _pass_class(name: str) -> type[Pass]:
    try:
        return get_pass(name)
    except PassError as error:
        if error.problems[0].code != NO_SUCH_PASS:  # found and broken: the error names its owner
            raise
        raise ModelError(
            f"the model was made with the pass {name!r}, which is not installed",
            code="K521",
            expected=f"an installed package that provides the pass {name!r}",
            remedy=f"install the package that {name!r} comes from; `kroncc passes` lists what is there",
        ) from error


def _locate(model: nn.Module, site: str) -> str | None:
    """Return the name of `site` in `model`; None for a module of another head, which this model lacks."""
    names = {name for name, _ in model.named_modules(remove_duplicate=False)}
    prefix = getattr(model, "base_model_prefix", "") + "."
    for candidate in (site, prefix + site, site.removeprefix(prefix)):
        if candidate in names:
            return candidate
    written_for = getattr(getattr(model, "config", None), "architectures", None) or [type(model).__name__]
    if type(model).__name__ not in written_for and not site.startswith(prefix):
        return None
    raise ModelError(
        f"the structure names a module that {type(model).__name__} does not have: {site}",
        code="K524",
        remedy=did_you_mean(site, names - {""}),
    )


def _misfit(pass_: Pass, fqn: str, reason: str) -> ModelError:
    return ModelError(
        f"the structure does not fit the model: pass {pass_.kind!r} on {fqn}: {reason}",
        code="K524",
        expected="the architecture that the structure was made for",
        remedy="restore the model's config.json, or compress the model again",
    )
