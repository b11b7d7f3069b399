from pathlib import Path

import pytest

from tests.cli.refused_runs import make_inputs


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that refused runs read; they do not change it."""
    return make_inputs(tmp_path_factory.mktemp("inputs"))
