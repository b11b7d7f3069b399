"""One fault in a folder of token shards: `verify` says so in one line, or the tokens are what they were."""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from ast_sparse.data.tokens.prepare import prepare_shards
from ast_sparse.data.tokens.shards import MANIFEST, open_documents, open_tokens, read_manifest, verify_shards
from ast_sparse.errors import UserError
from tests.data.folders import lines, settings
from tests.fuzz.mutate import mutate_bytes, mutate_json, share
from tests.models import generated_text, tiny_tokenizer


def held(folder: Path) -> list[np.ndarray]:
    """Tokens, ends and hashes of every shard."""
    manifest = read_manifest(folder)
    found = [open_tokens(folder, manifest, shard) for shard in manifest.shards]
    return found + [part for shard in manifest.shards for part in open_documents(folder, shard)]


def damage(rng: random.Random, folder: Path) -> str:
    if rng.random() < 0.5:
        return mutate_json(rng, folder / MANIFEST)
    file = rng.choice(sorted(path for path in folder.iterdir() if path.name != MANIFEST))
    if rng.random() < 0.1:
        file.unlink()
        return f"{file.name}: gone"
    file.write_bytes(mutate_bytes(rng, file.read_bytes()))
    return f"{file.name}: bytes"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    rows = [{"text": generated_text(6, seed=seed)} for seed in range(6)]
    (root / "a.jsonl").write_bytes(lines(*rows))
    prepare_shards(root / "out", settings(root, "a.jsonl"), tiny_tokenizer())
    return root / "out"


def test_damaged_shards_are_refused_in_one_line_or_hold_what_they_held(whole: Path, tmp_path: Path) -> None:
    expected, outcomes = held(whole), set()
    for seed in share(0.1):
        rng, folder = random.Random(seed), tmp_path / str(seed)
        shutil.copytree(whole, folder)
        done = damage(rng, folder)
        try:
            verify_shards(folder)
        except UserError as error:
            assert str(error).isprintable() and len(str(error)) <= 2000, f"seed {seed}: {done}: {str(error)[:500]}"
            outcomes.add("refused")
        else:
            found = held(folder)
            assert len(found) == len(expected), f"seed {seed}: {done}"
            assert all(map(np.array_equal, found, expected)), f"seed {seed}: {done}"
            outcomes.add("loaded")
        shutil.rmtree(folder)
    assert outcomes == {"refused", "loaded"}
