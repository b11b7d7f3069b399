"""A linear layer of vLLM whose weight stays compressed: loading, tensor parallelism, the product, SLoRB."""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.parameter import ChannelQuantScaleParameter, ModelWeightParameter

from ast_sparse.errors import UserError
from ast_sparse.export.codec import SCALE
from ast_sparse.kernels.cpu.pages import in_huge_pages
from ast_sparse.serving.slorb_serving import input_slice

if TYPE_CHECKING:
    from ast_sparse.serving.vllm_config import Vllm24Config

_DAMAGED = "Copy or export the checkpoint again."


@register_weight_loader_v2_supported_method
class Vllm24LinearMethod(LinearMethodBase):
    """Runs one layer of vLLM: `y = x Wᵀ + b`, and `+ S(Xx)` if SLoRB is served in the layers.

    Args:
        config: of the checkpoint.
        parts: the checkpoint's names of the layers that were merged into this one; usually one.
    """

    def __init__(self, config: "Vllm24Config", parts: list[str]) -> None:
        self.config = config
        self.parts = parts

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Add the stored tensors of the codec, of this rank: for 16-bit values `weight` `[out, in/2]` and `weight_meta`
        `[out, in/8]`, for 4-bit values `weight_scale` too.

        Groups run along the inputs, so vLLM splits the tensors as it splits a dense weight. They begin as NaN and 0,
        and what no file held is found by that: vLLM does not report what a quantized checkpoint lacks.
        """
        codec = self.config.codec
        step = codec.multiple if input_size_per_partition == input_size else codec.cut
        if input_size_per_partition % step:
            raise UserError(
                f"`{self.parts[0]}`: {input_size} inputs on {input_size // input_size_per_partition} tensor-parallel "
                f"ranks are not multiples of {step}. Use fewer ranks, or a dense export."
            )
        self.output_sizes, self.input_size = output_partition_sizes, input_size_per_partition
        self.load = extra_weight_attrs["weight_loader"]
        shapes = codec.shapes(sum(output_partition_sizes), input_size_per_partition)
        for name, shape, dtype in zip(codec.names, shapes, codec.dtypes(params_dtype), strict=True):
            data = torch.full(shape, torch.nan if dtype.is_floating_point else 0, dtype=dtype)
            parameter = ModelWeightParameter(data=data, input_dim=1, output_dim=0, weight_loader=self.load)
            if not dtype.is_floating_point:  # for `--load-format dummy`, which fills floats alone: positions 0 and 1
                parameter.dummy_weight_value = 0x44
            layer.register_parameter(name, parameter)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what was loaded, make plain parameters of it, and read the SLoRB pairs.

        Raises:
            UserError: a tensor is missing or damaged, or the checkpoint has a layer that vLLM has not.
        """
        self.config.check_all_built()
        codec = self.config.codec
        if self._lacks_values(layer):
            dtype = self._of_input_dtype(layer).dtype
            raise UserError(f"`{self.parts[0]}`: values are missing, or not finite in {dtype}. {_DAMAGED}")
        if not codec.check_meta(layer.weight_meta.data):
            raise UserError(f"`{self.parts[0]}`: its metadata names positions that no 2:4 group has. {_DAMAGED}")
        for name in codec.names:
            data = in_huge_pages(getattr(layer, name).data)  # on a CPU; one token reads all of it
            setattr(layer, name, nn.Parameter(data, requires_grad=False))
        if self.config.slorb is not None:
            self._add_slorb(layer)

    def _of_input_dtype(self, layer: Any) -> Tensor:
        """The stored tensor that has the dtype of x."""
        found: Tensor = layer.weight if self.config.codec.scale_columns is None else layer.weight_scale
        return found

    def _lacks_values(self, layer: Any) -> bool:
        """Whether a tensor that vLLM has not loaded still has the content of `create_weights`, or one is not finite."""
        codec = self.config.codec
        if not all(bool(getattr(layer, name).data.isfinite().all()) for name in codec.names):
            return True
        if codec.scale_columns is None:
            return False
        # Every byte is possible for values of 4 bits. But their grid reaches the largest weight, so a row of zeros has
        # scales of 0.
        has_scale, has_values = (getattr(layer, name).data.ne(0).any(1) for name in (SCALE, "weight"))
        return bool((has_scale & ~has_values).any())

    def _add_slorb(self, layer: Any) -> None:
        """Add `slorb_s` `[out, r]`, split as the outputs, and `slorb_x` `[parts · r, in]`, split as the inputs.

        vLLM's own loader places the rows of S, because it knows which heads a rank holds.
        """
        slorb = self.config.slorb
        assert slorb is not None
        rank = max(slorb.ranks.get(part, 0) for part in self.parts)
        if not rank:
            return
        weight = self._of_input_dtype(layer)
        s_rows = weight.new_zeros(weight.shape[0], rank)
        s_all = ChannelQuantScaleParameter(data=s_rows, output_dim=0, weight_loader=self.load)
        x_all = weight.new_zeros(len(self.parts), rank, self.input_size)
        shards = ("q", "k", "v") if hasattr(layer, "num_kv_head_replicas") else range(len(self.parts))
        for index, part in enumerate(self.parts):
            if part in slorb.ranks:
                s, x = slorb.pair(part)
                padded = F.pad(s, (0, rank - s.shape[1])).to(weight)
                self.load(s_all, padded, *([shards[index]] if len(self.parts) > 1 else []))
                x_all[index, : x.shape[0]] = input_slice(x, self.input_size, layer.tp_rank)
        layer.slorb_s = nn.Parameter(s_all.data, requires_grad=False)
        layer.slorb_x = nn.Parameter(x_all.flatten(0, 1), requires_grad=False)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`[..., out]` of this rank from its inputs `[..., in]`."""
        slorb = (layer.slorb_s, layer.slorb_x) if hasattr(layer, "slorb_s") else None
        fused = slorb if len(self.parts) == 1 else None
        y = self.config.codec.linear(x, layer.weight, layer.weight_meta, bias, getattr(layer, SCALE, None), fused)
        if slorb is None or fused is not None:
            return y
        inputs = F.linear(x, layer.slorb_x).chunk(len(self.parts), -1)
        rows = layer.slorb_s.split(self.output_sizes)
        return y + torch.cat([F.linear(z, s) for z, s in zip(inputs, rows, strict=True)], -1)
