"""A run on a mixture of domains: shares by the rule, blocks by the shares, and the same after a resume."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from ast_sparse import SparseTrainer, SparsityConfig, UserError
from ast_sparse.cli.train import main
from ast_sparse.config import MixtureConfig
from ast_sparse.data.blocks.domains import Mixture
from ast_sparse.training.loader import DATA_STATE
from tests.data.documents import documents
from tests.data.folders import shards, write
from tests.models import save_tiny_model, tiny_model
from tests.training.small_runs import arguments, blocks

START = {"cc": 0.6, "wiki": 0.3, "book": 0.1}
TARGETS = {"cc": 4.8, "wiki": 4.9, "book": 4.7}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three domains, as text and as shards; `book` has few documents."""
    root = tmp_path_factory.mktemp("domains")
    save_tiny_model(root / "model")
    texts = documents(170, sentences=3)
    for name, part in (("cc", texts[:100]), ("wiki", texts[100:160]), ("book", texts[160:])):
        shards(root, write(root, f"{name}.jsonl", part), characters=3000)
    return root


def configure(root: Path, suffix: str, **update: Any) -> None:
    tree = {
        "model": {"name_or_path": str(root / "model")},
        "data": {
            "root": str(root), "eval_share": 0.1, "block_size": 16,
            "domains": {
                name: {"train": name + suffix, "share": share, "target": TARGETS[name]} for name, share in START.items()
            },
            "update": {"type": "doremi", **update},
        },
        "sparsity": {"mask_interval": 2},
        "training": {
            "max_steps": 8, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none", "save_steps": 1,
            "disable_tqdm": True, "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 1, "learning_rate": 1e-3,
        },
    }  # fmt: skip
    (root / "run.yaml").write_text(yaml.safe_dump(tree))


def train(root: Path, out: Path, *options: str) -> Result:
    result = CliRunner().invoke(main, ["--config", str(root / "run.yaml"), "--output-dir", str(out), *options])
    assert result.exit_code == 0, result.output
    return result


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def by_step(out: Path, key: str) -> dict[int, float]:
    """The last value of each step."""
    return {row["step"]: row[key] for row in records(out) if key in row}


def test_shares_follow_the_rule_and_a_resumed_run_continues_with_the_same_blocks(root: Path, tmp_path: Path) -> None:
    configure(root, "")
    result = train(root, tmp_path / "whole")
    assert "train: 154 documents" in result.output and "  wiki: 54 documents" in result.output
    shares = {0: START}
    for step in (2, 4, 6, 8):  # by hand: w·e^(loss − target), normed, with a floor
        losses = {name: by_step(tmp_path / "whole", f"eval_{name}_loss")[step] for name in START}
        weights = {name: share * math.exp(losses[name] - TARGETS[name]) for name, share in shares[step - 2].items()}
        total = sum(weights.values())
        shares[step] = {name: (1 - 1e-4) * weight / total + 1e-4 / 3 for name, weight in weights.items()}
        for name, share in shares[step].items():
            assert by_step(tmp_path / "whole", f"domain_share/{name}")[step] == pytest.approx(share, rel=1e-9)
    assert shares[8] != pytest.approx(START, abs=1e-3)
    assert by_step(tmp_path / "whole", "domain_share/cc")[1] == 0.6  # the shares of the start are logged as well
    state = json.loads((tmp_path / f"whole/checkpoint-8/{DATA_STATE}").read_text())
    assert [change["step"] for change in state["history"]] == [0, 2, 4, 6, 8]
    for step in (3, 4):  # between two evaluations, and at one
        out = tmp_path / f"from-{step}"
        train(root, out, "--resume", str(tmp_path / f"whole/checkpoint-{step}"))
        for name in (DATA_STATE, "model.safetensors"):
            paths = [folder / "checkpoint-8" / name for folder in (tmp_path / "whole", out)]
            if name == DATA_STATE:
                assert paths[0].read_text() == paths[1].read_text()
            else:
                ours, theirs = map(load_file, paths)
                assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    check_domain_losses(tmp_path / "whole", state)
    epochs = {name: by_step(tmp_path / "whole", f"domain_epoch/{name}")[8] for name in START}
    used = {name: epochs[name] * state["domains"][name] for name in START}
    assert sum(used.values()) == pytest.approx(32) and all(abs(count - round(count)) < 1e-9 for count in used.values())


def check_domain_losses(out: Path, state: dict[str, Any]) -> None:
    """The losses of the domains, weighted by their samples, add up to the loss of the step."""
    names = list(state["domains"])  # in the order of the YAML file
    mixture = Mixture(state["domains"], [START[name] for name in names], state["seed"], state["batch"])
    mixture.load_history(state)
    for step in range(8):
        counts = np.bincount(mixture.samples(step)[0], minlength=3)
        losses = [by_step(out, f"domain_loss/{name}").get(step + 1, 0.0) for name in names]
        assert [loss > 0 for loss in losses] == [count > 0 for count in counts]
        assert by_step(out, "loss")[step + 1] == pytest.approx(float(losses @ counts) / 4, rel=1e-5)


def test_text_and_shards_of_a_mixture_train_the_same(root: Path, tmp_path: Path) -> None:
    for suffix, out in (("", "shards"), (".jsonl", "text")):
        configure(root, suffix, type="bandit")
        train(root, tmp_path / out, "--set", "training.max_steps=3")
    ours, theirs = (load_file(tmp_path / out / "checkpoint-3/model.safetensors") for out in ("shards", "text"))
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    results = json.loads((tmp_path / "text/results.json").read_text())
    assert results["dense"]["heldout"]["windows"] > 20  # over all domains
    overall = by_step(tmp_path / "text", "eval_loss")[2]
    assert math.exp(overall) == pytest.approx(by_step(tmp_path / "text", "eval_perplexity")[2])
    parts = {name: by_step(tmp_path / "text", f"eval_{name}_loss")[2] for name in START}
    assert min(parts.values()) < overall < max(parts.values())


def test_evaluation_before_the_first_step_changes_no_share(tmp_path: Path) -> None:
    parts = {name: blocks(count=12, seed=seed) for seed, name in enumerate("ab")}
    trainer = SparseTrainer(
        tiny_model("llama"),
        arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2, eval_on_start=True),
        sparsity_config=SparsityConfig(mask_interval=2),
        mixture_config=MixtureConfig(type="doremi", targets={"a": 1.0, "b": 2.0}),
        train_dataset=parts,
        eval_dataset={name: blocks(count=4, seed=9) for name in "ab"},
    )
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    shares = [
        (row["step"], row["domain_share/a"], row["domain_share/b"])
        for row in trainer.state.log_history
        if "domain_share/a" in row
    ]
    grown = math.e / (math.e + 1)  # both losses are the same, the targets 1 apart
    assert shares[0] == (1, 0.5, 0.5) and len(shares) == 2
    assert shares[1] == pytest.approx((2, 0.9999 * grown + 5e-5, 0.9999 * (1 - grown) + 5e-5))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mixture_config": MixtureConfig(shares={"a": 0.5, "c": 0.5})}, r"data\.domains\.b\.share is missing"),
        (
            {"mixture_config": MixtureConfig(shares={"a": 0.5, "b": 0.4, "c": 0.1})},
            r"there is a share for 'c', which is not a domain",
        ),
        (
            {"mixture_config": MixtureConfig(type="doremi", targets={"a": 1.0})},
            r"data\.domains\.b\.target is missing, and data\.update\.type=doremi",
        ),
        ({"train_dataset": {"a": blocks(), "b": blocks(count=0)}}, r"data\.domains\.b has no block to train on"),
        (
            {"mixture_config": MixtureConfig(type="bandit", targets={"a": 1.0, "b": 1.0}), "eval_dataset": blocks()},
            r"data\.update\.type=bandit needs held-out text of every domain",
        ),
        (
            {"mixture_config": MixtureConfig(type="doremi", targets={"a": 1.0, "b": 1.0}), "eval_strategy": "no"},
            r"changes shares at every evaluation, and training\.eval_strategy is no",
        ),
    ],
)
def test_mixture_that_cannot_be_followed_is_refused(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    given, values = {name: blocks(count=4) for name in "ab"}, dict(values)
    with pytest.raises(UserError, match=message):
        SparseTrainer(
            tiny_model("llama"),
            arguments(tmp_path, eval_strategy=values.pop("eval_strategy", "steps"), eval_steps=2),
            sparsity_config=SparsityConfig(mask_interval=2),
            **{"train_dataset": given, "eval_dataset": given, **values},
        )
