"""Model families whose compressed exports vLLM would not read as they are."""

# Families of `Conv1D`, whose weights are [in, out]: vLLM transposes every tensor called `.weight` of some layers.
CONV1D_MODELS = (
    "clvp", "clvp_decoder", "clvp_encoder", "decision_transformer", "gpt2", "imagegpt", "openai-gpt",
)  # fmt: skip

CONV1D_REASON = "compressed Conv1D layers vLLM would transpose"

# A compressed export has the names of transformers' model in memory, where experts are fused. In these families vLLM
# 0.32 knows only the names of each expert: it stops (KeyError, no such module) or, with lfm2_moe and mimo_v2_flash,
# leaves the experts without values and says nothing.
RENAMED_MODELS = (
    "axk1", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "hy_v3", "lfm2_moe",
    "longcat_flash", "mimo_v2_flash", "minimax_m2", "mixtral",
)  # fmt: skip


def vllm_refusal(model_type: str | None) -> str | None:
    """Why vLLM cannot serve a compressed export of a `model_type`, as the end of "whose ..."; None if it can."""
    if model_type in CONV1D_MODELS:
        return CONV1D_REASON
    if model_type in RENAMED_MODELS:
        return "experts a compressed export stores under names that vLLM does not read"
    return None
