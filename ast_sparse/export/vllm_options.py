"""Options by which vLLM serves the SLoRB of an export: as a LoRA, or above its ranks inside the layers."""

import shlex

SLORB_KEY = "ast_sparse_slorb"
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # `--max-lora-rank` of vLLM 0.32


def slorb_options(rank: int, adapter: str, compressed: bool) -> str | None:
    """Options of `vllm serve`; None if it cannot serve the adapter beside this export.

    Args:
        rank: the largest of the adapter.
        adapter: its folder.
        compressed: whether the export has a format that the plug-in reads.
    """
    allowed = next((each for each in VLLM_RANKS if each >= rank), None)
    if allowed is not None:
        return f"--enable-lora --max-lora-rank {allowed} --lora-modules {shlex.quote(f'slorb={adapter}')}"
    return f"--hf-overrides '{{\"{SLORB_KEY}\": true}}'" if compressed else None
