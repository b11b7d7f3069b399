"""Any file given as a configuration becomes a RunConfig that reads back as itself, or one line."""

import random
from pathlib import Path

from ast_sparse.config import RunConfig, load_config
from ast_sparse.config.yaml12 import dump_yaml
from ast_sparse.errors import UserError
from tests.fuzz.mutate import mutate_config, share

TEXTS = [path.read_text() for path in sorted(Path("configs").glob("*.yaml"))]
LONGEST_MESSAGE = 2000


def test_any_configuration_file_loads_and_reads_back_or_is_refused_in_one_line(tmp_path: Path) -> None:
    path, again = tmp_path / "run.yaml", tmp_path / "again.yaml"
    loaded = refused = 0
    for seed in share(1 / 2):
        path.write_bytes(mutate_config(random.Random(seed), TEXTS))
        try:
            config = load_config(path)
        except UserError as error:
            text = str(error)
            assert text.isprintable() and len(text) <= LONGEST_MESSAGE + len(str(path)), f"seed {seed}: {text[:500]}"
            refused += 1
            continue
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {str(error)[:300]}") from error
        assert isinstance(config, RunConfig)
        again.write_text(dump_yaml(config.to_dict()), encoding="utf-8")
        assert load_config(again) == config, f"seed {seed}"
        loaded += 1
    assert loaded and refused  # neither half of the question went unasked
