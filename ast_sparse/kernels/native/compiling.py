"""The C kernels as a shared library: the one of the package, or one compiled by the machine's compiler into a cache.

The cache is the folder `$AST_SPARSE_CACHE`, else `ast_sparse` in `$XDG_CACHE_HOME` or `~/.cache`. The name of a library
has a hash of everything it depends on, and a finished library is moved into place, so several processes may compile at
once.
"""

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).with_name("src")
VARIABLE = "AST_SPARSE_CACHE"
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
    if not os.path.exists(file):  # Path.exists would raise for a folder that may not be entered
        logger.info(f"Compiling the C kernels to {file}: some seconds, once.")
        _compile(compiler, file)
    return file


def package_library(file: Path) -> None:
    """Write the kernels for this machine to this file, for a wheel.

    They are compiled now. Only a cache that `$AST_SPARSE_CACHE` names is used, because a wheel goes to other machines,
    and the cache of a home folder may be as old as that.

    Raises:
        BuildError: as for `library_file`.
    """
    if os.environ.get(VARIABLE):
        try:
            shutil.copyfile(library_file(), file)
            return
        except (BuildError, OSError) as error:
            logger.info(f"The C kernels are not taken from {os.environ[VARIABLE]}: {error}.")
    _compile(_compiler(), file)


def packaged_name() -> str:
    """Name of a library beside this file that was compiled from these sources for this kind of machine."""
    return f"native-{sys.platform}-{platform.machine()}-{_hash()}.so"


def cache_folder() -> Path:
    """Where compiled libraries are kept: an absolute path, because the loader would search a bare name elsewhere.

    Raises:
        BuildError: there is no home folder.
    """
    named, shared = os.environ.get(VARIABLE), os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(named) if named else Path(shared or "~/.cache") / "ast_sparse"
        return folder.expanduser().absolute()
    except RuntimeError as error:
        raise BuildError(f"there is no home folder for the cache; set {VARIABLE} to a folder") from error


def _hash(*more: str) -> str:
    digest = hashlib.sha256(repr((FLAGS, platform.machine(), more)).encode())
    for file in sorted(SOURCES.iterdir()):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _compiler() -> list[str]:
    try:
        named = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise BuildError(f"CC={os.environ['CC']} cannot be read ({error})") from error
    for command in [named] if named else [["cc"], ["gcc"], ["clang"]]:
        if shutil.which(command[0]):
            return command
    raise BuildError(f"CC={os.environ['CC']} was not found" if named else "no C compiler (cc, gcc, clang) was found")


def _compile(compiler: list[str], file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent, prefix="compiling-") as folder:
            made = Path(folder) / file.name
            command = [*compiler, *FLAGS, *map(str, sorted(SOURCES.glob("*.c"))), "-o", str(made)]
            try:
                _run(command)
            except BuildError:  # perhaps because of an assembler that is older than the compiler
                _run([*command, "-DAST24_NO_AMX"])
            os.replace(made, file)
    except OSError as error:
        raise BuildError(
            f"the cache {file.parent} cannot be written ({error.strerror or error}); set {VARIABLE} to another folder"
        ) from error


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
