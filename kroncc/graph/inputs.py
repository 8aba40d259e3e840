"""Which inputs a model is captured with, and example tensors for them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.export import Dim

from kroncc.errors import CaptureError, did_you_mean

BATCH, LENGTH, TARGET_LENGTH = 3, 10, 7  # sizes of the examples: none is 1, and no two are equal
TOKENS = {"input_ids", "attention_mask", "token_type_ids", "position_ids", "bbox", "inputs_embeds"}
TARGETS = {"decoder_input_ids", "decoder_attention_mask"}


def parameters_of(model: torch.nn.Module) -> list[str]:
    """Return the names of the parameters of the model's `forward`."""
    return list(inspect.signature(type(model).forward).parameters)[1:]


def default_inputs(model: Any) -> tuple[str, ...]:
    """Return the inputs that the model's own tokenizer or image processor gives and its `forward` takes.

    A model class without either gets its main input, and a mask where its `forward` takes one.
    Encoder-decoders that generate get `decoder_input_ids` too.
    """
    accepted = parameters_of(model)
    given = _preprocessor_names(model.config) or (model.main_input_name, "attention_mask")
    names = [name for name in given if name in accepted]
    if model.main_input_name not in names:  # the tokenizer that is found makes labels, such as a transcript
        names = [model.main_input_name]
    if _feeds_decoder(model) and "decoder_input_ids" in accepted:
        names.append("decoder_input_ids")
    return tuple(dict.fromkeys(names))


def _preprocessor_names(config: Any) -> tuple[str, ...]:
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

    tokenizer = TOKENIZER_MAPPING.get(type(config), None)
    if tokenizer is not None:
        # Order of the call: ids first, as in the models' own signatures.
        return tuple(sorted(tokenizer.model_input_names, key=lambda name: name != "input_ids"))
    processor = IMAGE_PROCESSOR_MAPPING.get(type(config), None)
    return ("pixel_values",) if processor is not None else ()


def _feeds_decoder(model: Any) -> bool:
    """Tell whether the decoder reads tokens of its own: base models and generators do, classifiers do not."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_QUESTION_ANSWERING_MAPPING,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    )

    if not getattr(model.config, "is_encoder_decoder", False):
        return False
    heads = (MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, MODEL_FOR_QUESTION_ANSWERING_MAPPING)
    return not any(heads_of.get(type(model.config), None) is type(model) for heads_of in heads)


def example_inputs(
    model: Any, inputs: Sequence[str] | Mapping[str, torch.Tensor] | None
) -> dict[str, torch.Tensor]:
    """Return one example tensor on meta for each input; only shapes and dtypes matter.

    `inputs` are names, or examples for inputs that have no standard shape. Raises CaptureError (K310, K311).
    """
    if isinstance(inputs, Mapping):
        _check_names(model, inputs)
        return {name: torch.empty_like(value, device="meta") for name, value in inputs.items()}
    names = tuple(inputs) if inputs is not None else default_inputs(model)
    _check_names(model, names)
    return {name: _example(model, name) for name in names}


def _check_names(model: Any, names: Iterable[str]) -> None:
    accepted = parameters_of(model)
    for name in names:
        if name not in accepted:
            raise CaptureError(
                f"{type(model).__name__} takes no input {name!r}",
                code="K310",
                expected=f"one of {', '.join(accepted)}",
                remedy=did_you_mean(name, accepted),
            )


def _example(model: Any, name: str) -> torch.Tensor:
    if name in TOKENS - {"inputs_embeds"}:
        shape: tuple[int, ...] = (BATCH, LENGTH, 4) if name == "bbox" else (BATCH, LENGTH)
        return torch.zeros(shape, dtype=torch.long, device="meta")
    if name in TARGETS:
        return torch.zeros((BATCH, TARGET_LENGTH), dtype=torch.long, device="meta")
    if name == "pixel_values":
        return torch.zeros((BATCH, *_image_shape(model.config)), dtype=model.dtype, device="meta")
    raise CaptureError(
        f"the shape of input {name!r} of {type(model).__name__} is not known",
        code="K311",
        expected="an input with a standard shape (tokens, masks, pixel_values)",
        remedy="pass example tensors: capture(model, {name: tensor, ...})",
    )


def _image_shape(config: Any) -> tuple[int, int, int]:
    size = getattr(config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return getattr(config, "num_channels", 3), height, width


def dynamic_shapes(examples: Mapping[str, torch.Tensor]) -> dict[str, dict[int, Any]]:
    """Return which dimensions are symbolic: the batch, and the length of token and integer inputs."""
    shapes: dict[str, dict[int, Any]] = {}
    for name, value in examples.items():
        tokens = value.dim() >= 2 and (name in TOKENS or not value.is_floating_point())
        shapes[name] = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} if tokens else {0: Dim.DYNAMIC}
    return shapes
