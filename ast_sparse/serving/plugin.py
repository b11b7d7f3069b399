"""The entry point of group `vllm.general_plugins`: vLLM calls `register` in every process it starts, or more often."""


def register() -> None:
    """Tell vLLM about the 2:4 format; the `quant_method` of a checkpoint then selects it."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from ast_sparse.export.codec24 import CODE24
    from ast_sparse.serving.vllm_config import Vllm24Config

    register_quantization_config(CODE24.method)(Vllm24Config)
