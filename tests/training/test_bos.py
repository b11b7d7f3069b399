"""Runs of ast-train with a tokenizer that has BOS, and with a teacher that has a different vocabulary."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from datasets import Dataset
from tokenizers.normalizers import Lowercase

from ast_sparse.cli.train import main
from ast_sparse.config import CalibrationConfig, DistillationConfig, SparsityConfig
from ast_sparse.evaluation.perplexity import perplexity
from ast_sparse.storage.load import load_causal_lm
from ast_sparse.training.start import models as models_module
from tests.data.bos_models import BOS, EOS, bos_tokenizer, expected_blocks, save_bos_model
from tests.data.documents import documents
from tests.models import generated_text, save_tiny_model, tiny_model, tiny_tokenizer
from tests.training.small_runs import padded, trainer


def train(root: Path, *options: str, **sections: Any) -> Result:
    tree: dict[str, Any] = {
        "model": {"name_or_path": str(root / "model"), **sections.pop("model", {})},
        "data": {
            "root": str(root), "train": "a.jsonl", "eval_share": 0.1, "block_size": 16, **sections.pop("data", {}),
        },
        "training": {
            "max_steps": 2, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True,
            "save_strategy": "no", "disable_tqdm": True,
        },
        "evaluation": {"datasets": ["heldout", "other.txt"], "seq_len": 16, "prompts": []},
        **sections,
    }  # fmt: skip
    (root / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(80)))
    (root / "other.txt").write_text(generated_text(20, seed=3))
    (root / "run.yaml").write_text(yaml.safe_dump(tree))
    return CliRunner().invoke(main, ["--config", str(root / "run.yaml"), "--output-dir", str(root / "out"), *options])


@pytest.mark.parametrize("bos", ["auto", "none", "document", "block"])
def test_a_run_says_what_bos_does_and_measures_with_it(tmp_path: Path, bos: str) -> None:
    save_bos_model(tmp_path / "model")
    init = {"init": "wanda", "mask_interval": 2}
    calibration = {"data": ["a.jsonl"], "samples": 2, "seq_len": 12}
    result = train(tmp_path, data={"bos": bos}, sparsity=init, calibration=calibration)
    assert result.exit_code == 0, result.output
    where = {"none": "BOS: none;", "block": "BOS: <s> before each block"}.get(bos, "BOS: <s> before each document")
    assert where in result.stdout
    assert (f"(data.bos={bos})" in result.stdout) == (bos != "block")  # windows of other.txt lack it
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    dense = next(iter(rows.values())) if "dense" not in rows else rows["dense"]
    expected = perplexity(tiny_model(), bos_tokenizer(), generated_text(20, seed=3), 16, bos=bos)
    assert dense["other.txt"]["perplexity"] == pytest.approx(expected, rel=1e-6)


def test_bos_that_the_tokenizer_lacks_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model")
    result = train(tmp_path, data={"bos": "document"})
    assert result.exit_code == 2 and not (tmp_path / "out").exists()
    assert "data.bos='document': the tokenizer of" in result.stderr
    assert "data.bos='start'" in train(tmp_path, data={"bos": "start"}).stderr


@pytest.mark.parametrize("packing", ["joined", "documents"])
@pytest.mark.parametrize("bos", ["auto", "none", "block"])
def test_raw_text_of_a_notebook_gets_bos(tmp_path: Path, bos: str, packing: Any) -> None:
    texts = documents(60)
    run = trainer(
        tmp_path,
        tiny_model(),
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=bos_tokenizer(),
        block_size=16,
        bos=bos,
        packing=packing,
        args={"max_steps": 1},
    )
    expected = expected_blocks(texts, 16, "document" if bos == "auto" else bos)
    assert [row["input_ids"] for row in run.train_dataset] == expected
    batch = run.data_collator([run.train_dataset[0]])
    assert batch["input_ids"][0].tolist() == expected[0]
    if packing == "documents":
        begins = [at for at in range(16) if not at or expected[0][at - 1] == EOS]
        assert (batch["position_ids"][0] == 0).nonzero().flatten().tolist() == begins
    run.train()


def test_windows_of_training_text_are_calibrated_on_with_their_bos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    keep = models_module.sparsify_model

    def sparsify(*args: Any, **options: Any) -> Any:
        seen.append(options["samples"])
        return keep(*args, **options)

    monkeypatch.setattr(models_module, "sparsify_model", sparsify)
    trainer(
        tmp_path,
        tiny_model(),
        SparsityConfig(init="wanda"),
        train_dataset=Dataset.from_dict({"text": documents(60)}),
        processing_class=bos_tokenizer(),
        block_size=16,
        bos="window",
        calibration_config=CalibrationConfig(samples=4, seq_len=12),
    )
    assert seen[0].shape == (4, 12) and (seen[0] == BOS).sum(dim=1).tolist() == [1] * 4 and (seen[0][:, 0] == BOS).all()


def test_a_teacher_folder_with_a_padded_vocabulary_teaches(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model")
    padded(tiny_model(seed=1), 160).save_pretrained(tmp_path / "teacher")
    sections = {"model": {"teacher": str(tmp_path / "teacher")}, "distillation": {"alpha": 0.5}}
    without = train(tmp_path, "--dry-run", **copy.deepcopy(sections))
    assert without.exit_code == 2 and "the teacher has no tokenizer to compare" in without.stderr
    tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    assert train(tmp_path, "--dry-run", **copy.deepcopy(sections)).exit_code == 0
    result = train(tmp_path, **copy.deepcopy(sections))
    assert result.exit_code == 0, result.output
    assert load_causal_lm(tmp_path / "out").config.vocab_size == 128


def test_a_teacher_folder_with_another_tokenizer_is_refused_and_one_without_is_said(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model")
    tiny_model(seed=1).save_pretrained(tmp_path / "teacher")
    sections = {"model": {"teacher": str(tmp_path / "teacher")}, "distillation": {"alpha": 0.5}}
    bare = train(tmp_path, "--dry-run", **copy.deepcopy(sections))
    assert bare.exit_code == 0 and "the teacher has no tokenizer to compare; its tokens are assumed" in bare.stdout
    other = copy.deepcopy(tiny_tokenizer())
    other.backend_tokenizer.normalizer = Lowercase()
    other.save_pretrained(tmp_path / "teacher")
    for options in (("--dry-run",), ()):
        result = train(tmp_path, *options, **copy.deepcopy(sections))
        assert result.exit_code == 2 and not (tmp_path / "out").exists()
        assert f"model.teacher '{tmp_path / 'teacher'}' has another tokenizer: it makes" in result.stderr
    unused = train(tmp_path, "--dry-run", model=sections["model"], distillation={"alpha": 0.0})
    assert unused.exit_code == 0


def test_added_tokens_that_the_teacher_lacks_are_refused_if_the_text_has_them(tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.add_tokens([f"<spare{i}>" for i in range(128 - len(tokenizer))] + ["<tool>"])
    padded(tiny_model(), len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    save_tiny_model(tmp_path / "teacher", seed=1)
    sections = {"model": {"teacher": str(tmp_path / "teacher")}, "distillation": {"alpha": 0.5}}
    assert train(tmp_path, **copy.deepcopy(sections)).exit_code == 0
    (tmp_path / "tools.txt").write_text("two <tool> of " + generated_text(60))
    data = {"train": "tools.txt", "bos": "none"}
    result = train(tmp_path, "--overwrite", data=data, **copy.deepcopy(sections))
    assert result.exit_code == 2 and "The training text has the token 128, and model.teacher" in result.stderr


def test_a_chat_teacher_that_renames_reserved_tokens_teaches_text_without_them(tmp_path: Path) -> None:
    for folder, name in (("model", "<reserved>"), ("teacher", "<call>")):
        tokenizer = copy.deepcopy(tiny_tokenizer())
        tokenizer.add_special_tokens({"additional_special_tokens": [name]})
        tiny_model(seed=int(folder == "teacher")).save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
    sections = {"model": {"teacher": str(tmp_path / "teacher")}, "distillation": {"alpha": 0.5}}
    plan = train(tmp_path, "--dry-run", **copy.deepcopy(sections))
    assert plan.exit_code == 0 and "other names for 1 added tokens; the first is 82: '<call>' there" in plan.stdout
    assert train(tmp_path, **copy.deepcopy(sections)).exit_code == 0
    (tmp_path / "tools.txt").write_text("two <reserved> of four " * 100)
    result = train(tmp_path, "--overwrite", data={"train": "tools.txt", "bos": "none"}, **copy.deepcopy(sections))
    assert result.exit_code == 2, result.output
    assert "The text has the token 82, which is '<reserved>' to the student and '<call>' to model.teac" in result.stderr


def test_two_teachers_with_one_tokenizer_train_the_same_with_and_without_padding(tmp_path: Path) -> None:
    """Rows that never win change nothing: the logits of the padding are far below all others."""
    losses = []
    for rows in (128, 160):
        teacher = tiny_model(seed=1)
        teacher.resize_token_embeddings(rows, mean_resizing=False)
        teacher.save_pretrained(tmp_path / str(rows))
        tiny_tokenizer().save_pretrained(tmp_path / str(rows))
        config = DistillationConfig(alpha=1.0)
        run = trainer(
            tmp_path / f"run{rows}",
            teacher_model=str(tmp_path / str(rows)),
            distillation_config=config,
            processing_class=tiny_tokenizer(),
            args={"max_steps": 3},
        )
        run.train()
        losses.append([log["loss"] for log in run.state.log_history if "loss" in log])
    assert losses[0] == losses[1]
