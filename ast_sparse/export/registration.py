"""Register the compressed formats with transformers; what reads them is imported when a checkpoint asks for it.

So neither `import ast_sparse` nor an engine that imports transformers waits for the plug-in.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from collections.abc import Sequence
from typing import Any

from ast_sparse.export.formats import codecs

_TARGET = "transformers.quantizers.auto"
_FIX = "Compressed checkpoints will not load; see the range of transformers versions in pyproject.toml."


def register_when_imported() -> None:
    """Register the codecs of `formats`: now if transformers' quantizers are imported, otherwise when they are."""
    if _TARGET in sys.modules:
        _register()
    elif not any(isinstance(finder, _Hook) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Hook())


def _register() -> None:
    try:
        auto = sys.modules[_TARGET]
        for codec in codecs().values():
            auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(codec.method, _Later("AstSparse24Config"))
            auto.AUTO_QUANTIZER_MAPPING.setdefault(codec.method, _Later("CompressedHfQuantizer"))
    except Exception as error:  # importing transformers must not fail because of a plug-in
        warnings.warn(f"ast_sparse could not register its checkpoint format: {error!r}. {_FIX}", stacklevel=2)


class _Later:
    """Stands for a class of `quantizer.py` in transformers' tables until it is called or asked for an attribute."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._imported()(*args, **kwargs)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._imported(), attribute)

    def _imported(self) -> Any:
        try:
            from ast_sparse.export import quantizer  # replaces both entries of the tables
        except Exception as error:
            raise ImportError(f"ast_sparse could not import its reader: {error!r}. {_FIX}") from error
        return getattr(quantizer, self._name)


class _Hook(importlib.abc.MetaPathFinder):
    """Finds exactly one module, registers the formats after it has run, and removes itself."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _TARGET:
            return None
        spec = next(
            (found for finder in sys.meta_path if finder is not self if (found := finder.find_spec(fullname, path))),
            None,
        )
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: types.ModuleType) -> None:
            run(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _register()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
