"""Fingerprints follow tokens and weights, not files or types."""

from pathlib import Path

import torch
from datasets import Dataset

from ast_sparse.training.resume.fingerprints import blocks_fingerprint, config_values, weights_fingerprint
from tests.models import tiny_model
from tests.training.small_runs import blocks


def test_a_fingerprint_follows_tokens_not_files_or_types(tmp_path: Path) -> None:
    rows = blocks().to_list()
    blocks().save_to_disk(str(tmp_path / "saved"))
    same = [
        blocks(), Dataset.load_from_disk(str(tmp_path / "saved")), Dataset.from_list(rows),
        blocks().map(lambda row: row, load_from_cache_file=False),
    ]  # fmt: skip
    assert len({blocks_fingerprint(part) for part in same}) == 1
    others = [
        blocks(seed=1), blocks().select(range(31)), blocks().shuffle(seed=3),
        blocks().add_column("labels", [[1] * 16] * 32),
        blocks(count=16, size=32),
    ]  # fmt: skip
    assert blocks_fingerprint(blocks()) not in {blocks_fingerprint(part) for part in others}
    changed = [dict(row) for row in rows]
    changed[30]["input_ids"] = [*rows[30]["input_ids"][:-1], 99]
    assert blocks_fingerprint(rows) != blocks_fingerprint(changed)
    assert blocks_fingerprint(iter(rows)) is None


def test_a_fingerprint_of_weights_sees_one_entry_and_their_order() -> None:
    model = torch.nn.Linear(512, 512)
    before = weights_fingerprint(model)
    assert weights_fingerprint(model) == before
    with torch.no_grad():
        model.weight[5, 77] += 1e-6
        changed = weights_fingerprint(model)
        model.weight[5, 77] -= 1e-6
        model.weight.copy_(model.weight.flip(0))
    assert len({before, changed, weights_fingerprint(model)}) == 3


def test_values_of_a_configuration_do_not_depend_on_the_attention_implementation() -> None:
    model = tiny_model("llama")
    before = config_values(model.config)
    model.set_attn_implementation("eager")  # as a teacher whose attention maps are compared asks for
    assert config_values(model.config) == before
