"""What a card, in a folder or the hub's cache, or a `.gguf` file says about a model: its licence and languages."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

README = "README.md"
EXPORT_MARK = "<!-- Written by ast_sparse when it exported this model. -->"


def card_metadata(path: Path) -> dict[str, Any]:
    """The YAML at the top of a card; empty if there is no such file, no YAML in it, or it is damaged."""
    try:
        found = metadata_load(path) if path.is_file() else None
    except Exception:  # the card of a model is never a reason to fail
        return {}
    return found if isinstance(found, dict) else {}


def is_export_card(path: Path) -> bool:
    """Whether a file is the card that an export wrote."""
    return path.is_file() and EXPORT_MARK.encode() in path.read_bytes()


def base_metadata(name: str, commit: str | None) -> dict[str, Any]:
    """What is known about a model without the network: from its folder, the hub's cache, or a `.gguf` file.

    Args:
        name: folder, `.gguf` file or hub id.
        commit: of a model on the hub.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return card_metadata(path / README) or _gguf_metadata(next(iter(sorted(path.glob("*.gguf"))), path))
    if path.is_file():
        return _gguf_metadata(path)
    try:
        cached = try_to_load_from_cache(name, README, revision=commit)
    except HFValidationError:  # a path that no longer exists
        return {}
    return card_metadata(Path(cached)) if isinstance(cached, str) else {}


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a hub id; a folder may have it too."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _gguf_metadata(path: Path) -> dict[str, Any]:
    if path.suffix != ".gguf" or find_spec("gguf") is None:
        return {}
    from gguf import GGUFReader

    try:
        fields = GGUFReader(path).fields
        names = {"license": "general.license", "language": "general.languages"}
        return {key: fields[name].contents() for key, name in names.items() if name in fields}
    except Exception:  # as in `card_metadata`
        return {}
