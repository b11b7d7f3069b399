"""Faults that a user can make, and the line each must end in."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from ast_sparse.errors import UserError


def ends_in_a_line(
    fault: Callable[[Path, pytest.MonkeyPatch], None], message: str, folder: Path, patch: pytest.MonkeyPatch
) -> None:
    """Make the fault; it must raise UserError, one line that matches the message."""
    with pytest.raises(UserError) as raised:
        fault(folder, patch)
    patch.undo()
    assert re.search(message, str(raised.value)), str(raised.value)
    assert "\n" not in str(raised.value)
