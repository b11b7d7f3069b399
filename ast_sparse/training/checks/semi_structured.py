"""Where `sparsity.semi_structured` would have no effect."""

from transformers import TrainingArguments

from ast_sparse.config import OptimizerConfig, SparsityConfig
from ast_sparse.errors import UserError
from ast_sparse.training.fsdp import sharding_plugin
from ast_sparse.training.start.model_calls import graphs_read_copies


def check_semi_structured(
    sparsity: SparsityConfig, optimizer: OptimizerConfig, args: TrainingArguments, on_cpu: bool = False
) -> None:
    """Raise UserError if semi-structured products are asked for in a run whose forward products stay dense.

    Args:
        on_cpu: the configuration asks for a CPU.
    """
    reason = "with training.use_cpu=True there is no GPU" if on_cpu else dense_products(sparsity, optimizer, args)
    if sparsity.semi_structured == "on" and reason is not None:
        raise UserError(f"sparsity.semi_structured='on' would have no effect: {reason}. Change it, or set auto or off.")


def dense_products(sparsity: SparsityConfig, optimizer: OptimizerConfig, args: TrainingArguments) -> str | None:
    """Why the settings of a run leave its forward products dense, whatever the device is; None if they do not."""
    if sparsity.pattern != "2:4":
        return f"sparsity.pattern={sparsity.pattern!r}, and the products are for 2:4"
    if sparsity.is_gradual:
        return f"with sparsity.schedule={sparsity.schedule!r} masks do not fit 2:4 from the beginning"
    if sparsity.forward == "dense":
        return "with sparsity.forward='dense' whole weights are used"
    if not (args.bf16 or args.fp16):
        return "the products are in float32 without training.bf16 or training.fp16"
    if sharding_plugin(args) is not None:
        return "FSDP2 (training.fsdp) sends masked weights, so none are kept"
    if optimizer.offload:
        return "with optimizer.offload=True no masked weights are kept"
    if sparsity.masked_weights == "made":
        return "with sparsity.masked_weights='made' no masked weights are kept"
    if args.torch_compile and not graphs_read_copies(args.torch_compile_backend, args.torch_compile_mode):
        return "CUDA graphs (training.torch_compile_backend, torch_compile_mode) do not read kept masked weights"
    return None
