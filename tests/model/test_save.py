"""Directories appear whole or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers
from safetensors import safe_open

import kroncc
from kroncc.errors import RunError
from kroncc.model.save import save_model
from kroncc.rewrite.structure import Structure

EMPTY = Structure()


def test_dense_model_has_no_quantization_config(tiny, inputs_for, tmp_path):
    model = tiny("gpt2", "AutoModelForCausalLM")
    save_model(model, tmp_path / "saved", EMPTY, extra_files={"recipe.yaml": "kroncc: 1\n"})
    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert "quantization_config" not in config
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert (tmp_path / "saved/recipe.yaml").read_text() == "kroncc: 1\n"
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for (name, one), (other_name, other) in zip(
        model.named_parameters(), loaded.named_parameters(), strict=True
    ):
        assert name == other_name
        assert torch.equal(one, other)


def test_dtype_on_disk(tiny, tmp_path):
    model = tiny("gpt2", "AutoModelForCausalLM")
    save_model(model, tmp_path / "saved", EMPTY, dtype="bf16")
    assert model.dtype is torch.float32
    with safe_open(tmp_path / "saved/model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
        assert "lm_head.weight" not in set(file.keys())  # tied: stored once
    assert kroncc.load(tmp_path / "saved", dtype="auto").dtype is torch.bfloat16
    assert kroncc.load(tmp_path / "saved").dtype is torch.float32


def test_replaces_an_old_model_whole(tiny, tmp_path):
    save_model(tiny("bert"), tmp_path / "saved", EMPTY, extra_files={"recipe.yaml": "old"})
    save_model(tiny("bert", seed=1), tmp_path / "saved", EMPTY)
    assert not (tmp_path / "saved/recipe.yaml").exists()
    assert torch.equal(
        kroncc.load(tmp_path / "saved").pooler.dense.weight, tiny("bert", seed=1).pooler.dense.weight
    )
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_foreign_directories_are_not_replaced(tiny, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").write_text("cat")
    with pytest.raises(RunError, match=r"holds 'cat\.jpg'") as caught:
        save_model(tiny("bert"), tmp_path / "photos", EMPTY)
    assert caught.value.problems[0].code == "K805"
    (tmp_path / "file").write_text("text")
    with pytest.raises(RunError, match="holds no model"):
        save_model(tiny("bert"), tmp_path / "file", EMPTY)
    assert (tmp_path / "photos/cat.jpg").read_text() == "cat"


def test_unwritable_place(tiny, tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(RunError, match="cannot write") as caught:
        save_model(tiny("bert"), tmp_path / "file" / "saved", EMPTY)
    assert caught.value.problems[0].code == "K802"


FULL = """
import resource, sys, warnings
from pathlib import Path
import transformers
from kroncc.errors import RunError
from kroncc.model.save import save_model
from kroncc.rewrite.structure import Structure
config = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=100)
model = transformers.BertModel(config)
target = Path(sys.argv[1])
save_model(model, target, Structure(), extra_files={"recipe.yaml": "first"})
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # a write that finds no room, as on a full disk
try:
    save_model(model, target, Structure(), extra_files={"recipe.yaml": "second"})
except RunError as error:
    print(error.problems[0].code, error.exit_code)
"""


def test_no_room_leaves_the_old_model(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FULL), str(tmp_path / "saved")], capture_output=True, text=True
    )
    assert done.stdout.split() == ["K803", "1"], done.stderr
    assert (tmp_path / "saved/recipe.yaml").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    kroncc.load(tmp_path / "saved")


def test_companion_files_are_copied(tiny, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "vocab.txt", "preprocessor_config.json", "pytorch_model.bin", "README.md"):
        (source / name).write_text(name)
    save_model(tiny("bert"), tmp_path / "saved", EMPTY, tokenizer=source)
    copied = {path.name for path in (tmp_path / "saved").iterdir()}
    assert copied == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "vocab.txt",
        "preprocessor_config.json",
    }
