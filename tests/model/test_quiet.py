"""Library noise stays away while a command runs, and nothing stays changed afterwards."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings

import pytest
import transformers
from transformers.utils import logging as hf_logging

from kroncc.model.load import load_directory
from kroncc.model.save import save_model
from kroncc.quiet import quiet_libraries, quiet_transformers
from kroncc.rewrite.structure import Structure


def test_noise_is_left_out_and_everything_is_given_back(caplog):
    logger = logging.getLogger("torchao")
    hf_logging.set_verbosity_warning()
    hf_logging.enable_progress_bar()
    environment, filters = dict(os.environ), list(warnings.filters)
    with quiet_libraries():
        logger.warning("Failed to load /some/lib.so")
        transformers.utils.logging.get_logger("transformers.x").warning("LOAD REPORT")
        assert not hf_logging.is_progress_bar_enabled()
        warnings.warn_explicit("pytree thing", FutureWarning, "x.py", 1, module="torch.utils._pytree")
        warnings.warn_explicit("old", DeprecationWarning, "x.py", 1, module="transformers.models.bert")
        with pytest.raises(UserWarning, match="ours"):
            warnings.warn_explicit("ours", UserWarning, "x.py", 1, module="mine")
    assert not caplog.records
    assert hf_logging.is_progress_bar_enabled()
    assert hf_logging.get_verbosity() == logging.WARNING
    assert (dict(os.environ), list(warnings.filters)) == (environment, filters)
    logger.warning("heard again")
    assert len(caplog.records) == 1
    hf_logging.set_verbosity_error()


def test_loading_changes_no_global_setting(tiny, tmp_path, capfd):
    save_model(tiny("bert"), tmp_path / "saved", Structure())
    hf_logging.set_verbosity_info()
    with quiet_transformers():
        pass
    load_directory(tmp_path / "saved")
    assert hf_logging.get_verbosity() == logging.INFO
    hf_logging.set_verbosity_error()
    assert capfd.readouterr().err == ""


def test_nothing_is_imported():
    code = "import sys\nfrom kroncc.quiet import *\nwith quiet_libraries(): print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_command_that_imports_everything_is_silent(tmp_path):
    code = """
from kroncc.quiet import quiet_libraries
with quiet_libraries():
    import torch, transformers, datasets, accelerate, warnings
    try:
        import torchao
    except ImportError:
        pass
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                                     intermediate_size=64, vocab_size=100)
    transformers.BertModel(config).save_pretrained("m")
    transformers.BertForSequenceClassification.from_pretrained("m")
    model = transformers.BertModel(config)
    ids = torch.ones(2, 5, dtype=torch.long)
    torch.export.export(model, (), {"input_ids": ids, "attention_mask": ids}, strict=False)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""
