"""The door through which `from_pretrained` loads a compressed model into its original class.

transformers lets a "quantizer" change the module tree between building a model on meta and loading its
weights. Ours replays the structure of `config.json` there. After loading, nothing of a quantised model is
left on it: it is a plain model that trains, moves to half precision and saves as any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from kroncc.rewrite.structure import Structure

QUANT_METHOD = "kroncc"


class KronccConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The structure as transformers keeps it in a config; in `config.json` it is `quantization_config`."""

    def __init__(self, structure: Structure | None = None, **written: Any) -> None:
        from kroncc.model.replay import parse_structure

        self.quant_method = QUANT_METHOD
        self.structure = parse_structure(written) if structure is None else structure

    def to_dict(self) -> dict[str, Any]:
        """Return what `config.json` holds."""
        return {"quant_method": QUANT_METHOD, **self.structure.model_dump(mode="json", by_alias=True)}

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value of `to_dict`: transformers asks a config given to it as it asks the dict on disk."""
        return self.to_dict().get(key, default)


class KronccQuantizer(HfQuantizer):  # type: ignore[misc]
    """Replays the structure on the meta model before its weights are loaded."""

    quantization_config: KronccConfig

    @property
    def is_trainable(self) -> bool:
        """Factors are ordinary parameters."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Trainer asks this of models without adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """torch.compile works on a compressed model."""
        return True

    def is_serializable(self) -> bool:
        """Compressed models are saved as any other."""
        return True

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        from kroncc.model.replay import replay

        done = replay(model, self.quantization_config.structure)
        self.quantization_config = KronccConfig(done.structure)
        self._stubs = _add_stubs(model, done.replaced)
        self._frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        # while factors are tied one after the other, no new module can say yet what its weight is
        model.__dict__["_adjust_bias"] = _leave_bias
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        del model.__dict__["_adjust_bias"]
        for module, name in self._stubs:
            del module.__dict__[name]
        for name, parameter in model.named_parameters():  # loading makes all floats train
            if name in self._frozen:
                parameter.requires_grad_(False)
        # `half`, `float`, Trainer and accelerate treat whatever carries these marks as frozen integers
        for mark in ("hf_quantizer", "quantization_method"):
            if mark in model.__dict__:
                delattr(model, mark)
        model.is_quantized = False
        return model


def _leave_bias(*_: Any) -> None:
    """Stand in for the step of tying that pads a head's bias to a resized vocabulary."""


def _add_stubs(model: Any, replaced: Mapping[str, nn.Module]) -> list[tuple[nn.Module, str]]:
    """Give new modules, while weights are loaded, the parameter names of those they replaced.

    After loading, transformers initialises what is missing, class by class; some classes reach into their
    children (`module.q.weight`). A stub is marked as initialised, so it is left alone, and it is not saved.
    """
    stubs = []
    here = dict(model.named_modules(remove_duplicate=False))
    for fqn, old in replaced.items():
        new = here.get(fqn)
        if new is None:  # a later pass took it out of the tree
            continue
        for name, parameter in old._parameters.items():
            if not hasattr(new, name):
                new.__dict__[name] = None if parameter is None else torch.empty_like(parameter, device="meta")
                if parameter is not None:
                    new.__dict__[name]._is_hf_initialized = True
                stubs.append((new, name))
    return stubs


def attach(model: Any, structure: Structure) -> None:
    """Write `structure` into the model's config, where `save_pretrained` finds it; none for a dense model."""
    if structure.passes:
        model.config.quantization_config = KronccConfig(structure)
    elif hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def register() -> None:
    """Make kroncc known to transformers; a second call does nothing."""
    if QUANT_METHOD in AUTO_QUANTIZATION_CONFIG_MAPPING:
        return
    register_quantization_config(QUANT_METHOD)(KronccConfig)
    register_quantizer(QUANT_METHOD)(KronccQuantizer)
