"""Options that several commands share: a device, a JSON file for results; and those that would have no effect."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ast_sparse.errors import UserError

if TYPE_CHECKING:
    import torch


def check_effect(context: click.Context, needs: Mapping[str, tuple[bool, tuple[str, ...]]]) -> None:
    """Refuse options on the command line that would have no effect.

    Args:
        needs: by what options need: whether it is there, and the names of these options.
    """
    for option in context.command.params:
        for need, (is_there, names) in needs.items():
            on_command_line = context.get_parameter_source(str(option.name)) is ParameterSource.COMMANDLINE
            if option.name in names and not is_there and on_command_line:
                value = context.params[option.name]
                shown = ", ".join(value) if isinstance(value, tuple) else value
                raise click.UsageError(
                    f"{option.opts[0]} ({shown}) has no effect without {need}. Add {need} or drop it."
                )


def find_device(name: str) -> torch.device:
    """The device that `--device` names; `auto` is a GPU if there is one."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises AssertionError
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--device {name} cannot be used: {reason:.200}. Use cpu, cuda or cuda:0.") from error
    return device


def check_json_file(path: Path) -> None:
    """Raise UserError unless `--json` names a file that can be written; call it before the long work."""
    if not path.parent.is_dir():
        raise UserError(f"--json {path}: the folder {path.parent} does not exist. Create it first.")
    if path.is_dir():
        raise UserError(f"--json {path} is a folder. Name a file.")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"--json {path}: the folder {path.parent} cannot be written to.")


def write_json_file(path: Path, record: dict[str, Any]) -> None:
    """Write the results of `--json` in one step, so that no half-written file is left.

    Raises:
        UserError: the file cannot be written.
    """
    from ast_sparse.storage.files import write_json

    try:
        write_json(path, record)
    except OSError as error:
        raise UserError(f"--json {path} cannot be written: {error.strerror or error}.") from error
