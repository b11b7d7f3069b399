"""FP8 weights decoded while loading, even if their last block is cut off."""

import math
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.quantizers import auto
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.utils.quantization_config import FineGrainedFP8Config

METHOD = "ast_sparse_fp8"  # replaces `fp8` in memory, and is never written to a file


class BlockDequantize(Fp8Dequantize):
    """As in transformers, but with the block size that config.json names.

    transformers divides the size of the weight by the number of scales: 192 rows in blocks of 128 would become two
    blocks of 96.
    """

    def _dequantize_one(self, quantized: Tensor, scales: Tensor, output_dtype: torch.dtype | None = None) -> Tensor:
        block = self.hf_quantizer.quantization_config.weight_block_size
        if scales.dim() == 1 and scales.numel() == quantized.shape[-2]:  # one scale per row
            scales = scales.unsqueeze(-1)
        if block is None or scales.dim() < 2 or not _is_cut(quantized.shape, scales.shape, block):
            return super()._dequantize_one(quantized, scales, output_dtype=output_dtype)
        rows, columns = quantized.shape[-2:]
        factors = _factors(scales).repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
        return (quantized.float() * factors[..., :rows, :columns]).to(output_dtype or torch.bfloat16)


def _is_cut(shape: torch.Size, grid: torch.Size, block: tuple[int, int]) -> bool:
    """Whether the scales belong to blocks of this size, the last of which is cut off."""
    sizes = list(zip(shape[-2:], block, strict=True))
    whole = all(size % step == 0 for size, step in sizes)
    return not whole and tuple(grid[-2:]) == tuple(math.ceil(size / step) for size, step in sizes)


def _factors(scales: Tensor) -> Tensor:
    return (scales.float() - 127).exp2() if scales.dtype == torch.uint8 else scales.float()  # bytes are exponents


class Fp8Quantizer(FineGrainedFP8HfQuantizer):
    """transformers' own, with `BlockDequantize`."""

    def get_load_operations(self) -> dict[str, Any]:
        return {"dequantize": BlockDequantize}


if METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
    auto.register_quantization_config(METHOD)(FineGrainedFP8Config)
    auto.register_quantizer(METHOD)(Fp8Quantizer)
