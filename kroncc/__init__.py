"""kroncc: a compiler for compression recipes of transformer models.

Importing this package loads neither torch nor transformers. It arranges that transformers, whenever it is
imported, knows how to load the models that kroncc wrote.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kroncc.model.load import load

__all__ = ["load"]

_REGISTRY = "transformers.quantizers.auto"  # the transformers module that holds the table of quantizers


def __getattr__(name: str) -> Any:
    if name == "load":
        return importlib.import_module("kroncc.model.load").load
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("kroncc")
    raise AttributeError(f"module 'kroncc' has no attribute {name!r}")


def _register() -> None:
    importlib.import_module("kroncc.model.quantizer").register()


class _RegisterOnImport(importlib.abc.MetaPathFinder):
    """Waits for the transformers registry to be imported, then adds kroncc to it, once."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)  # the search below must not come back here
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader, self)
        return spec


class _ThenRegister(importlib.abc.Loader):
    """Runs the module by its own loader, then registers; gives the module its own loader back."""

    def __init__(self, loader: Any, finder: _RegisterOnImport) -> None:
        self._loader = loader
        self._finder = finder

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        _register()


if _REGISTRY in sys.modules:
    _register()
elif not any(type(finder).__name__ == _RegisterOnImport.__name__ for finder in sys.meta_path):
    sys.meta_path.insert(0, _RegisterOnImport())
