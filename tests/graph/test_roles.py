"""Roles: exact tables for known architectures, for others that no table names, and for rewritten modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from kroncc.graph.capture import capture
from kroncc.graph.model_graph import ModelGraph
from kroncc.graph.rewriter import Rewriter
from kroncc.graph.roles import Role, find_roles, module_infos

CLASSIFIER = "AutoModelForSequenceClassification"

# A line: a module and its role. `#` stands for the layers 0 and 1; a third word shifts the layer's number.
BERT_OUTSIDE = """
    bert.embeddings.word_embeddings embedding.word
    bert.embeddings.position_embeddings embedding.position
    bert.embeddings.token_type_embeddings embedding.type
    bert.embeddings.LayerNorm norm
"""
BERT_LAYER = """
    bert.encoder.layer.#.attention.self.query attention.q
    bert.encoder.layer.#.attention.self.key attention.k
    bert.encoder.layer.#.attention.self.value attention.v
    bert.encoder.layer.#.attention.output.dense attention.out
    bert.encoder.layer.#.attention.output.LayerNorm norm
    bert.encoder.layer.#.intermediate.dense ffn.up
    bert.encoder.layer.#.output.dense ffn.down
    bert.encoder.layer.#.output.LayerNorm norm
"""
TWO_MAPS = """
    classifier.dense pooler
    classifier.out_proj head
"""
TABLES = {
    ("bert", CLASSIFIER): BERT_OUTSIDE
    + BERT_LAYER
    + """
    bert.pooler.dense pooler
    classifier head
    """,
    ("bert", "AutoModelForMaskedLM"): BERT_OUTSIDE
    + BERT_LAYER
    + """
    cls.predictions.transform.dense head
    cls.predictions.transform.LayerNorm norm
    cls.predictions.decoder head
    """,
    ("roberta", CLASSIFIER): (BERT_OUTSIDE + BERT_LAYER).replace("bert.", "roberta.") + TWO_MAPS,
    ("electra", CLASSIFIER): (BERT_OUTSIDE + BERT_LAYER).replace("bert.", "electra.") + TWO_MAPS,
    ("mpnet", CLASSIFIER): """
    mpnet.embeddings.word_embeddings embedding.word
    mpnet.embeddings.position_embeddings embedding.position
    mpnet.embeddings.LayerNorm norm
    mpnet.encoder.layer.#.attention.attn.q attention.q
    mpnet.encoder.layer.#.attention.attn.k attention.k
    mpnet.encoder.layer.#.attention.attn.v attention.v
    mpnet.encoder.layer.#.attention.attn.o attention.out
    mpnet.encoder.layer.#.attention.LayerNorm norm
    mpnet.encoder.layer.#.intermediate.dense ffn.up
    mpnet.encoder.layer.#.output.dense ffn.down
    mpnet.encoder.layer.#.output.LayerNorm norm
    """
    + TWO_MAPS,
    ("deberta-v2", CLASSIFIER): (BERT_OUTSIDE + BERT_LAYER)
    .replace("bert.", "deberta.")
    .replace("query ", "query_proj ")
    .replace("key ", "key_proj ")
    .replace("value ", "value_proj ")
    + """
    pooler.dense pooler
    classifier head
    """,
    ("distilbert", CLASSIFIER): """
    distilbert.embeddings.word_embeddings embedding.word
    distilbert.embeddings.position_embeddings embedding.position
    distilbert.embeddings.LayerNorm norm
    distilbert.transformer.layer.#.attention.q_lin attention.q
    distilbert.transformer.layer.#.attention.k_lin attention.k
    distilbert.transformer.layer.#.attention.v_lin attention.v
    distilbert.transformer.layer.#.attention.out_lin attention.out
    distilbert.transformer.layer.#.sa_layer_norm norm
    distilbert.transformer.layer.#.ffn.lin1 ffn.up
    distilbert.transformer.layer.#.ffn.lin2 ffn.down
    distilbert.transformer.layer.#.output_layer_norm norm
    pre_classifier pooler
    classifier head
    """,
    # One module serves both layers, so it has no layer.
    ("albert", CLASSIFIER): BERT_OUTSIDE.replace("bert.", "albert.")
    + """
    albert.encoder.albert_layer_groups.0.albert_layers.0.attention.query attention.q
    albert.encoder.albert_layer_groups.0.albert_layers.0.attention.key attention.k
    albert.encoder.albert_layer_groups.0.albert_layers.0.attention.value attention.v
    albert.encoder.albert_layer_groups.0.albert_layers.0.attention.dense attention.out
    albert.encoder.albert_layer_groups.0.albert_layers.0.attention.LayerNorm norm
    albert.encoder.albert_layer_groups.0.albert_layers.0.ffn ffn.up
    albert.encoder.albert_layer_groups.0.albert_layers.0.ffn_output ffn.down
    albert.encoder.albert_layer_groups.0.albert_layers.0.full_layer_layer_norm norm
    albert.pooler pooler
    classifier head
    """,
    ("gpt2", "AutoModelForCausalLM"): """
    transformer.wte embedding.word
    transformer.wpe embedding.position
    transformer.h.#.ln_1 norm
    transformer.h.#.attn.c_attn attention.qkv
    transformer.h.#.attn.c_proj attention.out
    transformer.h.#.ln_2 norm
    transformer.h.#.mlp.c_fc ffn.up
    transformer.h.#.mlp.c_proj ffn.down
    transformer.ln_f norm
    lm_head head
    """,
    ("llama", "AutoModelForCausalLM"): """
    model.embed_tokens embedding.word
    model.layers.#.input_layernorm norm
    model.layers.#.self_attn.q_proj attention.q
    model.layers.#.self_attn.k_proj attention.k
    model.layers.#.self_attn.v_proj attention.v
    model.layers.#.self_attn.o_proj attention.out
    model.layers.#.post_attention_layernorm norm
    model.layers.#.mlp.gate_proj ffn.gate
    model.layers.#.mlp.up_proj ffn.up
    model.layers.#.mlp.down_proj ffn.down
    model.norm norm
    lm_head head
    """,
    ("vit", "AutoModelForImageClassification"): """
    vit.layers.#.layernorm_before norm
    vit.layers.#.attention.q_proj attention.q
    vit.layers.#.attention.k_proj attention.k
    vit.layers.#.attention.v_proj attention.v
    vit.layers.#.attention.o_proj attention.out
    vit.layers.#.layernorm_after norm
    vit.layers.#.mlp.fc1 ffn.up
    vit.layers.#.mlp.fc2 ffn.down
    vit.layernorm norm
    classifier head
    """,
    ("modernbert", CLASSIFIER): """
    model.embeddings.tok_embeddings embedding.word
    model.embeddings.norm norm
    model.layers.#.attn.Wqkv attention.qkv
    model.layers.#.attn.Wo attention.out
    model.layers.#.mlp_norm norm
    model.layers.#.mlp.Wi ffn.up
    model.layers.#.mlp.Wo ffn.down
    model.layers.1.attn_norm norm 1
    model.final_norm norm
    head.dense pooler
    head.norm norm
    classifier head
    """,
    ("t5", "AutoModelForSeq2SeqLM"): """
    encoder.embed_tokens embedding.word
    encoder.block.#.layer.0.layer_norm norm
    encoder.block.#.layer.0.SelfAttention.q attention.q
    encoder.block.#.layer.0.SelfAttention.k attention.k
    encoder.block.#.layer.0.SelfAttention.v attention.v
    encoder.block.#.layer.0.SelfAttention.o attention.out
    encoder.block.#.layer.1.layer_norm norm
    encoder.block.#.layer.1.DenseReluDense.wi ffn.up
    encoder.block.#.layer.1.DenseReluDense.wo ffn.down
    encoder.final_layer_norm norm
    decoder.embed_tokens embedding.word
    decoder.block.#.layer.0.layer_norm norm 2
    decoder.block.#.layer.0.SelfAttention.q attention.q 2
    decoder.block.#.layer.0.SelfAttention.k attention.k 2
    decoder.block.#.layer.0.SelfAttention.v attention.v 2
    decoder.block.#.layer.0.SelfAttention.o attention.out 2
    decoder.block.#.layer.1.layer_norm norm 2
    decoder.block.#.layer.1.EncDecAttention.q attention.q 2
    decoder.block.#.layer.1.EncDecAttention.k attention.k 2
    decoder.block.#.layer.1.EncDecAttention.v attention.v 2
    decoder.block.#.layer.1.EncDecAttention.o attention.out 2
    decoder.block.#.layer.2.layer_norm norm 2
    decoder.block.#.layer.2.DenseReluDense.wi ffn.up 2
    decoder.block.#.layer.2.DenseReluDense.wo ffn.down 2
    decoder.final_layer_norm norm
    lm_head head
    """,
}
IDS = [f"{family}-{auto.removeprefix('AutoModelFor')}" for family, auto in TABLES]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = SMALL | {"vocab_size": 100, "max_position_embeddings": 40, "bos_token_id": 1, "eos_token_id": 2}


def _parse(table: str) -> dict[str, Role]:
    roles: dict[str, Role] = {}
    for line in filter(str.strip, table.splitlines()):
        fqn, name, *rest = line.split()
        shift = int(rest[0]) if rest else 0
        if "#" in fqn:
            roles |= {fqn.replace("#", str(layer)): Role(name, layer + shift) for layer in (0, 1)}
        else:
            roles[fqn] = Role(name, int(rest[0]) if rest else None)
    return roles


def _meta(config_class: str, model_class: str, **settings: Any) -> ModelGraph:
    config = getattr(transformers, config_class)(**settings)
    with torch.device("meta"):
        model = getattr(transformers, model_class)._from_config(config)
    return capture(model)


def _names(mg: ModelGraph, *roles: str) -> dict[str, list[str]]:
    found = find_roles(mg)
    return {role: [fqn for fqn, one in found.items() if one.name == role] for role in roles}


@pytest.mark.parametrize(("family", "auto"), TABLES, ids=IDS)
def test_every_role_and_no_other(family: str, auto: str, tiny: Callable[..., Any]) -> None:
    mg = capture(tiny(family, auto))
    assert find_roles(mg) == _parse(TABLES[family, auto])


def test_pooler_of_a_base_model_is_no_head(tiny: Callable[..., Any]) -> None:
    mg = capture(tiny("bert"))
    assert _names(mg, "pooler", "head") == {"pooler": ["pooler.dense"], "head": []}


def test_parallel_attention_and_ffn_with_one_map_for_q_k_v() -> None:
    mg = _meta("GPTNeoXConfig", "GPTNeoXForCausalLM", **TEXT)
    roles = find_roles(mg)
    for layer in (0, 1):
        at = f"gpt_neox.layers.{layer}"
        assert roles[f"{at}.attention.query_key_value"] == Role("attention.qkv", layer)
        assert roles[f"{at}.attention.dense"] == Role("attention.out", layer)
        assert roles[f"{at}.mlp.dense_h_to_4h"] == Role("ffn.up", layer)
        assert roles[f"{at}.mlp.dense_4h_to_h"] == Role("ffn.down", layer)
        assert roles[f"{at}.post_attention_layernorm"] == Role("norm", layer)
    assert len([role for role in roles.values() if role.name.startswith(("attention", "ffn"))]) == 8


def test_norms_around_each_branch_and_scaled_embedding() -> None:
    sizes = TEXT | {"num_key_value_heads": 2, "head_dim": 8}
    mg = _meta("Gemma2Config", "Gemma2ForCausalLM", **sizes)
    roles = find_roles(mg)
    assert roles["model.embed_tokens"] == Role("embedding.word")
    assert {fqn for fqn, role in roles.items() if role == Role("norm", 1)} == {
        "model.layers.1.input_layernorm",
        "model.layers.1.post_attention_layernorm",
        "model.layers.1.pre_feedforward_layernorm",
        "model.layers.1.post_feedforward_layernorm",
    }
    assert _names(mg, "ffn.gate") == {"ffn.gate": [f"model.layers.{layer}.mlp.gate_proj" for layer in (0, 1)]}


def test_norms_of_queries_and_keys_stand_between_map_and_attention(tiny: Callable[..., Any]) -> None:
    roles = find_roles(capture(tiny("qwen3", "AutoModelForCausalLM")))
    assert roles["model.layers.1.self_attn.q_proj"] == Role("attention.q", 1)
    assert roles["model.layers.1.self_attn.k_proj"] == Role("attention.k", 1)
    assert roles["model.layers.1.self_attn.q_norm"] == Role("norm", 1)


def test_mlp_of_a_position_bias_is_no_ffn() -> None:
    sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2]}
    mg = _meta("Swinv2Config", "Swinv2ForImageClassification", window_size=4, **sizes)
    found = _names(mg, "ffn.up", "ffn.down", "attention.q", "head")
    assert [len(fqns) for fqns in found.values()] == [2, 2, 2, 1]
    assert not [fqn for fqn in find_roles(mg) if "continuous_position_bias" in fqn]


class _LowRank(nn.Module):
    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.left = nn.Linear(inner.in_features, 4, bias=False)
        self.right = nn.Linear(4, inner.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.right(self.left(x))


class _Packed(nn.Module):
    """A quantised map: no parameter, weights in one flat buffer."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.rows = inner.out_features
        self.register_buffer("packed", torch.zeros(inner.weight.numel(), dtype=torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.packed.to(x.dtype).view(self.rows, -1).T


@pytest.mark.parametrize("replacement", [_LowRank, _Packed])
def test_a_replaced_map_keeps_its_role(replacement: type[nn.Module], tiny: Callable[..., Any]) -> None:
    mg = capture(tiny("llama", "AutoModelForCausalLM"))
    before = find_roles(mg)
    rewriter = Rewriter(mg)
    for fqn, role in before.items():
        if role.name.startswith(("attention", "ffn")):
            rewriter.swap(fqn, replacement(mg.get(fqn)))
    assert find_roles(mg) == before


def test_roles_are_the_same_while_building_on_meta(tiny: Callable[..., Any]) -> None:
    mg = capture(tiny("llama", "AutoModelForCausalLM", hidden_size=48, num_attention_heads=6))
    with torch.device("meta"):
        roles = find_roles(mg)  # norms of a width not seen before are told apart by running a copy
    assert roles == _parse(TABLES["llama", "AutoModelForCausalLM"])


def test_module_infos_cover_every_called_module_in_order(tiny: Callable[..., Any]) -> None:
    mg = capture(tiny("bert", CLASSIFIER))
    infos = module_infos(mg)
    assert [info.fqn for info in infos] == mg.fqns()
    by_name = {info.fqn: info for info in infos}
    query = by_name["bert.encoder.layer.1.attention.self.query"]
    assert (query.type, query.roles, query.layer) == ("Linear", ("attention.q",), 1)
    dropout = by_name["bert.embeddings.dropout"]
    assert (dropout.type, dropout.roles, dropout.layer) == ("Dropout", (), None)
