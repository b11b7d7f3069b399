"""Which teachers fit a student, and what their vocabularies must share."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainingArguments

from ast_sparse import DistillationConfig, SparseTrainer, UserError
from ast_sparse.storage.load import load_causal_lm
from tests.models import VOCAB, tiny_config, tiny_model, tiny_tokenizer
from tests.training.small_runs import arguments, blocks, padded, trainer


def test_a_given_teacher_is_not_cast_in_place(tmp_path: Path) -> None:
    teacher = tiny_model("llama", seed=5)
    trainer(tmp_path, teacher_model=teacher, args=dict(bf16=True))
    assert teacher.dtype == torch.float32


def test_a_teacher_with_another_vocabulary_is_refused(tmp_path: Path) -> None:
    config = tiny_config("llama")
    config.vocab_size = 64
    with pytest.raises(UserError, match="vocabulary of 64 tokens, the student 128"):
        trainer(tmp_path, teacher_model=AutoModelForCausalLM.from_config(config))


def test_another_teacher_is_used(tmp_path: Path) -> None:
    teacher = tiny_model("llama", seed=5)
    run = trainer(tmp_path, teacher_model=teacher)
    assert run.teacher is teacher
    run.train()


@pytest.mark.parametrize("kind", ["kl", "reverse_kl", "squarehead"])
@pytest.mark.parametrize("rows", [(VOCAB, 160), (160, VOCAB)])
def test_padding_of_either_vocabulary_leaves_the_divergence_over_the_rows_both_have(
    tmp_path: Path, kind: Any, rows: tuple[int, int]
) -> None:
    student, teacher = (padded(tiny_model("llama", seed), size) for seed, size in enumerate(rows))
    for name, model in (("student", student), ("teacher", teacher)):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    config = DistillationConfig(kind=kind, alpha=0.5, temperature=2.0, hidden_weight=0.0)
    run = trainer(
        tmp_path / "run",
        load_causal_lm(str(tmp_path / "student")),
        teacher_model=str(tmp_path / "teacher"),
        processing_class=tiny_tokenizer(),
        distillation_config=config,
    )
    ids = torch.randint(0, 80, (2, 16))
    run.model.double().train()
    run.teacher.double()
    loss = run.compute_loss(run.model, {"input_ids": ids, "labels": ids})
    run.model.zero_grad()
    loss.backward()
    weight = run.model.lm_head.weight
    ours, theirs = run.model(ids).logits[:, :-1], run.teacher(ids).logits[:, :-1]
    log_s, log_t = ((logits[..., :VOCAB] / 2).log_softmax(-1) for logits in (ours, theirs))
    first, second = (log_s, log_t) if kind == "reverse_kl" else (log_t, log_s)
    kl = 4 * (first.exp() * (first - second)).sum(-1).mean()
    ce = torch.nn.functional.cross_entropy(ours.flatten(0, 1), ids[:, 1:].flatten())
    expected = 0.5 * ce + 0.5 * kl
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(weight.grad, torch.autograd.grad(expected, weight)[0], rtol=1e-9, atol=1e-12)


def test_a_teacher_with_another_tokenizer_of_the_same_size_is_refused(tmp_path: Path) -> None:
    teacher = tiny_model("llama", seed=1)
    teacher.save_pretrained(tmp_path / "teacher")
    state = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    ids = state["model"]["vocab"]
    state["model"]["vocab"] = {token: (0, *range(len(ids) - 1, 0, -1))[index] for token, index in ids.items()}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<|end|>"
    ).save_pretrained(tmp_path / "teacher")
    name = str(tmp_path / "teacher")
    for given in (name, load_causal_lm(name)):
        with pytest.raises(UserError, match=f"model.teacher '{name}' has another tokenizer: token 1 is"):
            trainer(tmp_path, teacher_model=given, processing_class=tiny_tokenizer())
    tiny_model("llama").save_pretrained(tmp_path / "student")
    tiny_tokenizer().save_pretrained(tmp_path / "student")
    with pytest.raises(UserError, match="has another tokenizer"):  # the one stored with the student's weights
        trainer(tmp_path, load_causal_lm(str(tmp_path / "student")), teacher_model=name)


def taught_by_less(tmp_path: Path, kind: type[SparseTrainer] = SparseTrainer, rows: Any = None) -> SparseTrainer:
    """A run whose teacher lacks the tokens from `VOCAB` on."""
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.add_tokens(["<tool>"] + [f"<spare{i}>" for i in range(VOCAB - len(tokenizer))])
    student = padded(tiny_model("llama"), len(tokenizer))
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "teacher")
    tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    return kind(
        student,
        arguments(tmp_path),
        distillation_config=DistillationConfig(),
        teacher_model=str(tmp_path / "teacher"),
        processing_class=tokenizer,
        train_dataset=blocks() if rows is None else rows,
    )


REFUSED = f"has the token {VOCAB}, and model.teacher .*/teacher' has {VOCAB} embeddings"


def test_text_with_tokens_that_the_teacher_lacks_is_refused(tmp_path: Path) -> None:
    run = taught_by_less(tmp_path)
    make_batch = run.get_train_dataloader().collate_fn
    run.compute_loss(run.model, make_batch([{"input_ids": [1, 2, 3, VOCAB - 1]}]))
    refused = make_batch([{"input_ids": [2, 3, 4, VOCAB]}])  # it may be read ahead by a run that ends before it
    with pytest.raises(UserError, match=REFUSED):
        run.compute_loss(run.model, refused)


def test_batches_that_one_process_makes_for_all_are_refused_when_they_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = Dataset.from_dict({"input_ids": [[1, 2, 3, 4]] * 8}).to_iterable_dataset()
    run = taught_by_less(tmp_path, rows=rows)
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: 2))
    make_batch = run.get_train_dataloader().collate_fn
    with pytest.raises(UserError, match=REFUSED):  # joined with the batch of another process, it would lose its text
        make_batch([{"input_ids": [2, 3, 4, VOCAB]}])


def test_batches_of_another_loader_are_checked_too(tmp_path: Path) -> None:
    class OwnLoader(SparseTrainer):
        def get_train_dataloader(self) -> DataLoader[Any]:
            rows: Any = [{"input_ids": [2, 3, 4, VOCAB]}] * 4
            return DataLoader(rows, collate_fn=self.data_collator)

    with pytest.raises(UserError, match=REFUSED):
        taught_by_less(tmp_path, OwnLoader).train()
