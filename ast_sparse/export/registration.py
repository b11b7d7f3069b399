"""Register the compressed formats with transformers, without importing transformers before the user does."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from collections.abc import Sequence

_TARGET = "transformers.quantizers.auto"


def register_when_imported() -> None:
    """Register the codecs of `formats`: now if transformers' quantizers are imported, otherwise when they are."""
    if _TARGET in sys.modules:
        _register()
    elif not any(isinstance(finder, _Hook) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Hook())


def _register() -> None:
    quantizer = sys.modules.get("ast_sparse.export.quantizer")
    if quantizer is not None and not hasattr(quantizer, "register"):
        return  # it is being imported, which imported transformers: it registers itself at the end
    try:
        from ast_sparse.export.quantizer import register

        register()
    except Exception as error:  # importing transformers must not fail because of a plug-in
        warnings.warn(
            f"ast_sparse could not register its checkpoint format: {error!r}. Compressed checkpoints will not load; "
            "see the range of transformers versions in pyproject.toml.",
            stacklevel=2,
        )


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
