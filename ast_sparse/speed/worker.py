"""The process of one model: `python -m ast_sparse.speed.worker FD` reads requests from stdin and answers on FD.

A request is a line of JSON, `{"do": NAME, ...}`, and so is an answer: `{"ok": ...}` or `{"error": TEXT, "user": BOOL}`.
A process for each model makes memory measurable, and a failure of one does not end the other.
"""

import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from ast_sparse.errors import UserError, one_line
from ast_sparse.speed.cases import Case
from ast_sparse.speed.machine import machine

_LONGEST = 300


class Worker:
    """Answers the requests for one model; the engine is loaded at the first of them, `load`."""

    def __init__(self) -> None:
        self._engine: Any = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request; a failure is an answer too."""
        arguments = dict(request)
        try:
            return {"ok": getattr(self, f"_{arguments.pop('do')}")(**arguments)}
        except Exception as error:
            return {"error": one_line(error, _LONGEST, cut="word", named=True), "user": isinstance(error, UserError)}

    def _load(self, engine: str, threads: int, cases: list[list[int]], **spec: Any) -> dict[str, Any]:
        """Load the model; returns the machine as this process sees it."""
        torch.set_num_threads(threads)
        folder = Path(spec.pop("folder"))
        if engine == "vllm":
            from ast_sparse.speed.in_vllm import VllmEngine

            del spec["device"], spec["compressed"]  # the checkpoint itself selects the plug-in
            self._engine = VllmEngine(folder, cases=[Case(*case) for case in cases], **spec)
        else:
            from ast_sparse.speed.in_transformers import TransformersEngine

            del spec["cache_bytes"], spec["eager"]
            self._engine = TransformersEngine(folder, **spec)
        return machine()

    def _begin(self, case: list[int]) -> float:
        seconds: float = self._engine.begin(Case(*case))
        return seconds

    def _advance(self, steps: int) -> float:
        seconds: float = self._engine.advance(steps)
        return seconds

    def _finish(self) -> dict[str, Any]:
        found: dict[str, Any] = self._engine.finish()
        return found


def main() -> None:
    """Answer requests until stdin is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to every process of the terminal: the parent decides
    warnings.simplefilter("ignore")
    worker = Worker()
    with os.fdopen(int(sys.argv[1]), "w", encoding="utf-8") as answers:
        for line in sys.stdin:
            answers.write(json.dumps(worker.answer(json.loads(line))) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
