"""A compressed model saved by us loads by plain transformers: same class, same bits, still a usable model."""

from __future__ import annotations

import copy
import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import kroncc
from kroncc.errors import ModelError, PassError
from kroncc.model.load import load_dense, load_directory, skeleton
from kroncc.model.replay import parse_structure, replay, structure_of
from kroncc.model.save import save_model
from kroncc.model.source import resolve
from kroncc.recipe.schema import ModelSpec
from kroncc.rewrite import registry
from kroncc.rewrite.structure import AppliedPass, Structure

PASS = '''
"""A pass of two factors, as a stranger would write it."""

from typing import ClassVar

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from kroncc.rewrite.base import SitePass, Skip


class Factors(nn.Module):
    def __init__(self, a, b, bias=None):
        super().__init__()
        self.a, self.b, self.bias = a, b, bias

    def forward(self, x):
        y = (x @ self.b.T) @ self.a.T
        return y if self.bias is None else y + self.bias

    def tied_to(self, module):
        raise NotImplementedError


class FactorEmbedding(nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = a, b

    def forward(self, ids):
        return nn.functional.embedding(ids, self.a) @ self.b

    def tied_to(self, module):
        if isinstance(module, nn.Embedding):
            return FactorEmbedding(self.a, self.b)
        return TiedHead(self.a, self.b, module.bias)


class TiedHead(nn.Module):
    def __init__(self, a, b, bias):
        super().__init__()
        self.a, self.b, self.bias = a, b, bias

    def forward(self, x):
        y = (x @ self.b.T) @ self.a.T
        return y if self.bias is None else y + self.bias


class Halves(SitePass):
    kind: ClassVar[str] = "halves"
    version: ClassVar[int] = 2
    accepts: ClassVar = (nn.Linear, nn.Embedding, Conv1D)
    rank: int
    stray_buffer: bool = False

    def replace(self, site):
        weight = site.module.weight.T if isinstance(site.module, Conv1D) else site.module.weight
        if self.rank > min(weight.shape):
            return Skip(f"rank {self.rank} is more than {min(weight.shape)}")
        if weight.is_meta:
            a, b = weight[:, : self.rank], weight[: self.rank]
        else:
            u, s, v = torch.linalg.svd(weight.detach().float(), full_matrices=False)
            a, b = u[:, : self.rank] * s[: self.rank], v[: self.rank]
        a, b = (nn.Parameter(factor.detach().to(weight.dtype).clone()) for factor in (a, b))
        if isinstance(site.module, nn.Embedding):
            return FactorEmbedding(a, b)
        new = Factors(a, b, site.module.bias)
        if self.stray_buffer:
            new.register_buffer("order", torch.arange(3), persistent=False)
        return new
'''
NAMES = ["input_ids", "attention_mask"]


@pytest.fixture(scope="module", autouse=True)
def plugin(tmp_path_factory):
    """The pass `halves`, installed as a distribution with an entry point, in a folder of its own."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "halves_plugin.py").write_text(PASS)
    info = folder / "halves_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: halves-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kroncc.passes]\nhalves = halves_plugin:Halves\n")
    sys.path.insert(0, str(folder))
    forget()
    yield folder
    sys.path.remove(str(folder))
    forget()


def forget():
    """Make the registry look again at what is installed."""
    registry._entry_points.cache_clear()
    registry._table.cache_clear()


def halves(*sites: str, rank: int = 8, **options) -> Structure:
    applied = AppliedPass(name="halves", version=2, options={"rank": rank, **options}, sites=sites)
    return Structure(passes=(applied,))


CASES = {
    "bert": (
        "AutoModelForSequenceClassification",
        (
            "bert.encoder.layer.0.attention.self.query",
            "bert.encoder.layer.1.intermediate.dense",
            "classifier",
        ),
        {"rank": 2},
    ),
    "bert-mlm": (
        "AutoModelForMaskedLM",
        ("bert.embeddings.word_embeddings", "bert.encoder.layer.0.output.dense"),
        {},
    ),
    "bert-base": (
        "AutoModel",
        ("embeddings.word_embeddings", "encoder.layer.0.output.dense", "pooler.dense"),
        {},
    ),
    "distilbert": ("AutoModelForMaskedLM", ("distilbert.embeddings.word_embeddings",), {}),
    "gpt2": (
        "AutoModelForCausalLM",
        ("transformer.wte", "transformer.h.0.mlp.c_fc", "transformer.h.1.attn.c_attn"),
        {},
    ),
    "t5": ("AutoModelForSeq2SeqLM", ("encoder.embed_tokens", "decoder.block.0.layer.0.SelfAttention.q"), {}),
    "llama": ("AutoModelForCausalLM", ("model.layers.0.mlp.up_proj", "lm_head"), {}),
}


def compressed(tiny, case: str):
    """Return a compressed random model and its structure."""
    auto, sites, options = CASES[case]
    family = case.partition("-")[0]
    changes = {"tie_word_embeddings": True} if family == "t5" else {}
    model = tiny(family, auto, **changes)
    structure = replay(model, halves(*sites, **options)).structure
    return model.eval(), structure


def outputs(model, inputs_for):
    names = [*NAMES, *(["decoder_input_ids"] if model.config.is_encoder_decoder else [])]
    with torch.no_grad():
        return model(**inputs_for(names))[0]


@pytest.mark.parametrize("case", CASES)
def test_reloads_in_its_class_with_identical_outputs(case, tiny, inputs_for, tmp_path, caplog, capfd):
    model, structure = compressed(tiny, case)
    save_model(model, tmp_path / "saved", structure)
    with caplog.at_level("WARNING"):
        transformers.logging.set_verbosity_warning()
        loaded = getattr(transformers, CASES[case][0]).from_pretrained(tmp_path / "saved")
        transformers.logging.set_verbosity_error()
    assert type(loaded) is type(model)
    assert torch.equal(outputs(loaded, inputs_for), outputs(model, inputs_for))
    assert structure_of(loaded) == structure
    assert not caplog.records
    assert "LOAD REPORT" not in capfd.readouterr().err
    assert not (tmp_path / "saved" / "pytorch_model.bin").exists()
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(outputs(kroncc.load(tmp_path / "again"), inputs_for), outputs(model, inputs_for))


@pytest.mark.parametrize(
    ("case", "source", "target"),
    [
        ("gpt2", "transformer.wte", "lm_head"),
        ("bert-mlm", "bert.embeddings.word_embeddings", "cls.predictions.decoder"),
        ("distilbert", "distilbert.embeddings.word_embeddings", "vocab_projector"),
        ("t5", "shared", "lm_head"),
        ("t5", "shared", "decoder.embed_tokens"),
    ],
)
def test_ties_survive(case, source, target, tiny, tmp_path):
    model, structure = compressed(tiny, case)
    save_model(model, tmp_path / "saved", structure)
    with torch.no_grad():
        stored = transformers.utils.hub.cached_file(tmp_path / "saved", "model.safetensors")
    from safetensors import safe_open

    with safe_open(stored, "pt") as file:
        names = set(file.keys())
    assert f"{source}.a" in names
    assert f"{target}.a" not in names
    loaded = kroncc.load(tmp_path / "saved")
    assert loaded.get_submodule(source).a is loaded.get_submodule(target).a
    assert loaded.get_submodule(source).b is loaded.get_submodule(target).b
    loaded.tie_weights()  # as Trainer and accelerate call it
    assert loaded.get_submodule(source).a is loaded.get_submodule(target).a
    assert loaded.num_parameters() == model.num_parameters()
    assert loaded.get_input_embeddings() is loaded.get_submodule(source)


def test_masked_lm_bias_tie_is_kept(tiny, tmp_path):
    model, structure = compressed(tiny, "bert-mlm")
    assert model.cls.predictions.decoder.bias is model.cls.predictions.bias
    save_model(model, tmp_path / "saved", structure)
    loaded = kroncc.load(tmp_path / "saved")
    assert loaded.cls.predictions.decoder.bias is loaded.cls.predictions.bias


def test_replay_on_meta_and_on_real_weights_gives_the_same_names_and_shapes(tiny):
    for case, (auto, sites, options) in CASES.items():
        real, _ = compressed(tiny, case)
        config = real.config
        with torch.device("meta"):
            meta = getattr(transformers, auto).from_config(config)
        replay(meta, halves(*sites, **options))
        assert {n: p.shape for n, p in meta.named_parameters()} == {
            n: p.shape for n, p in real.named_parameters()
        }


def test_loads_under_another_head(tiny, inputs_for, tmp_path):
    base, structure = compressed(tiny, "bert-base")
    save_model(base, tmp_path / "base", structure)
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=3
    )
    assert torch.equal(outputs(classifier.bert.eval(), inputs_for), outputs(base, inputs_for))
    assert structure_of(classifier).passes[0].sites[0] == "bert.embeddings.word_embeddings"
    classifier.save_pretrained(tmp_path / "classifier")
    again = transformers.AutoModel.from_pretrained(tmp_path / "classifier")
    assert torch.equal(outputs(again, inputs_for), outputs(base, inputs_for))


def test_a_compressed_head_is_left_out_where_there_is_none(tiny, inputs_for, tmp_path):
    model, structure = compressed(tiny, "bert")
    save_model(model, tmp_path / "saved", structure)
    base = transformers.AutoModel.from_pretrained(tmp_path / "saved")
    assert structure_of(base).passes[0].sites == (
        "encoder.layer.0.attention.self.query",
        "encoder.layer.1.intermediate.dense",
    )
    assert torch.equal(outputs(base, inputs_for), outputs(model.bert, inputs_for))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, tiny, inputs_for, tmp_path):
    model, structure = compressed(tiny, "bert-mlm")
    save_model(model, tmp_path / "saved", structure)
    expected = outputs(model.to(dtype), inputs_for)
    direct = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "saved", dtype=dtype)
    moved = kroncc.load(tmp_path / "saved").to(dtype)
    for loaded in (direct, moved, kroncc.load(tmp_path / "saved").half().to(dtype)):
        assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert torch.equal(outputs(direct, inputs_for), expected)
    assert torch.equal(outputs(moved, inputs_for), expected)


def test_device_map(tiny, inputs_for, tmp_path):
    model, structure = compressed(tiny, "gpt2")
    save_model(model, tmp_path / "saved", structure)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", device_map="cpu")
    assert torch.equal(outputs(loaded, inputs_for), outputs(model, inputs_for))


def test_a_loaded_config_loads_again(tiny, inputs_for, tmp_path):
    model, structure = compressed(tiny, "gpt2")
    save_model(model, tmp_path / "saved", structure)
    config = kroncc.load(tmp_path / "saved").config
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", config=config)
    assert torch.equal(outputs(loaded, inputs_for), outputs(model, inputs_for))
    assert "halves" in config.to_json_string()


def test_loaded_models_copy_and_pickle(tiny, inputs_for, tmp_path):
    model, structure = compressed(tiny, "gpt2")
    save_model(model, tmp_path / "saved", structure)
    loaded = kroncc.load(tmp_path / "saved")
    for twin in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert torch.equal(outputs(twin, inputs_for), outputs(model, inputs_for))
        assert twin.lm_head.a is twin.transformer.wte.a


def test_compressing_twice(tiny, inputs_for, tmp_path):
    """A compressed directory is the source of the next recipe."""
    model, structure = compressed(tiny, "gpt2")
    save_model(model, tmp_path / "once", structure)
    origin = resolve(ModelSpec(source="once"), tmp_path)
    assert origin.structure == structure
    assert isinstance(skeleton(origin, "text-generation").lm_head, nn.Linear)
    again = load_dense(origin, "text-generation")
    more = replay(again, halves("transformer.h.0.mlp.c_proj")).structure
    save_model(again, tmp_path / "twice", origin.structure + more)
    loaded = kroncc.load(tmp_path / "twice")
    assert torch.equal(outputs(loaded, inputs_for), outputs(again, inputs_for))
    assert loaded.lm_head.a is loaded.transformer.wte.a


def test_sharded(tiny, inputs_for, tmp_path):
    model, structure = compressed(tiny, "gpt2")
    save_model(model, tmp_path / "saved", structure)
    loaded = kroncc.load(tmp_path / "saved")
    loaded.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    assert torch.equal(outputs(kroncc.load(tmp_path / "shards"), inputs_for), outputs(model, inputs_for))


def test_generates(tiny, tmp_path):
    model, structure = compressed(tiny, "gpt2")
    save_model(model, tmp_path / "saved", structure)
    ids = torch.tensor([[5, 6, 7]])
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(
        kroncc.load(tmp_path / "saved").generate(ids, **options), model.generate(ids, **options)
    )


def word_tokenizer(folder: Path):
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *"abcdefghijklmnopqrstuvwxyz",
        "##s",
        "good",
        "bad",
    ]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    return transformers.BertTokenizer(str(folder / "vocab.txt"))


def test_pipeline(tiny, tmp_path):
    model, structure = compressed(tiny, "bert")
    save_model(model, tmp_path / "saved", structure, tokenizer=word_tokenizer(tmp_path))
    classify = transformers.pipeline("text-classification", model=str(tmp_path / "saved"), device="cpu")
    tokens = classify.tokenizer("good bad", return_tensors="pt")
    with torch.no_grad():
        expected = model(**tokens).logits.softmax(-1).max().item()
    assert classify("good bad")[0]["score"] == pytest.approx(expected, abs=1e-6)


def test_trainer_fine_tunes(tiny, tmp_path):
    model, structure = compressed(tiny, "bert")
    save_model(model, tmp_path / "saved", structure)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    before = {name: parameter.detach().clone() for name, parameter in loaded.named_parameters()}
    row = {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": 1}
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True,
        learning_rate=0.01, dataloader_pin_memory=False, save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    trainer = transformers.Trainer(model=loaded, args=arguments, train_dataset=[row] * 8)
    trainer.train()
    factor = "bert.encoder.layer.1.intermediate.dense.a"
    assert not torch.equal(loaded.get_parameter(factor), before[factor])
    trainer.save_model(str(tmp_path / "trained"))
    again = kroncc.load(tmp_path / "trained")
    assert torch.equal(again.get_parameter(factor), loaded.get_parameter(factor))


def test_other_number_of_labels(tiny, tmp_path):
    model, structure = compressed(tiny, "bert")  # the classifier is compressed too
    save_model(model, tmp_path / "saved", structure)
    one, two = (load_directory(tmp_path / "saved", labels=5, seed=7) for _ in range(2))
    other = load_directory(tmp_path / "saved", labels=5, seed=8)
    assert isinstance(one.classifier, nn.Linear)
    assert one.classifier.weight.shape == (5, 32)
    assert torch.equal(one.classifier.weight, two.classifier.weight)
    assert not torch.equal(one.classifier.weight, other.classifier.weight)
    assert one.classifier.weight.std().item() == pytest.approx(0.02, rel=0.4)  # as transformers initialises
    factor = "bert.encoder.layer.1.intermediate.dense.a"
    assert torch.equal(one.get_parameter(factor), model.get_parameter(factor))
    save_model(one, tmp_path / "five", structure_of(one))
    assert torch.equal(kroncc.load(tmp_path / "five").classifier.weight, one.classifier.weight)
    same = load_directory(tmp_path / "saved", labels=2)
    assert torch.equal(same.classifier.a, model.classifier.a)


def test_loading_leaves_the_global_generator_alone(tiny, tmp_path):
    model, structure = compressed(tiny, "bert")
    save_model(model, tmp_path / "saved", structure)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    load_directory(tmp_path / "saved", labels=4, seed=1)
    assert torch.equal(torch.rand(2), expected)


def edited(folder: Path, change) -> Path:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))
    return folder


MISTAKES = {
    "newer structure": (lambda q: q.update(version=2), "K520", "newer kroncc"),
    "unknown pass": (
        lambda q: q["passes"][0].update({"pass": "wavelets"}),
        "K521",
        "'wavelets', which is not installed",
    ),
    "newer pass": (lambda q: q["passes"][0].update(version=9), "K522", "version 9 of the pass 'halves'"),
    "malformed": (lambda q: q.update(passes=[{"pass": "halves"}]), "K523", "malformed"),
    "no such module": (
        lambda q: q["passes"][0].update(sites=["bert.encoder.layer.7.x"]),
        "K524",
        "layer.7.x",
    ),
    "does not fit": (lambda q: q["passes"][0]["options"].update(rank=99), "K524", "rank 99 is more than 32"),
    "bad option": (lambda q: q["passes"][0]["options"].update(speed=3), "K525", "speed"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("way", ["kroncc", "transformers"])
def test_what_does_not_fit_is_said_in_plain_words(mistake, way, tiny, tmp_path):
    change, code, words = MISTAKES[mistake]
    model, structure = compressed(tiny, "bert")
    save_model(model, tmp_path / "saved", structure)
    edited(tmp_path / "saved", change)
    load = kroncc.load if way == "kroncc" else transformers.AutoModelForSequenceClassification.from_pretrained
    with pytest.raises(ModelError, match=words) as caught:
        load(tmp_path / "saved")
    assert caught.value.problems[0].code == code


def test_another_quantisation_is_refused(tiny, tmp_path):
    model, structure = compressed(tiny, "bert")
    save_model(model, tmp_path / "saved", structure)
    edited(tmp_path / "saved", lambda q: (q.clear(), q.update(quant_method="gptq", bits=4)))
    with pytest.raises(ModelError, match="gptq") as caught:
        kroncc.load(tmp_path / "saved")
    assert caught.value.problems[0].code == "K530"


def test_missing_weights_are_refused(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    model, structure = compressed(tiny, "bert")
    save_model(model, tmp_path / "saved", structure)
    file = tmp_path / "saved" / "model.safetensors"
    weights = load_file(file)
    del weights["bert.encoder.layer.1.intermediate.dense.a"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"intermediate\.dense\.a") as caught:
        kroncc.load(tmp_path / "saved")
    assert caught.value.problems[0].code == "K514"


def test_a_buffer_that_would_be_lost_is_refused(tiny):
    with pytest.raises(PassError, match="order") as caught:
        replay(tiny("bert"), halves("pooler.dense", stray_buffer=True))
    assert caught.value.problems[0].code == "K450"


def test_a_missing_plugin_is_named_after_it_is_gone(tiny, tmp_path, plugin):
    model, structure = compressed(tiny, "bert")
    save_model(model, tmp_path / "saved", structure)
    sys.path.remove(str(plugin))
    forget()
    try:
        with pytest.raises(ModelError, match="'halves', which is not installed"):
            kroncc.load(tmp_path / "saved")
    finally:
        sys.path.insert(0, str(plugin))
        forget()


def test_structure_round_trip():
    structure = halves("a", "b")
    written = json.loads(
        json.dumps({"quant_method": "kroncc", **structure.model_dump(mode="json", by_alias=True)})
    )
    assert parse_structure(written) == structure
