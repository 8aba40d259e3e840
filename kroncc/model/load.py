"""Build models: on meta to plan, with real weights to run, and from the directories that kroncc wrote.

Weights are loaded as float32 unless told otherwise, because that is what trains; transformers' own default
would be the type on disk. No code of a model repository runs, and only safetensors are read.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from kroncc.errors import ModelError, did_you_mean
from kroncc.model.files import check_weights
from kroncc.model.quantizer import KronccConfig
from kroncc.model.replay import config_structure, without_resized
from kroncc.model.source import Origin, read_config
from kroncc.quiet import quiet_transformers

AUTO_CLASSES = {
    "feature-extraction": "AutoModel",
    "fill-mask": "AutoModelForMaskedLM",
    "image-classification": "AutoModelForImageClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "text-classification": "AutoModelForSequenceClassification",
    "text-generation": "AutoModelForCausalLM",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "token-classification": "AutoModelForTokenClassification",
}
LABELLED = "Classification"  # classes with a head of `num_labels` outputs end in this


def load(path: str | Path, *, dtype: torch.dtype | str = torch.float32) -> PreTrainedModel:
    """Return the model in a directory that kroncc or `save_pretrained` wrote: original class, eval mode.

    `dtype` is the type to load as; "auto" keeps the one on disk. Raises `ModelError`.
    """
    return load_directory(path, dtype=dtype)


def skeleton(origin: Origin, task: str | None = None, labels: int | None = None) -> PreTrainedModel:
    """Return the dense model of `origin` on the meta device (float32, eval mode); no weight is read."""
    config = _dense_config(origin.config, labels)
    return _on_meta(_auto_class(task, labels), config, trust_remote_code=origin.trust_remote_code)


def load_dense(
    origin: Origin,
    task: str | None = None,
    labels: int | None = None,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """Return the model of `origin` with its weights, on CPU, in eval mode.

    A head that the source does not have, or has for another number of labels, starts anew from `seed`: the
    same bits every time. A source that kroncc compressed comes back compressed (`structure_of` tells).
    """
    cls, directory = _auto_class(task, labels), origin.fetch()
    config = _with_labels(copy.deepcopy(origin.config), labels)
    return _load(cls, directory, config, seed, dtype, trust_remote_code=origin.trust_remote_code)


def load_directory(
    directory: str | Path,
    labels: int | None = None,
    seed: int = 0,
    *,
    dtype: torch.dtype | str = torch.float32,
) -> PreTrainedModel:
    """Return the model in a directory, compressed or not, in the class it was saved from, in eval mode.

    With another number of `labels` than it was saved with, the layers whose size depends on it start anew
    from `seed`, dense; everything else is kept. Raises `ModelError`.
    """
    place = Path(directory)
    if not place.is_dir():
        raise ModelError(f"no model directory {place}", code="K501")
    config = read_config(place)
    check_weights(place)
    cls = _saved_class(config, place)
    if labels is not None:
        _require_labels(cls.__name__)
    if labels in (None, config.num_labels):
        return _load(cls, place, config, seed, dtype, strict=True)
    return _load(cls, place, _relabelled(cls, config, labels), seed, dtype)


def _relabelled(cls: Any, config: Any, labels: int) -> Any:
    """Return `config` for another number of labels, its structure without the layers that change in size."""
    new = _with_labels(copy.deepcopy(config), labels)
    if structure := config_structure(config):
        trees = (_on_meta(cls, _dense_config(each)) for each in (config, new))
        new.quantization_config = KronccConfig(without_resized(structure, *trees)).to_dict()
    return new


def _load(
    cls: Any,
    directory: Path,
    config: Any,
    seed: int,
    dtype: torch.dtype | str,
    *,
    strict: bool = False,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load weights into `cls`; what is not in the files is drawn from `seed`, or refused if `strict`."""
    config_structure(config)  # refuses what another method quantised, before transformers tries it
    extra = {"trust_remote_code": trust_remote_code} if cls.__name__.startswith("Auto") else {}
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model, info = cls.from_pretrained(
                directory,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **extra,
            )
        except ModelError:
            raise
        except (ValueError, OSError, RuntimeError, KeyError, AttributeError) as error:
            raise _unloadable(cls, directory, error) from error
    _check_loaded(model, info, directory, strict)
    loaded: PreTrainedModel = model
    return loaded


def _check_loaded(model: Any, info: dict[str, Any], directory: Path, strict: bool) -> None:
    """Refuse a model whose weights, other than those of a new head, did not come from the files."""
    absent = set(info["missing_keys"]) | {entry[0] for entry in info["mismatched_keys"]}
    allowed = set() if strict else _head_names(model)
    lost = sorted(absent - allowed)
    if lost:
        shown = ", ".join(lost[:3]) + (", ..." if len(lost) > 3 else "")
        raise ModelError(
            f"the weights in {directory} do not fit {type(model).__name__}: {len(lost)} tensors are missing "
            f"or of another shape: {shown}",
            code="K514",
            remedy="check that config.json and the weights belong together",
        )


def _head_names(model: Any) -> set[str]:
    """Return the names that a checkpoint may lack: parameters outside the base model, and its pooler."""
    prefix = model.base_model_prefix + "."
    is_base = not hasattr(model, model.base_model_prefix)
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {
        name
        for name in names
        if (not is_base and not name.startswith(prefix)) or name.removeprefix(prefix).startswith("pooler.")
    }


def _on_meta(cls: Any, config: Any, **options: Any) -> PreTrainedModel:
    build = cls.from_config if cls.__name__.startswith("Auto") else cls._from_config
    extra = options if cls.__name__.startswith("Auto") else {}
    try:
        with quiet_transformers(), torch.device("meta"):
            model: PreTrainedModel = build(config, dtype=torch.float32, **extra)
    except (ValueError, KeyError, ImportError) as error:
        raise _no_such_head(cls, config, error) from error
    return model.eval()


def _dense_config(config: Any, labels: int | None = None) -> Any:
    """Return a copy of `config` without the structure; refuse what another method quantised."""
    config_structure(config)
    dense = _with_labels(copy.deepcopy(config), labels)
    if hasattr(dense, "quantization_config"):
        del dense.quantization_config
    return dense


def _with_labels(config: Any, labels: int | None) -> Any:
    if labels is not None and labels != config.num_labels:
        config.num_labels = labels
    return config


def _auto_class(task: str | None, labels: int | None) -> Any:
    """Return the Auto class of a task (default feature-extraction)."""
    name = AUTO_CLASSES.get(task or "feature-extraction")
    if name is None:
        raise ModelError(
            f"unknown task {task!r}",
            code="K512",
            path="model.task",
            remedy=did_you_mean(str(task), AUTO_CLASSES),
        )
    if labels is not None:
        _require_labels(name)
    return getattr(transformers, name)


def _require_labels(class_name: str) -> None:
    if not class_name.endswith(LABELLED):
        raise ModelError(
            f"{class_name} has no labels to set",
            code="K531",
            expected="labels only with a classification task",
            remedy="remove `labels`, or set `model.task` to text-classification",
        )


def _saved_class(config: Any, directory: Path) -> Any:
    """Return the transformers class that the model in `directory` was saved from."""
    names = config.architectures or ["AutoModel"]
    cls = getattr(transformers, names[0], None) if names[0].isidentifier() else None
    if cls is transformers.AutoModel or (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        return cls
    raise ModelError(
        f"{directory} holds a {names[0]}, which this transformers does not have",
        code="K513",
        remedy="install the transformers version that wrote it",
    )


def _no_such_head(cls: Any, config: Any, error: Exception) -> ModelError:
    if "nrecognized configuration class" in str(error):
        return ModelError(
            f"{config.model_type} has no {cls.__name__.removeprefix('Auto')} in transformers",
            code="K513",
            path="model.task",
            remedy="choose a task that this architecture has",
        )
    reason = " ".join(str(error).split())[:300]
    return ModelError(f"cannot build {config.model_type}: {reason}", code="K506", path="model")


def _unloadable(cls: Any, directory: Path, error: Exception) -> ModelError:
    reason = " ".join(str(error).split())
    if "nrecognized configuration class" in reason:
        return ModelError(
            f"the model in {directory} has no {cls.__name__.removeprefix('Auto')} in transformers",
            code="K513",
            path="model.task",
            remedy="choose a task that this architecture has",
        )
    return ModelError(f"cannot load the model in {directory}: {reason[:300]}", code="K514")
