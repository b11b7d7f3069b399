"""Compiles the C kernels of ast_sparse/kernels/native/ into a wheel, if there is a compiler. Everything else is said in
pyproject.toml.

With them the wheel is for one platform, and for every version of Python, because ctypes loads them. Without, it is
pure. An editable install compiles nothing: the kernels are compiled when they are first used.
"""

import importlib.util
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

NATIVE = Path("ast_sparse/kernels/native")


class WithKernels(Distribution):
    compiled = False

    def has_ext_modules(self) -> bool:
        """Whether this is for one platform; setuptools asks."""
        return self.compiled


class BuildKernels(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        compiling = module(NATIVE / "compiling.py")
        try:
            compiling.package_library(Path(self.build_lib) / NATIVE / compiling.packaged_name())
            self.distribution.compiled = True
        except compiling.BuildError as error:
            self.warn(f"The wheel has no compiled kernels: {error}.")


class KernelWheel(bdist_wheel):
    def finalize_options(self) -> None:
        # not build/, which builds at one time would share, and where modules stay that the package no longer has
        self.folder = TemporaryDirectory(prefix="ast-sparse-build-")
        self.distribution.get_command_obj("build").build_base = self.folder.name
        super().finalize_options()

    def run(self) -> None:
        self.run_command("build_py")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """py3-none-PLATFORM, or py3-none-any."""
        return self.python_tag, "none", super().get_tag()[2]


def module(file: Path) -> ModuleType:
    """A module without its package, which needs torch."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


setup(distclass=WithKernels, cmdclass={"build_py": BuildKernels, "bdist_wheel": KernelWheel})
