"""What the README files name exists: files, options, settings."""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from transformers import TrainingArguments

from ast_sparse.cli import bench, data, eval, export, prune, train
from ast_sparse.config import load_config
from ast_sparse.config.run import SECTIONS

ROOT = Path(__file__).parents[1]
READMES = sorted(path for folder in ("ast_sparse", "configs", "scripts") for path in (ROOT / folder).rglob("README.md"))
READMES.append(ROOT / "README.md")
COMMANDS: dict[str, click.Command] = {
    "ast-train": train.main, "ast-prune": prune.main, "ast-eval": eval.main, "ast-export": export.main,
    "ast-bench": bench.main,
    **{f"ast-data {name}": command for name, command in data.main.commands.items()},
}  # fmt: skip

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)#\s]+)")
PATH = re.compile(r"(?<![\w./-])(?:ast_sparse|scripts|configs|tests)/[\w./*-]*")
FILE_OF_ROOM = re.compile(r"(?<![\w./*-])[\w./-]+\.(?:py|sh)\b")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
SETTING = re.compile(rf"(?<![\w./-])({'|'.join([*SECTIONS, 'training'])})\.([a-z_]+)(?![\w(/])")
FILE_NAMES = ("model.safetensors",)

each_readme = pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))


def code(readme: Path) -> str:
    """Everything in code blocks or between backticks, one piece per line; continued lines are joined."""
    text = readme.read_text(encoding="utf-8").replace("\\\n", " ")
    return "\n".join([*(body for _, body in FENCE.findall(text)), *INLINE.findall(FENCE.sub("", text))])


def options(command: click.Command) -> set[str]:
    return {"--help", *(name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts))}


def called(line: str) -> Iterator[tuple[str, str]]:
    """The commands of a line, each with what follows it."""
    for part in re.split(r"[;|]|\s#\s", line):
        found = re.search(rf"(?<![\w-])({'|'.join(COMMANDS)})(?![\w-])(.*)", part)
        if found:
            yield found[1], found[2]


def scripts_options() -> set[str]:
    """The options of the scripts, as spelled in their sources."""
    sources = (path.read_text(encoding="utf-8") for path in (ROOT / "scripts").rglob("*.py"))
    return {name for source in sources for name in re.findall(r"""["'](--[a-z-]+)["']""", source)}


def test_the_first_page_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 8000


def test_its_picture_and_its_numbers_are_those_of_the_results() -> None:
    text, results = (ROOT / "README.md").read_text(encoding="utf-8"), ROOT / "scripts" / "studies" / "results"
    printed = json.loads((results / "smollm2.json").read_text(encoding="utf-8"))
    for part in (printed["oneshot"], printed["retrained"]):
        assert part["command"].removeprefix("bash ") in text
        assert not [value for value in part["perplexity"].values() if f"{value:.2f}" not in text]
    assert 0 < (results / "headline.png").stat().st_size < 100_000


def test_its_times_of_a_token_are_those_of_the_newest_measurement() -> None:
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    file = ROOT / "scripts" / "benchmarks" / "results" / "x86_64-CPU-2-threads.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    newest = {row["question"]: row["ratio"]["median"] for row in rows if row["case"] == "LLaMA 1.17B, 1 threads"}
    vllm, transformers = (newest[f"{engine}: decode, batch 1"] for engine in ("vllm", "transformers"))
    assert f"{vllm:.2f} of the dense model's time for a token in vLLM, and {transformers:.2f} in transformers" in text


@each_readme
def test_links_lead_somewhere(readme: Path) -> None:
    links = [link for link in LINK.findall(readme.read_text(encoding="utf-8")) if "://" not in link]
    assert not [link for link in links if not (readme.parent / link).exists()]


@each_readme
def test_every_path_that_is_named_exists(readme: Path) -> None:
    paths = {path.rstrip("./-") for path in PATH.findall(readme.read_text(encoding="utf-8"))}
    named = [path for path in paths if not re.search(r"\b[A-Z]{2,}\b(?!\.md)", path)]  # DEVICE.jsonl stands for a name
    assert not [path for path in named if not (list(ROOT.glob(path)) if "*" in path else (ROOT / path).exists())]


@each_readme
def test_every_program_file_that_is_named_exists(readme: Path) -> None:
    """It may be beside the README, in the package or in the repository."""
    places = (readme.parent, ROOT / "ast_sparse", ROOT)
    names = set(FILE_OF_ROOM.findall(code(readme)))
    assert not [name for name in names if not any((place / name).is_file() for place in places)]


@each_readme
def test_every_option_of_a_command_exists(readme: Path) -> None:
    for line in code(readme).splitlines():
        for command, rest in called(line):
            assert set(OPTION.findall(rest)) <= options(COMMANDS[command]), line


@each_readme
def test_every_option_that_stands_alone_is_one_of_a_command_or_a_script(readme: Path) -> None:
    known = set().union(scripts_options(), *(options(command) for command in COMMANDS.values()))
    alone = [piece for piece in code(readme).splitlines() if piece.startswith("--")]
    assert not {option for piece in alone for option in OPTION.findall(piece)} - known


@each_readme
def test_every_setting_that_is_named_exists(readme: Path) -> None:
    fields = {name: {field.name for field in dataclasses.fields(section)} for name, section in SECTIONS.items()}
    fields["training"] = {field.name for field in dataclasses.fields(TrainingArguments)}
    named = [match for match in SETTING.finditer(code(readme)) if not match[0].startswith(FILE_NAMES)]
    assert not [match[0] for match in named if match[2] not in fields[match[1]]]


def test_the_configuration_that_is_shown_is_valid(tmp_path: Path) -> None:
    text = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
    (shown,) = [body for language, body in FENCE.findall(text) if language == "yaml"]
    (tmp_path / "run.yaml").write_text(shown, encoding="utf-8")
    assert load_config(tmp_path / "run.yaml").training["max_steps"] == 60


@pytest.mark.parametrize(
    "line, wrong",
    [
        ("ast-train --config a.yaml --resum", "--resum"),
        ("torchrun --nproc_per_node 8 $(which ast-train) --confg RUN.yaml", "--confg"),
        ("ast-data prepare OUT --domains a=b", "--domains"),
    ],
)
def test_a_wrong_option_is_found(line: str, wrong: str) -> None:
    ((command, rest),) = called(line)
    assert set(OPTION.findall(rest)) - options(COMMANDS[command]) == {wrong}
