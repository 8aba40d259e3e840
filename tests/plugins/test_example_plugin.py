"""The example plug-in as a stranger would use it: installed, discovered, run, saved, reloaded."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "tests/plugins/example_plugin"

USE = """
from torch import nn
from transformers import BertConfig, BertModel
from example_plugin.block_diagonal import BlockDiagonal
from kroncc.testing import assert_reloads, assert_rewrites, assert_skips

assert_rewrites(BlockDiagonal(blocks=4), nn.Linear(8, 16))
assert_skips(BlockDiagonal(blocks=3), nn.Linear(8, 16), "do not divide")
small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
config = BertConfig(vocab_size=50, **small)
loaded = assert_reloads("block-diagonal", {"blocks": 4}, ["@ffn.up"], BertModel(config))
print(type(loaded).__name__, type(loaded.encoder.layer[1].intermediate.dense).__name__)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The plug-in installed into a folder of its own, as pip does it."""
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", folder, PLUGIN], check=True)
    return os.environ | {"PYTHONPATH": str(folder), "KRONCC_CACHE": str(folder / "cache")}


@pytest.mark.long
def test_it_is_discovered_run_saved_and_reloaded(installed):
    done = subprocess.run([sys.executable, "-c", USE], env=installed, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["BertModel", "BlockDiagonalLinear"]


@pytest.mark.long
def test_it_is_listed_and_explained(installed):
    kroncc = [sys.executable, "-m", "kroncc", "passes"]
    listed = subprocess.run(kroncc, env=installed, capture_output=True, text=True, check=True).stdout
    assert "block-diagonal" in listed
    assert "example-plugin" in listed
    one = subprocess.run(
        [*kroncc, "block-diagonal"], env=installed, capture_output=True, text=True, check=True
    )
    assert "number of blocks" in one.stdout


def test_the_guide_shows_the_plug_in_as_it_is_in_under_40_lines():
    guide = (ROOT / "docs/writing_passes.md").read_text()
    code = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)[0]
    assert code == (PLUGIN / "example_plugin/block_diagonal.py").read_text()
    assert len(code.splitlines()) < 40
