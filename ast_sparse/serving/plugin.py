"""The entry point of group `vllm.general_plugins`: vLLM calls `register` in every process it starts, or more often."""


def register() -> None:
    """Tell vLLM about the 2:4 formats; the `quant_method` of a checkpoint then selects it."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from ast_sparse.serving.vllm_config import Vllm24Config, Vllm24Int4Config

    for config in (Vllm24Config, Vllm24Int4Config):
        register_quantization_config(config.get_name())(config)
