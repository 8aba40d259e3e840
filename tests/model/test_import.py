"""`import kroncc` is light, and makes its models loadable whichever package is imported first."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = "{'torch', 'transformers', 'datasets', 'pydantic', 'numpy', 'accelerate', 'safetensors'}"
KNOWN = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m; assert 'kroncc' in m, list(m)"


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_nothing_heavy_is_imported():
    assert run(f"import sys, kroncc; print(sorted({HEAVY} & set(sys.modules)))") == "[]"


@pytest.mark.parametrize(
    "imports",
    [
        "import kroncc; import transformers",
        "import transformers; import kroncc",
        "import kroncc, importlib; importlib.reload(kroncc); import transformers",
    ],
)
def test_registered_in_either_order(imports):
    run(f"import warnings; warnings.simplefilter('default'); {imports}; {KNOWN}")


def test_the_hook_leaves_no_trace():
    code = (
        "import warnings; warnings.simplefilter('default'); import sys, kroncc, inspect;"
        "import transformers.quantizers.auto as auto;"
        "assert type(auto.__spec__.loader).__name__ == 'SourceFileLoader';"
        "assert auto.__loader__ is auto.__spec__.loader; inspect.getsource(auto);"
        "print([one for one in sys.meta_path if 'kroncc' in type(one).__module__])"
    )
    assert run(code) == "[]"


def test_lazy_names():
    assert run("import kroncc; print(kroncc.__version__)").count(".") == 2
    out = run("import kroncc\ntry: kroncc.nothing\nexcept AttributeError as error: print(error)")
    assert out == "module 'kroncc' has no attribute 'nothing'"
