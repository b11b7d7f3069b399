"""What a YAML file may not do to its reader, and that what is written reads back."""

from pathlib import Path
from typing import Any

import pytest

from ast_sparse.config import load_config
from ast_sparse.config.yaml12 import dump_yaml, parse_yaml, read_yaml
from ast_sparse.errors import UserError

BOMB = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30))]
)

REFUSED: dict[str, tuple[str, str]] = {
    "object": ("a: !!python/object/apply:os.system ['true']", r"line 1: the tag .*os\.system is not supported"),
    "odd bool": ("a: !!bool maybe", "the tag .* is not supported"),
    "odd float": ("a: !!float ''", "the tag .* is not supported"),
    "timestamp": ("a: !!timestamp x", "the tag .* is not supported"),
    "bytes": ("a: !!binary aGVsbG8=", "the tag .* is not supported"),
    "bomb": (BOMB, r"line \d+: more than 100,000 values"),
    "text bomb": (f"a: &a '{'x' * 10_000}'\nb: [{', '.join(['*a'] * 1000)}]", "more than 100,000 values"),
    "cycle": ("a: &a [*a]", r"line 1: \*a contains itself"),
    "deep": ("[" * 100_000, "more than 32 levels deep"),
    "long integer": ("a: " + "9" * 5000, "not valid YAML"),
    "half a character": ('a: "\\ud800"', r"line 1: '\\ud800' has an invalid character"),
    "zero byte": ('a: "x\\0"', r"line 1: 'x\\x00' has an invalid character"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_yaml_that_is_no_configuration_is_refused_in_one_line(case: str) -> None:
    text, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as caught:
        parse_yaml(text, "run.yaml")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_aliases_stand_for_their_values() -> None:
    assert parse_yaml("a: &a [1, {b: 2}]\nc: *a\nd: [*a, *a]", "")["d"] == [[1, {"b": 2}]] * 2


def test_file_of_ten_megabytes_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("a: " + "x" * 10_000_000)
    with pytest.raises(UserError, match=r"run\.yaml' is larger than 1 MiB"):
        read_yaml(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    "value", ["1e5", "09", "2:4", "no", "true", "~", "", "0x1", "1_0", "a\nb", "\u2028", "é", " x"]
)
def test_text_that_looks_like_something_else_is_written_so_that_it_reads_back(value: str) -> None:
    assert parse_yaml(dump_yaml({"a": value, value: [value]}), "") == {"a": value, value: [value]}


@pytest.mark.parametrize("value", [1e-5, 1e300, -0.5, 10**18, True, None, [], {}, [[1], {"a": None}]])
def test_values_read_back(value: Any) -> None:
    found = parse_yaml(dump_yaml({"a": value}), "")["a"]
    assert found == value and type(found) is type(value)


BASE = "model: {name_or_path: m}\ndata: {train: t}\n"


@pytest.mark.parametrize(
    ("addition", "message"),
    [
        (f"sparsity: {{mask_decay: {'9' * 400}}}", r"sparsity\.mask_decay=9+ … is too large"),
        ("training: {lr_scheduler_kwargs: {min_lr: .nan}}", r"training\.lr_scheduler_kwargs=nan is not a finite"),
        ('"a\\nb": 1', r"unknown section 'a\\nb'"),
        ('training: {"a\\nb": 1}', r"Unknown key training\.'a\\nb'"),
        (f"training: {{max_steps: {'x' * 100_000}}}", r"training\.max_steps='x+ … is text"),
        (f"sparsity: [{'x, ' * 10_000}]", r"Section 'sparsity' is \['x', .* … is|Section 'sparsity' is .* …, not"),
    ],
)
def test_value_that_would_not_fit_a_line_or_a_number_is_shortened(tmp_path: Path, addition: str, message: str) -> None:
    (tmp_path / "run.yaml").write_text(BASE + addition)
    with pytest.raises(UserError, match=message) as caught:
        load_config(tmp_path / "run.yaml")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


def test_override_of_endless_depth_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(BASE)
    with pytest.raises(UserError, match="more than 16 levels deep"):
        load_config(tmp_path / "run.yaml", ["model.config_overrides" + ".a" * 5000 + "=1"])
