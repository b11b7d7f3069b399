"""What vLLM asks about a 2:4 checkpoint: which layers are compressed, and what runs them."""

from typing import Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from ast_sparse.errors import UserError
from ast_sparse.export.codec24 import CODE24
from ast_sparse.export.codec24_int4 import CODE24_INT4
from ast_sparse.export.slorb_hint import SLORB_KEY
from ast_sparse.serving.checkpoint_checks import check_family, check_weights, compressed_layers
from ast_sparse.serving.layer_names import LayerNames
from ast_sparse.serving.slorb_serving import SlorbFiles, adapter_folder

_DRAFT = "draft_model."  # before the names of all layers of the small model that guesses tokens ahead


class Vllm24Config(QuantizationConfig):
    """The `quantization_config` of a checkpoint, as vLLM's loader uses it.

    Args:
        modules: names of the compressed layers.

    Attributes:
        codec: what they are stored with.

    Raises:
        UserError: there are no names. vLLM gives none if config.json has no `quantization_config`.
    """

    codec = CODE24

    def __init__(self, modules: list[str] | None = None) -> None:
        if modules is None:
            raise UserError(
                f"quantization={self.get_name()} is for compressed exports, and this model is not one: its config.json "
                "has no quantization_config. Drop it: a compressed export is recognised without it."
            )
        super().__init__()
        self.modules = frozenset(modules)
        self.names = LayerNames(modules)
        self.slorb: SlorbFiles | None = None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Vllm24Config":
        return cls(compressed_layers(config))

    @classmethod
    def get_name(cls) -> str:
        return cls.codec.method

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # config.json has everything

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Check the files before any process is started, and find the SLoRB adapter if config.json asks for it."""
        check_family(getattr(hf_config, "model_type", None), model_name)
        check_weights(model_name)
        folder = adapter_folder(getattr(hf_config, SLORB_KEY, None), model_name)
        self.slorb = None if folder is None else SlorbFiles(folder, self.modules)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """vLLM names some modules differently from transformers."""
        self.names.rename(hf_to_vllm_mapper.apply_list)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """What runs a layer; None leaves it to vLLM (embeddings, attention, head, experts)."""
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

        from ast_sparse.serving.vllm_linear import Vllm24LinearMethod  # imported when vLLM builds a model

        if not isinstance(layer, LinearBase):
            return None
        parts = self.names.parts(prefix.removeprefix(_DRAFT), self.packed_modules_mapping)
        return Vllm24LinearMethod(self, parts) if parts else UnquantizedLinearMethod()

    def get_checkpoint_weight_mapper(self) -> Any:  # static in vLLM, which asks each instance
        """vLLM asks for it when the model is complete, and before it reads the weights."""
        self.check_all_built()
        return super().get_checkpoint_weight_mapper()

    def check_all_built(self) -> None:
        """Raise UserError if vLLM's model has no layer for what the checkpoint holds."""
        from vllm.distributed import get_pp_group

        if get_pp_group().world_size == 1:  # otherwise each process has a part of the layers
            self.names.check_all_built()


class Vllm24Int4Config(Vllm24Config):
    """The same for values of 4 bits."""

    codec = CODE24_INT4
