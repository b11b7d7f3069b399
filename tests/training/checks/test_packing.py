"""Documents of a block are kept apart: student and teacher see each as if it were alone, or the model is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from ast_sparse import DistillationConfig, SparseTrainer, UserError
from ast_sparse.data.blocks.collator import CausalLMCollator
from ast_sparse.data.pack_dataset import pack_dataset
from ast_sparse.training.checks.packing import check_apart
from tests.data.chats import ROWS, tokenizer
from tests.models import FAMILIES, VOCAB, generated_text, tiny_model, tiny_tokenizer
from tests.training.small_runs import arguments

EOS = 0
# documents of several lengths: one of a single token, one cut at the end of its block, one ending with a block
ROWS_OF_TOKENS = [[5, 6, 7, EOS, EOS, 9, 10, 11, EOS, 12, 13, 14], [20, 21, 22, 23, 24, 25, 26, EOS, 27, 28, 29, EOS]]


def documents(row: list[int]) -> list[list[int]]:
    """A block cut after each end."""
    found: list[list[int]] = [[]]
    for token in row:
        found[-1].append(token)
        if token == EOS:
            found.append([])
    return [document for document in found if document]


def batch(rows: list[list[int]] = ROWS_OF_TOKENS) -> dict[str, torch.Tensor]:
    return CausalLMCollator(document_end=EOS)([{"input_ids": row} for row in rows])


def test_positions_and_labels_restart_with_each_document() -> None:
    made = batch()
    for row, positions, labels in zip(ROWS_OF_TOKENS, made["position_ids"], made["labels"], strict=True):
        parts = documents(row)
        assert positions.tolist() == [place for part in parts for place in range(len(part))]
        assert labels.tolist() == [label for part in parts for label in (-100, *part[1:])]
    assert "attention_mask" not in made


def test_a_row_with_positions_keeps_them_next_to_one_without() -> None:
    given = {"input_ids": ROWS_OF_TOKENS[1], "position_ids": [0, 1, 2, 0, 1, 2, 3, 4, 5, 0, 1, 2]}
    made = CausalLMCollator(document_end=EOS)([{"input_ids": ROWS_OF_TOKENS[0]}, given])
    assert made["position_ids"].tolist() == [batch()["position_ids"][0].tolist(), given["position_ids"]]
    assert [place for place, label in enumerate(made["labels"][1].tolist()) if label == -100] == [0, 3, 9]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "opt"])
def test_logits_of_a_packed_block_are_those_of_each_document_alone(family: str, attention: str) -> None:
    model = tiny_model(family).double().eval()
    model.set_attn_implementation(attention)
    made = batch()
    with torch.no_grad():
        packed = model(input_ids=made["input_ids"], position_ids=made["position_ids"], use_cache=False).logits
        for row, logits in zip(ROWS_OF_TOKENS, packed, strict=True):
            alone = [model(input_ids=torch.tensor([part])).logits[0] for part in documents(row)]
            torch.testing.assert_close(logits, torch.cat(alone), rtol=1e-9, atol=1e-12)
    check_apart(model, None, tiny_tokenizer(), arguments(Path("unused")), None)


def trainer(folder: Path, data: Any, packing: str = "documents", **kwargs: Any) -> SparseTrainer:
    kwargs.setdefault("distillation_config", DistillationConfig(alpha=0.6))
    kwargs.setdefault("processing_class", tiny_tokenizer())
    return SparseTrainer(tiny_model(), arguments(folder), train_dataset=data, packing=packing, **kwargs)


def test_the_loss_is_that_of_the_documents_alone_for_student_and_teacher(tmp_path: Path) -> None:
    data = Dataset.from_dict({"input_ids": ROWS_OF_TOKENS})
    run = trainer(tmp_path, data, distillation_config=DistillationConfig(kl_weight=0.6, ce_weight=0.4))
    teacher: Any = run.teacher
    summed, count = 0.0, 0
    student = run.model.double().train()
    with torch.no_grad():
        for part in (part for row in ROWS_OF_TOKENS for part in documents(row)):
            ids = torch.tensor([part])
            ours, theirs = student(ids).logits[0, :-1], teacher.double()(ids).logits[0, :-1]
            log_s, log_t = ours.log_softmax(-1), theirs.log_softmax(-1)
            kl = (log_t.exp() * (log_t - log_s)).sum()
            ce = -log_s.gather(-1, ids[0, 1:, None]).sum()
            summed, count = summed + float(0.6 * kl + 0.4 * ce), count + len(part) - 1
        loss = run.compute_loss(student, run.data_collator(list(data)), num_items_in_batch=count)
    assert float(loss) == pytest.approx(summed / count, rel=1e-6)


def test_ends_of_turns_inside_a_conversation_are_not_borders(tmp_path: Path) -> None:
    blocks = pack_dataset(Dataset.from_dict({"messages": ROWS * 4}), tokenizer(), "text", 16)
    lengths = [len(tokenizer().apply_chat_template(row)["input_ids"]) for row in ROWS] * 4
    stream = [place for length in lengths for place in range(length)]
    for index, row in enumerate(blocks):
        expected, begin = stream[index * 16 : index * 16 + 16], 0
        for at, place in enumerate(expected):
            begin = at if place == 0 else begin
            assert row["position_ids"][at] == at - begin
    assert any(row["input_ids"][:-1].count(EOS) > row["position_ids"].count(0) for row in blocks)
    run = trainer(tmp_path, blocks)
    made = run.data_collator([blocks[0], blocks[1]])
    assert made["position_ids"].tolist() == [blocks[0]["position_ids"], blocks[1]["position_ids"]]


def test_a_run_trains_and_evaluates_with_documents_apart(tmp_path: Path) -> None:
    data = Dataset.from_dict({"text": generated_text(60).split("\n")})
    run = trainer(tmp_path, data, block_size=32, eval_dataset=data)
    seen: list[set[str]] = []
    hook = run.model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    run.train()
    run.evaluate()
    hook.remove()
    assert seen and all({"position_ids", "use_cache"} <= names for names in seen)


class Forgetful(torch.nn.Module):
    """A model that ignores positions."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_model()
        self.config = self.inner.config

    def forward(self, input_ids: torch.Tensor, position_ids: Any = None, use_cache: bool = False) -> Any:
        return self.inner(input_ids=input_ids, use_cache=use_cache)


def test_what_cannot_keep_documents_apart_is_one_line(tmp_path: Path) -> None:
    data = Dataset.from_dict({"input_ids": ROWS_OF_TOKENS})
    with pytest.raises(UserError, match=r"the teacher \(Forgetful, .*does not keep documents apart.*packing: joined"):
        check_apart(tiny_model(), Forgetful(), tiny_tokenizer(), arguments(tmp_path), None)
    # transformers' OPT does not use positions in its attention mask
    with pytest.raises(UserError, match=r"the model \(OPTForCausalLM, attention 'sdpa'\) does not keep.*differ by"):
        SparseTrainer(tiny_model("opt"), arguments(tmp_path), packing="documents", processing_class=tiny_tokenizer())
    flash = tiny_model()
    flash.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match=r"per_device_train_batch_size=4: with attention 'flash_attention_2'.*to 1"):
        check_apart(flash, None, tiny_tokenizer(), arguments(tmp_path), None)
    with pytest.raises(UserError, match=r"packing='documents' needs SparseTrainer's own collator"):
        trainer(tmp_path, data, processing_class=None)
    with pytest.raises(UserError, match=r"needs blocks of one length without padding"):
        CausalLMCollator(pad_token_id=1, document_end=EOS)([{"input_ids": [5, EOS]}, {"input_ids": [VOCAB - 1]}])
