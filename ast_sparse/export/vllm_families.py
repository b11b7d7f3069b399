"""Model families whose compressed exports vLLM would not read as they are."""

# Families of `Conv1D`, whose weights are [in, out]: vLLM transposes every tensor called `.weight` of some layers.
CONV1D_MODELS = (
    "clvp", "clvp_decoder", "clvp_encoder", "decision_transformer", "gpt2", "imagegpt", "openai-gpt",
)  # fmt: skip

CONV1D_REASON = "compressed Conv1D layers vLLM would transpose"

# A compressed export has the names of transformers' model in memory; in these families vLLM knows only the older ones.
RENAMED_MODELS = ("mixtral",)


def vllm_refusal(model_type: str | None) -> str | None:
    """Why vLLM cannot serve a compressed export of a `model_type`, as the end of "whose ..."; None if it can."""
    if model_type in CONV1D_MODELS:
        return CONV1D_REASON
    if model_type in RENAMED_MODELS:
        return "experts a compressed export stores under names that vLLM does not read"
    return None
