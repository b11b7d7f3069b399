"""`linear24` on an NVIDIA GPU. Not measured on a GPU yet: written for H100, tested in Triton's interpreter.

The environment variable AST_SPARSE_GPU chooses:

- `auto`, the default: for each shape and number of tokens the candidates are measured once, in milliseconds, and the
  fastest is used. One line of the log (INFO) says which. Each process measures for itself, so two runs, or two ranks,
  may choose different ways, whose results agree within rounding.
- `fixed`: the first candidate, unmeasured, so that every run and every rank computes the same bits.
- `plain`: decode with PyTorch's operations, then `F.linear`.

Candidates: up to 4 tokens `vectors`, from 2 to 256 `tiles` (`triton24.py`); from 17 tokens also W decoded into a
workspace, and from 65 PyTorch's semi-structured products (`prefill.py`). Numbers of tokens between two powers of two
have the same candidates and are measured together.

CUDA graphs: kernels are launched on the current stream, nothing waits for the GPU, only outputs and workspaces are
allocated (by PyTorch's allocator, which gives graphs their own pool), and all launch sizes follow from shapes. While a
graph is captured nothing is measured: what was measured before for that shape is used, or the first candidate, and
never a semi-structured product. So call the model once with the shapes of the graph before capturing, as engines do:
that call also compiles the kernels.
"""

import importlib.util
import logging
import os
from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ast_sparse.errors import UserError, one_line, shown
from ast_sparse.kernels.code24 import unpack24

logger = logging.getLogger(__name__)

VARIABLE = "AST_SPARSE_GPU"
_CHOICES = ("auto", "fixed", "plain")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_TILES = 256  # tokens; above, W is spread again by too many programs
_DECODED = 17  # tokens from which decoding W first may pay
_SEMI_STRUCTURED = 65  # tokens from which the semi-structured products are tried; published: most lose below 256
_WIDEST = 8192  # tokens; more of them are measured together
_ALIGNED = 16  # bytes; the kernels read words of 8, CUTLASS of 16
_Way = Callable[[], Tensor]
_Pair = tuple[Tensor, Tensor]


def takes(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None = None, slorb: _Pair | None = None) -> bool:
    """Whether `linear` computes this product.

    Raises:
        UserError: the environment variable has an unknown value.
    """
    if not (values.is_cuda or (is_interpreted() and values.device.type == "cpu")):
        return False
    if values.dim() != 2 or torch.is_autocast_enabled(values.device.type):
        return False
    given = [each for each in (x, values, bias, *(slorb or ())) if each is not None]
    if values.dtype not in _DTYPES or any(each.dtype != values.dtype for each in given) or meta.dtype != torch.uint8:
        return False
    if any(type(each) not in (Tensor, torch.nn.Parameter) or each.device != x.device for each in (*given, meta)):
        return False
    rows, kept = values.shape
    fits = meta.shape == (rows, kept // 4) and x.shape[-1] == 2 * kept and kept % 4 == 0
    fits = fits and (bias is None or bias.shape == (rows,))
    if slorb is not None:
        s, projection = slorb
        fits = fits and s.shape == (rows, len(projection)) and projection.shape[1:] == x.shape[-1:]
    # indices of 32 bits: of units of W, of x, and of the output of `tiles`
    small = 0 < values.numel() < 1 << 32 and 0 < x.numel() < 1 << 31 and rows < (1 << 31) // _TILES
    words = values.data_ptr() % _ALIGNED == 0 and values.is_contiguous() and meta.is_contiguous()
    return fits and small and words and setting() != "plain" and fault(x.device) is None


def linear(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None = None, slorb: _Pair | None = None) -> Tensor:
    """`x Wᵀ + b`, and with SLoRB `+ (x Xᵀ) Sᵀ`, for what `takes` accepts; no gradients.

    Args:
        x: `[..., in]`; values `[out, in/2]`, meta `[out, in/8]`, bias `[out]`.
        slorb: S `[out, rank]` and X `[rank, in]`, of the dtype of x. Where `vectors` or `tiles` are the fastest, the
            product with S is part of the kernel that adds the parts of `x Wᵀ`.
    """
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    if flat.data_ptr() % _ALIGNED:
        flat = flat.clone()
    with torch.cuda.device_of(flat):  # Triton launches on the current GPU
        out = _linear(flat, values, meta, None if bias is None else bias.contiguous(), slorb)
    return out.view(*x.shape[:-1], len(values))


def _linear(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None, slorb: _Pair | None) -> Tensor:
    from ast_sparse.kernels.gpu import plans

    tokens, (rows, columns), most = len(x), (len(values), x.shape[1]), _group(len(x))
    found: dict[str, plans.Plan] = {}
    if tokens <= _TILES:
        found = {str(plan): plan for plan in plans.plans(most, rows, columns, x.dtype, _processors(x.device))}
    ways: dict[str, _Way] = {name: partial(plans.product, x, values, meta, bias, plan) for name, plan in found.items()}
    if tokens >= _DECODED:
        ways |= _prefill(x, values, meta, bias)
    name = _chosen(x, rows, most, ways)
    if slorb is None:
        return ways[name]()
    s, thin = slorb[0].contiguous(), F.linear(x, slorb[1])
    if name in found:
        return plans.product(x, values, meta, bias, found[name], (s, thin))
    return torch.addmm(ways[name](), thin, s.t())


def _group(tokens: int) -> int:
    """The largest number of tokens with the same candidates."""
    most = 1 << (tokens - 1).bit_length()
    return 16 if most == 8 else min(most, _WIDEST)  # `tiles` has 16 in any case


def _prefill(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None) -> dict[str, _Way]:
    from ast_sparse.kernels.gpu import prefill

    names = ["decoded"]
    if len(x) >= _SEMI_STRUCTURED and x.is_cuda:
        names += prefill.semi_structured(len(values), x.shape[1], x.dtype, x.device)
    return {name: partial(getattr(prefill, name), x, values, meta, bias) for name in names}


def _chosen(x: Tensor, rows: int, most: int, ways: dict[str, _Way]) -> str:
    """The name of the way to go."""
    first = next(iter(ways))
    if setting() == "fixed" or not x.is_cuda or len(ways) == 1:
        return first
    from ast_sparse.kernels.gpu.fastest import fastest, remembered

    key = (x.device, x.dtype, rows, x.shape[1], most)
    if torch.cuda.is_current_stream_capturing():
        known = remembered(key)
        return known if known in ways and known not in ("cutlass", "cusparselt") else first
    name = fastest(key, f"2:4 product {rows}x{x.shape[1]}, {str(x.dtype)[6:]}, up to {most} tokens", ways)
    return name if name in ways else first


def setting() -> str:
    """The value of the environment variable.

    Raises:
        UserError: it is unknown.
    """
    value = os.environ.get(VARIABLE, "auto")
    if value not in _CHOICES:
        raise UserError(f"The environment variable {VARIABLE} is {shown(value)}. Set it to auto, fixed or plain.")
    return value


@cache
def fault(device: torch.device) -> str | None:
    """Why the kernels cannot be used on a device, in one line that is also logged; None if they can.

    Tried once a process and device, on a small weight.
    """
    reason = tried(device, _wrong)
    if reason is not None:
        logger.warning(f"2:4 products decode the weights in every call on {device}: {reason}")
    return reason


def _wrong(device: torch.device) -> bool:
    from ast_sparse.kernels.gpu import prefill

    values = torch.arange(1, 65, device=device, dtype=torch.float16).view(8, 8)
    meta = torch.full((8, 2), 0xE4, device=device, dtype=torch.uint8)
    with torch.cuda.device_of(values):
        decoded = prefill.decode(values, meta)
    return not torch.equal(decoded, unpack24(values, meta))


def tried(device: torch.device, is_wrong: Callable[[torch.device], bool], needs_triton: bool = True) -> str | None:
    """Why a kernel cannot be used on a device, in one line; None if it can.

    Args:
        is_wrong: runs the kernel on a small example and returns whether its result is wrong.
    """
    if (reason := missing(device, needs_triton)) is not None:
        return reason
    try:
        return "the kernel returns wrong results." if is_wrong(device) else None
    except Exception as error:  # no C compiler, a driver that is too old: anything that Triton raises
        return f"{type(error).__name__}: {one_line(error)}"


def missing(device: torch.device, needs_triton: bool = True) -> str | None:
    """What a device lacks for any kernel of this package, in one line; None if nothing is known to."""
    if needs_triton and importlib.util.find_spec("triton") is None:
        return "triton is not installed."
    if device.type == "cuda" and torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs."
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the kernels need compute capability 8.0."
    return None


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def is_interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"
