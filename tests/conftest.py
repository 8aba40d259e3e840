"""Shared fixtures: tiny random models of many architectures, and inputs for them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

logging.getLogger("transformers").setLevel(logging.ERROR)
torch.set_num_threads(1)

COMMON = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 100,
    "max_position_embeddings": 40,
}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES: dict[str, dict[str, Any]] = {
    "bert": COMMON,
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 100},
    "roberta": COMMON | {"pad_token_id": 1},
    "albert": COMMON | {"embedding_size": 16},
    "electra": COMMON | {"embedding_size": 16},
    "mpnet": COMMON,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 40, **SPECIAL},
    "llama": COMMON | SPECIAL | {"num_key_value_heads": 2},
    "qwen3": COMMON | SPECIAL | {"num_key_value_heads": 2, "head_dim": 8},
    "modernbert": COMMON | SPECIAL | {"cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 2},
    "deberta-v2": COMMON
    | {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 8,
        "type_vocab_size": 2,
    },
    "vit": {
        key: COMMON[key]
        for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    }
    | {"image_size": 16, "patch_size": 4},
    "t5": {"d_model": 32, "d_kv": 8, "num_layers": 2, "num_heads": 4, "d_ff": 64, "vocab_size": 100}
    | SPECIAL
    | {"decoder_start_token_id": 0},
    "bart": {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "vocab_size": 100,
        "max_position_embeddings": 40,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": 2,
        **SPECIAL,
    },
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 64}
    | {"vocab_size": 100, "max_position_embeddings": 40, "window_size": 4, **SPECIAL}
    | {"attention_types": [[["global", "local"], 1]]},
    "opt": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64}
    | {"vocab_size": 100, "max_position_embeddings": 40, "word_embed_proj_dim": 32, **SPECIAL},
}


def _tiny(family: str, auto: str = "AutoModel", seed: int = 0, **changes: Any) -> Any:
    """Return a random float32 model of `family` in eval mode; no parameter is neutral."""
    config = transformers.AutoConfig.for_model(family, **(SIZES[family] | changes))
    torch.manual_seed(seed)
    model = getattr(transformers, auto).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def _inputs(names: Any, batch: int = 4, length: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return random inputs for the names; the attention mask pads the tail of every second row."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 100, (batch, length), generator=generator)
    tokens[:, length // 2 - 1] = 2  # one end of sentence, which some heads look for
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[::2, length // 2 :] = 0
    made = {
        "input_ids": tokens,
        "attention_mask": mask,
        "token_type_ids": torch.randint(0, 2, (batch, length), generator=generator),
        "decoder_input_ids": torch.randint(3, 100, (batch, length - 2), generator=generator),
        "pixel_values": torch.randn(batch, 3, 16, 16, generator=generator),
    }
    return {name: made[name] for name in names}


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    """`tiny(family, auto="AutoModel", seed=0, **config)`: a small random transformers model."""
    return _tiny


@pytest.fixture(scope="session")
def inputs_for() -> Callable[..., dict[str, torch.Tensor]]:
    """`inputs_for(names, batch=4, length=9, seed=0)`: random inputs with padding."""
    return _inputs
