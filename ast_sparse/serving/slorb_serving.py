"""SLoRB that is served inside the linear layers, for every request: which adapter, and its pairs."""

from collections.abc import Container
from pathlib import Path
from typing import Any

from torch import Tensor

from ast_sparse.errors import UserError, shown
from ast_sparse.export.slorb_hint import SLORB_KEY
from ast_sparse.storage.files import ADAPTER_CONFIG_NAME, ADAPTER_FOLDER


def adapter_folder(setting: Any, model: str) -> Path | None:
    """The folder of the adapter that `ast_sparse_slorb` asks for: true is the one beside the model; None without it.

    Raises:
        UserError: the setting is neither true, false nor a folder with an adapter.
    """
    if setting is None or setting is False:
        return None
    if setting is not True and not isinstance(setting, str):
        raise UserError(f"{SLORB_KEY}={shown(setting)} must be true, or the folder of a SLoRB adapter.")
    folder = Path(model) / ADAPTER_FOLDER if setting is True else Path(setting)
    if not (folder / ADAPTER_CONFIG_NAME).is_file():
        raise UserError(f"{SLORB_KEY}={shown(setting)}: `{folder}` holds no SLoRB adapter. Name its folder.")
    return folder


class SlorbFiles:
    """The pairs S `[out, r]` and X `[r, in]` of an adapter folder, checked once and read layer by layer.

    Args:
        folder: of the adapter.
        compressed: the layers that the plug-in runs.

    Attributes:
        ranks: r by layer.

    Raises:
        UserError: the folder holds no intact SLoRB adapter, or one for other layers.
    """

    def __init__(self, folder: Path, compressed: Container[str]) -> None:
        from ast_sparse.storage.slorb_adapter import read_adapter  # imports transformers' models

        self.folder = folder
        self.ranks = {name: x.shape[0] for name, (_, x) in read_adapter(folder).items()}
        if other := next((name for name in self.ranks if name not in compressed), None):
            raise UserError(
                f"`{folder}` has SLoRB for `{other}`, which is not compressed. Drop {SLORB_KEY}, and serve the adapter "
                "as a LoRA if its rank allows."
            )

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """S and X of a layer, by the checkpoint's name."""
        from ast_sparse.storage.slorb_adapter import read_pair

        return read_pair(self.folder, name)


def input_slice(x: Tensor, width: int, rank: int) -> Tensor:
    """The columns of X that meet the inputs of one tensor-parallel rank: `S Σ Xᵣxᵣ = Σ S Xᵣxᵣ`.

    Args:
        x: `[r, in]`; width: inputs of each rank, `in` if they are not split; rank: its number.
    """
    return x if width == x.shape[1] else x.narrow(1, rank * width, width)
