"""The C kernels as a shared library: the one of the package, or one compiled by the machine's compiler into a cache.

The cache is the folder `$AST_SPARSE_CACHE`, else `ast_sparse` in `$XDG_CACHE_HOME` or `~/.cache`. The name of a library
has a hash of everything it depends on, and a finished library is moved into place, so several processes may compile at
once.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).with_name("src")
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-fvisibility=hidden")
_SECONDS = 120  # no compiler takes that long: it hangs


class BuildError(Exception):
    """Why there is no library, in one line without a full stop."""


def library_file() -> Path:
    """The shared library for this machine; compiled if there is none yet.

    Raises:
        BuildError: there is no compiler, it fails, or the cache cannot be written.
    """
    packaged = Path(__file__).with_name(packaged_name())
    if packaged.exists():
        return packaged
    compiler = _compiler()
    version = _run([*compiler, "--version"])
    file = cache_folder() / f"native-{_hash(*compiler, version)}.so"
    if not file.exists():
        _compile(compiler, file)
    return file


def compile_library(file: Path) -> None:
    """Compile the kernels for this machine to this file.

    Raises:
        BuildError: as for `library_file`.
    """
    _compile(_compiler(), file)


def packaged_name() -> str:
    """Name of a library beside this file that was compiled from these sources for this kind of machine."""
    return f"native-{sys.platform}-{platform.machine()}-{_hash()}.so"


def cache_folder() -> Path:
    """Where compiled libraries are kept."""
    if named := os.environ.get("AST_SPARSE_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ast_sparse"


def _hash(*more: str) -> str:
    digest = hashlib.sha256(repr((FLAGS, platform.machine(), more)).encode())
    for file in sorted(SOURCES.iterdir()):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _compiler() -> list[str]:
    named = shlex.split(os.environ.get("CC", ""))
    for command in [named] if named else [["cc"], ["gcc"], ["clang"]]:
        if shutil.which(command[0]):
            return command
    raise BuildError(f"CC={os.environ['CC']} was not found" if named else "no C compiler (cc, gcc, clang) was found")


def _compile(compiler: list[str], file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent, prefix="compiling-") as folder:
            made = Path(folder) / file.name
            _run([*compiler, *FLAGS, *map(str, sorted(SOURCES.glob("*.c"))), "-o", str(made)])
            os.replace(made, file)
    except OSError as error:
        raise BuildError(f"the cache {file.parent} cannot be written ({error.strerror or error})") from error


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} cannot be run ({type(error).__name__})") from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        reason = next((line for line in lines if "error" in line), lines[-1] if lines else f"exit {done.returncode}")
        raise BuildError(f"{command[0]} fails: {reason.strip().rstrip('.')}")
    return done.stdout
