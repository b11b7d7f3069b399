from pathlib import Path

import pytest

from tests.speed.sides import write_exports


@pytest.fixture(scope="package")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed and a dense export of one model, which no test changes."""
    return write_exports(tmp_path_factory.mktemp("exports"))
