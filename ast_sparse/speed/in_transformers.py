"""Generation in transformers, one step at a time."""

import inspect
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ast_sparse.errors import UserError
from ast_sparse.export.quantizer import AstSparse24Config
from ast_sparse.peak import peak_bytes, reset_peak
from ast_sparse.speed.cases import Case
from ast_sparse.storage import files
from ast_sparse.storage.load import load_causal_lm
from ast_sparse.storage.locate import Place, named_errors, quiet_transformers
from ast_sparse.storage.sparsity_record import has_adapter


class TransformersEngine:
    """A model of transformers that continues prompts greedily, with its usual growing cache and without `generate`.

    Args:
        folder: the model.
        dtype: its dtype, by name.
        device: where it runs.
        compressed: keep the layers of a compressed export compressed.
        vocabulary: prompts use token ids below this number.
    """

    def __init__(self, folder: Path, dtype: str, device: str, compressed: bool, vocabulary: int) -> None:
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is not None:
            torch.cuda.set_device(self.device)  # whose memory and name are asked for without naming it
        self.vocabulary = vocabulary
        load: Any = _load_compressed if compressed else load_causal_lm
        self.model = load(folder, dtype=getattr(torch, dtype)).to(self.device).eval()
        parameters = inspect.signature(self.model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self._cache: Any = None
        self._tokens: list[Tensor] = []

    @torch.inference_mode()
    def begin(self, case: Case) -> float:
        """Compute the prompts and the first new tokens; returns the seconds it took."""
        reset_peak()
        self._cache, self._tokens = None, []
        ids = case.prompts(self.vocabulary).to(self.device)
        return self._timed(ids, 1)

    @torch.inference_mode()
    def advance(self, steps: int) -> float:
        """Compute `steps` more tokens of each prompt; returns the seconds it took."""
        return self._timed(self._tokens[-1], steps)

    def finish(self) -> dict[str, Any]:
        """The new tokens of each prompt and the peak memory, in bytes; the cache is freed."""
        tokens = torch.cat(self._tokens, dim=1).tolist()
        self._cache, self._tokens = None, []
        return {"tokens": tokens, "peak": peak_bytes()}

    def _timed(self, ids: Tensor, steps: int) -> float:
        self._wait()
        start = time.perf_counter()
        for _ in range(steps):
            ids = self._step(ids)
        self._wait()
        return time.perf_counter() - start

    def _step(self, ids: Tensor) -> Tensor:
        output = self.model(input_ids=ids, past_key_values=self._cache, use_cache=True, **self._last_only)
        self._cache = output.get("past_key_values")
        if self._cache is None:
            raise UserError(f"{type(self.model).__name__} keeps no cache of keys and values, which ast-bench needs.")
        self._tokens.append(output.logits[:, -1].argmax(-1, keepdim=True))
        return self._tokens[-1]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _load_compressed(folder: Path, *, dtype: torch.dtype) -> Any:
    """A compressed export whose layers stay compressed, with its SLoRB adapter if it has one."""
    with named_errors("model", Place.find(folder, None)), quiet_transformers():
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, quantization_config=AstSparse24Config(dequantize=False)
        )
        if has_adapter(folder):
            model.load_adapter(str(folder / files.ADAPTER_FOLDER))
    return model
