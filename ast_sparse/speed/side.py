"""One of the two models that are compared: starts its process, sends requests to it, ends it."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ast_sparse.errors import UserError
from ast_sparse.speed.cases import Case

_SHOWN = 300  # characters of the last line that a process wrote


@dataclass(frozen=True, kw_only=True)
class SideSpec:
    """How a model is loaded.

    Attributes:
        engine: `transformers` or `vllm`.
        folder: the model.
        compressed: keep a compressed export compressed.
        dtype: by name.
        device: for transformers.
        threads: CPU threads.
        vocabulary: prompts use token ids below this number.
        cache_bytes: for keys and values in vLLM.
        eager: vLLM without compilation.
    """

    engine: str
    folder: str
    compressed: bool
    dtype: str
    device: str = "cpu"
    threads: int
    vocabulary: int
    cache_bytes: int = 0
    eager: bool = False


class SideFailed(Exception):
    """A model could not be loaded or run."""


class Side(Protocol):
    """What `turns.measure` needs of a model."""

    def ask(self, do: str, **arguments: Any) -> None:
        """Send a request."""

    def answer(self) -> Any:
        """Wait for the answer to the last request.

        Raises:
            UserError: a fault that the user can fix.
            SideFailed: any other, or the process has ended.
        """

    def close(self) -> None:
        """End the process."""


class Process:
    """A model in a process of its own, which `worker.py` runs. What it prints goes to a temporary file."""

    def __init__(self, spec: SideSpec, cases: Sequence[Case]) -> None:
        from ast_sparse.speed.in_vllm import ENVIRONMENT

        added = {"OMP_NUM_THREADS": str(spec.threads), **(ENVIRONMENT if spec.engine == "vllm" else {})}
        reading, writing = os.pipe()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ast_sparse.speed.worker", str(writing)],
            stdin=subprocess.PIPE, stdout=self._log, stderr=self._log, text=True, pass_fds=[writing],
            env={**os.environ, **added},
        )  # fmt: skip
        os.close(writing)
        self._answers = os.fdopen(reading, encoding="utf-8")
        self.ask("load", **vars(spec), cases=[as_list(case) for case in cases])

    def ask(self, do: str, **arguments: Any) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `answer` says so
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()

    def answer(self) -> Any:
        line = self._answers.readline()
        if not line:
            raise SideFailed(f"its process ended with code {self._process.wait()}{self._last_words()}")
        return content(json.loads(line))

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", errors="replace").strip().splitlines()
        return f": {lines[-1].strip()[:_SHOWN]}" if lines else ""

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._answers, self._log):
            if file is not None:
                with contextlib.suppress(BrokenPipeError):  # a request that was never read
                    file.close()


class InProcess:
    """A model in this process, for tiny models: it starts at once, but its peak memory is that of everything here."""

    def __init__(self, spec: SideSpec, cases: Sequence[Case]) -> None:
        from ast_sparse.speed.worker import Worker

        self._worker = Worker()
        self.ask("load", **vars(spec), cases=[as_list(case) for case in cases])

    def ask(self, do: str, **arguments: Any) -> None:
        self._answer = self._worker.answer({"do": do, **arguments})

    def answer(self) -> Any:
        return content(self._answer)

    def close(self) -> None:
        self._worker = self._answer = None  # type: ignore[assignment]


def content(answer: dict[str, Any]) -> Any:
    """What an answer of the worker holds; its errors are raised, as in `Side.answer`."""
    if "ok" in answer:
        return answer["ok"]
    raise (UserError if answer["user"] else SideFailed)(answer["error"])


def as_list(case: Case) -> list[int]:
    """A case for JSON: prompt, new, batch."""
    return [case.prompt, case.new, case.batch]
