"""What the reader of `.metadata` builds, and what it refuses."""

import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from ast_sparse.storage.sharded import _MetadataReader

CONTIGUOUS = _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT


class Pickled:
    """Pickled as a call."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def read(value: Any) -> Any:
    return _MetadataReader(io.BytesIO(pickle.dumps(value))).load()


def test_members_of_enumerations_are_read_as_every_release_of_python_writes_them() -> None:
    assert read(CONTIGUOUS) is CONTIGUOUS
    assert read(Pickled(_MEM_FORMAT_ENCODING, CONTIGUOUS.value)) is CONTIGUOUS
    assert read(Pickled(getattr, _MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT")) is CONTIGUOUS  # Python 3.11.2


@pytest.mark.parametrize("name", ["__class__", "__init__", "mro"])
def test_getattr_reads_nothing_but_members(name: str) -> None:
    with pytest.raises(KeyError):
        read(Pickled(getattr, _MEM_FORMAT_ENCODING, name))
    with pytest.raises(pickle.UnpicklingError, match="is not part of a description of tensors"):
        read(Pickled(getattr, "text", name))
