"""How vLLM serves the SLoRB adapter of an export: by its LoRA where it allows the rank, otherwise in the layers."""

import shlex
from pathlib import Path

from ast_sparse.storage.files import ADAPTER_CONFIG_NAME, ADAPTER_FOLDER, read_json

SLORB_KEY = "ast_sparse_slorb"  # of config.json or `--hf-overrides`; `serving/` reads it
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # `--max-lora-rank` of vLLM 0.32


def vllm_options(rank: int, folder: Path | str, compressed: bool) -> str | None:
    """The options of `vllm serve` for an export with SLoRB; None if there is no way.

    Args:
        rank: the highest of its adapter.
        folder: of the export.
        compressed: whether its format is one that the plug-in for vLLM reads.
    """
    allowed = next((each for each in VLLM_RANKS if each >= rank), None)
    if allowed is not None:
        module = shlex.quote(f"slorb={Path(folder) / ADAPTER_FOLDER}")
        return f"--enable-lora --max-lora-rank {allowed} --lora-modules {module}"
    return f"--hf-overrides '{{\"{SLORB_KEY}\": true}}'" if compressed else None


def serving_hint(export: Path, compressed: bool) -> str | None:
    """One line: how vLLM serves the SLoRB adapter of an export; None if it has none, or one
    for `Conv1D`, which vLLM does not serve.

    Args:
        export: its folder.
        compressed: as in `vllm_options`.
    """
    config = export / ADAPTER_FOLDER / ADAPTER_CONFIG_NAME
    if not config.is_file():
        return None
    adapter = read_json(config)
    if adapter.get("fan_in_fan_out"):
        return None
    rank = adapter["r"]
    options = vllm_options(rank, export, compressed)
    above = f", more than the {VLLM_RANKS[-1]} of vLLM's LoRA" if rank > VLLM_RANKS[-1] else ""
    if options is None:
        return f"SLoRB has rank {rank}{above}; export with --format compressed to serve it."
    return f"SLoRB has rank {rank}{above}; in vLLM: {options}"
