"""Every test runs offline, with caches in a temporary folder and one thread."""

import os
import tempfile

_HOME = tempfile.mkdtemp(prefix="ast_sparse_tests_")
os.environ.update(
    HF_HOME=_HOME,
    HF_HUB_OFFLINE="1",
    HF_DATASETS_CACHE=f"{_HOME}/datasets",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
)  # before importing transformers and datasets, which read them once

import gc  # noqa: E402
import shutil  # noqa: E402
from collections.abc import Iterator  # noqa: E402

import pytest  # noqa: E402
import tqdm.auto  # noqa: E402, F401  # which reads its own variables once: the commands set TQDM_DELAY

gc.disable()  # until the tests are imported: they import a lot, and hardly any of it is garbage


def pytest_sessionstart(session: pytest.Session) -> None:
    if session.config.pluginmanager.hasplugin("dsession"):  # it hands out tests, and has no end of a collection
        gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _remove_caches() -> Iterator[None]:
    yield
    shutil.rmtree(_HOME, ignore_errors=True)


def pytest_collection_finish() -> None:
    """Exclude what is imported from garbage collection, which otherwise takes a third of the test time."""
    import torch  # not above: the process of pytest-xdist that only hands out tests does without

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def _leave_out_what_a_module_imported() -> Iterator[None]:
    """Tests import more as they run, and Trainer collects garbage at every run."""
    yield
    gc.collect()
    gc.freeze()
