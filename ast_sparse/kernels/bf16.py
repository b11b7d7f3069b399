"""Whether a device multiplies in bfloat16 by itself, and so faster than in float32: what `training.bf16: auto` asks."""

import torch

from ast_sparse.kernels.cpu import setting

_CPU_FEATURES = ("amx_bf16", "avx512_bf16")  # instructions that oneDNN has bf16 products for


def multiplies_in_bf16(device: torch.device) -> tuple[bool, str]:
    """Whether a device has bf16 products of its own, and the reason in words. Emulated ones do not count.

    A CPU needs AMX or AVX512-BF16 and a PyTorch with oneDNN. Devices other than CPUs and CUDA GPUs are not known here.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        has_it = torch.cuda.is_bf16_supported(including_emulation=False)
        return has_it, f"{name} {'multiplies' if has_it else 'does not multiply'} in bf16"
    if device.type != "cpu":
        return False, f"unknown for the device {device.type}"
    found = [name for name in _CPU_FEATURES if setting.capabilities().get(name)]
    if not found:
        return False, f"this CPU has neither {' nor '.join(_CPU_FEATURES)}"
    if not torch.backends.mkldnn.is_available():
        return False, "this PyTorch has no oneDNN"
    return True, f"this CPU has {found[0]}"
