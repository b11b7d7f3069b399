"""Processes that start with torch and transformers imported: one process imports them, and each of these is its fork.

A fresh interpreter takes seconds to reach the first line of a command. These start in milliseconds and otherwise behave
like `python -m`: they have a pid, an environment, exit codes, signals. If a test is about the interpreter itself, such
as the order of imports, it starts a fresh one. Output goes into files: if a test limits the size of files, that limit
applies to them too.

`run_python` is for code that imports transformers or this package itself: its forks have only torch imported, and what
else transformers imports.
"""

import atexit
import gc
import importlib
import json
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

_context: Any = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.preloaded"])


class Started:
    """A running command, with the parts of `subprocess.Popen` that tests need."""

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        output: tuple[Path, Path] | None = None,
        start_new_session: bool = False,
    ) -> None:
        if command[0] != sys.executable or "-m" not in command:
            raise ValueError(f"{command} does not run a module")
        self.args = list(command)
        self._folder = tempfile.TemporaryDirectory()
        self.output = output or (Path(self._folder.name, "stdout"), Path(self._folder.name, "stderr"))
        environment, is_apart = dict(os.environ if env is None else env), start_new_session
        module, *arguments = command[command.index("-m") + 1 :]
        self._process = _context.Process(
            target=_run_module, args=(module, arguments, environment, os.getcwd(), self.output, is_apart)
        )
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")  # the main module of this process must not be run again there
        try:
            self._process.start()
        finally:
            sys.modules["__main__"] = main
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        code: int | None = self._process.exitcode
        return code

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end; return what the command and its own processes wrote."""
        self.wait(timeout)
        out, err = (file.read_text() for file in self.output)
        return out, err


def run_command(
    command: Sequence[str], env: Mapping[str, str] | None = None, check: bool = False
) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` of a `python -m` command; its output is always captured, as text."""
    process = Started(command, env)
    out, err = process.communicate()
    code = process.wait()
    if check and code:
        raise subprocess.CalledProcessError(code, list(command), out, err)
    return subprocess.CompletedProcess(list(command), code, out, err)


@contextmanager
def forked_commands() -> Iterator[None]:
    """Inside the block, `subprocess.run` of a `python -m` command runs a fork, whoever calls it."""
    fresh = subprocess.run

    def run(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[Any]:
        if list(command[:2]) != [sys.executable, "-m"]:
            return fresh(command, **options)
        return run_command(command, options.get("env"), options.get("check", False))

    subprocess.run = run  # type: ignore[assignment]
    try:
        yield
    finally:
        subprocess.run = fresh


_FORKING = """
import gc
gc.disable()  # nothing here is garbage
import accelerate, json, os, sys, torch.distributed.tensor, torchao, traceback
gc.freeze()
gc.enable()

for line in sys.stdin:
    code, arguments, *output = json.loads(line)
    if not (pid := os.fork()):
        for number, file in enumerate(output, start=1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
        sys.argv = ["-c", *arguments]
        status = 0
        try:
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@cache
def _forking() -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", _FORKING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    atexit.register(process.communicate)
    return process


def run_python(code: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run code in a process that has imported neither transformers nor this package, which it finds."""
    process = _forking()
    assert process.stdin is not None and process.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        output = [Path(folder, "stdout"), Path(folder, "stderr")]
        request = [code, [str(each) for each in arguments], *map(str, output)]
        print(json.dumps(request), file=process.stdin, flush=True)
        status = int(process.stdout.readline())
        texts = [file.read_text() for file in output]
    assert not check or status == 0, texts[1]
    return subprocess.CompletedProcess([code], status, *texts)


def run_interpreted(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process in which Triton interprets its kernels; it decides that when it is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def _run_module(
    module: str,
    arguments: list[str],
    environment: dict[str, str],
    folder: str,
    output: tuple[Path, Path],
    is_apart: bool,
) -> None:
    """What the fork does."""
    if is_apart:
        os.setsid()
    gc.freeze()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, file in enumerate(output, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (
        open(number, "w", buffering=1, errors=errors, closefd=False)  # noqa: SIM115  # stays open as long as the process runs
        for number, errors in ((1, "strict"), (2, "backslashreplace"))
    )
    if module == "torch.distributed.run":
        _fork_ranks(output)
    sys.argv = [module, *arguments]
    sys.modules.pop(module, None)  # it is run as `__main__`
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _fork_ranks(output: tuple[Path, Path]) -> None:
    """Let torchrun start its ranks as forks too."""
    server: Any = multiprocessing.forkserver._forkserver  # type: ignore[attr-defined]
    server.ensure_running = lambda: None  # the server that forked this process

    def start(args: Sequence[str], env: Mapping[str, str], stdout: Any, stderr: Any, **kwargs: Any) -> Started:
        assert stdout is stderr is None, "ranks write where torchrun writes"
        return Started(args, env, output, **kwargs)

    name = "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler"
    importlib.import_module(name).Popen = start  # type: ignore[attr-defined]
