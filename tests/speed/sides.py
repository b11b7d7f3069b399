"""Models to compare, and sides without a process of their own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ast_sparse.export.export import export_model
from ast_sparse.speed.cases import Case
from ast_sparse.speed.machine import machine
from ast_sparse.speed.side import SideFailed, SideSpec
from tests.export.sparse_models import sparse_model


def write_exports(folder: Path, family: str = "llama", dtype: str = "float32", slorb_k: int | None = None) -> Path:
    """The same 2:4 model as `folder/compressed` and `folder/dense`."""
    for name in ("compressed", "dense"):
        export_model(sparse_model(family, slorb_k), folder / name, name, dtype=dtype)
    return folder


class Scripted:
    """A side that computes nothing: it takes known times, and fails where it is told to.

    Attributes:
        calls: the requests of all sides, in order, as (folder, request).
        fails: requests that fail, such as ("begin", 4): the prompts of batch 4.
        seconds: by folder: of a prompt token, of a step.
        tokens: by folder: the new tokens of each prompt.
    """

    calls: list[tuple[str, str]]
    fails: set[tuple[str, int]]
    seconds: dict[str, tuple[float, float]]
    tokens: dict[str, list[int]]
    opened: int

    @classmethod
    def reset(cls) -> type["Scripted"]:
        cls.calls, cls.fails, cls.seconds, cls.tokens, cls.opened = [], set(), {}, {}, 0
        return cls

    def __init__(self, spec: SideSpec, cases: Sequence[Case]) -> None:
        self.name = Path(spec.folder).name + ("" if spec.compressed else "-decoded")
        self._do, self._case, self._steps = "load", cases[0], 0
        type(self).opened += 1

    def ask(self, do: str, **arguments: Any) -> None:
        self._do, self._steps = do, arguments.get("steps", 0)
        if "case" in arguments:
            self._case = Case(*arguments["case"])
        self.calls.append((self.name, do))

    def answer(self) -> Any:
        if (self._do, self._case.batch) in self.fails:
            raise SideFailed("no memory is left")
        prompt, step = self.seconds.get(self.name, (1e-3, 1e-2))
        row = self.tokens.get(self.name, [0] * self._case.new)
        return {
            "load": machine(),
            "begin": prompt * self._case.prompt,
            "advance": step * self._steps,
            "finish": {"tokens": [row] * self._case.batch, "peak": 10**6},
        }[self._do]

    def close(self) -> None:
        type(self).opened -= 1
