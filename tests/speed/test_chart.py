"""The figure: a bar for each model and case, as high as its tokens per second."""

from pathlib import Path
from typing import Any

import pytest

from ast_sparse.report import plots
from ast_sparse.speed import chart
from ast_sparse.speed.cases import Case
from ast_sparse.speed.outcomes import Outcome, Timing


@pytest.mark.parametrize("sides", [("compressed", "dense"), ("model",)])
def test_bars_are_tokens_per_second(sides: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    save = plots.save
    monkeypatch.setattr(plots, "save", lambda figure, path: (drawn.append(figure), save(figure, path)))
    timings = {side: Timing([1.0 + index], [0.1 * (1 + index)], 1) for index, side in enumerate(sides)}
    outcomes = [Outcome(Case(10, 5, 1), timings), Outcome(Case(1, 2, 1), reason="left out")]
    chart.draw(outcomes, "a title", tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    decode, prefill = drawn[0].axes
    assert [bar.get_height() for bar in decode.patches] == [10.0, 5.0][: len(sides)]
    assert [bar.get_height() for bar in prefill.patches] == [10.0, 5.0][: len(sides)]
    assert [text.get_text() for text in decode.texts] == ["2.00×"][: len(sides) - 1]
    assert [label.get_text() for label in prefill.get_xticklabels()] == ["10/5\nbatch 1"]
